#!/usr/bin/env python
# coding=utf-8
# Copyright 2026 The RLR Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
"""How large the networks of the rewards are, by the classes that load them, without their weights.

    python benchmarks/reward_sizes.py        or, for a short test, with --quick

Writes reward_sizes.csv: parameters, and GiB in the precision that each is loaded in.
"""

import os

import torch
from bench_common import VERSIONS, make_parser, parse_benchmark, write_csv
from reward_cost import CLIP_L_TOWER, CLIP_L_WORDS
from reward_models.hpsv2 import VIT_H_14, clip_config
from reward_models.hpsv3 import make_head
from reward_models.imagereward import VIT_L_16
from reward_models.known import REWARDS
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipConfig,
    SiglipModel,
)


def clip_large():
    tower = {**CLIP_L_TOWER, "patch_size": 14}
    return [CLIPModel(CLIPConfig(vision_config=tower, text_config=CLIP_L_WORDS, projection_dim=768))]


def clip_huge():
    return [CLIPModel(clip_config(VIT_H_14))]


def blip():
    vision = BlipVisionConfig(**VIT_L_16, intermediate_size=4096)
    text = BlipTextConfig(
        hidden_size=768, vocab_size=30524, encoder_hidden_size=1024, is_decoder=True, bos_token_id=None
    )
    return [BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)]


def siglip():
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision = {**tower, "patch_size": 14, "image_size": 384}
    return [SiglipModel(SiglipConfig(vision_config=vision, text_config={**tower, "vocab_size": 32000})).vision_model]


def qwen2_vl(width, inner, layers, heads, vocab_size, tied):
    text = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    text |= {"num_key_value_heads": 4 if heads == 28 else 2, "vocab_size": vocab_size}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": width, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return [Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied))]


def qwen2_vl_2b():
    return qwen2_vl(1536, 8960, 28, 12, 151936, True)


def hpsv3():
    return [*qwen2_vl(3584, 18944, 28, 28, 151658, False), make_head(3584)]


def qwen2_5_vl_3b():
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151936}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    return [model]


NETWORKS = {
    **{"aesthetic": clip_large, "clip_score": clip_large, "video_smoothness": clip_large, "hpsv2": clip_huge},
    **{"hpsv2.1": clip_huge, "pickscore": clip_huge, "imagereward": blip, "aesthetic_v2.5": siglip},
    **{"vqa": qwen2_5_vl_3b, "hpsv3": hpsv3, "videoalign": qwen2_vl_2b},
}


def run(input_args=None):
    args = parse_benchmark(make_parser(__doc__), input_args)
    names, rows = list(NETWORKS)[:1] if args.quick else NETWORKS, []
    for name in names:
        with torch.device("meta"):
            modules = NETWORKS[name]()
        parameters = sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
        dtype = REWARDS[name].dtype
        gib = parameters * dtype.itemsize / 2**30
        rows.append(
            {
                "reward": name,
                "million_parameters": round(parameters / 1e6, 1),
                "dtype": str(dtype),
                "gib": round(gib, 2),
            }
        )
        print("  ".join(map(str, rows[-1].values())))
    write_csv(rows, os.path.join(args.out, "reward_sizes.csv"), f"python benchmarks/reward_sizes.py, {VERSIONS}")
    return rows


if __name__ == "__main__":
    run()
