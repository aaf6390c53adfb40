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
# limitations under the License.
"""Write the models of tiny-emoji to assets/, in half the space: float16 files of models that work in float32."""

import copy
import os

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, PreTrainedModel

from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from .data import RESOLUTION


def save_half(model, folder):
    """Save `model` with float16 weights and a configuration that asks transformers to load them as float32."""
    model = copy.deepcopy(model).half()
    model.save_pretrained(folder)
    if isinstance(model, PreTrainedModel):
        towers = [getattr(model.config, name, None) for name in ("text_config", "vision_config")]
        for config in [model.config, *filter(None, towers)]:
            config.dtype = torch.float32
        model.config.save_pretrained(folder)


def save_vae(vae, out):
    save_half(vae, os.path.join(out, "tiny-emoji", "vae"))


def save_clip(clip, tokenizer, head, out):
    """The reward's folder: clip/ and aesthetic_head.safetensors."""
    folder = os.path.join(out, "tiny-emoji-rewards")
    clip_folder = os.path.join(folder, "clip")
    save_half(clip, clip_folder)
    tokenizer.save_pretrained(clip_folder)
    CLIPImageProcessorPil(size={"shortest_edge": RESOLUTION}, crop_size=RESOLUTION).save_pretrained(clip_folder)
    head = {name: tensor.half() for name, tensor in head.state_dict().items()}
    save_file(head, os.path.join(folder, "aesthetic_head.safetensors"))


def save_pipeline(parts, out):
    """The pipeline's folder, without the autoencoder, which is there."""
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    _save_parts(
        pipeline, {name: part for name, part in parts.items() if name != "vae"}, os.path.join(out, "tiny-emoji")
    )


def save_flow_pipeline(parts, out):
    """The folder of the Stable Diffusion 3, which has no T5."""
    pipeline = StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)
    _save_parts(pipeline, parts, os.path.join(out, "tiny-emoji-sd3"))


def _save_parts(pipeline, parts, folder):
    pipeline.save_config(folder)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            save_half(part, os.path.join(folder, name))
        else:
            part.save_pretrained(os.path.join(folder, name))
