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
"""HPSv2 and HPSv2.1 (huggingface.co/papers/2306.09341): human preference. SD 1.x scores .24 to .28."""

import functools
import os

from transformers import CLIPConfig, CLIPModel

from .clip import ClipAgreement, load_tokenizer, preprocess_letterbox, tokenizer_source
from .loading import (
    existing_file,
    has_file,
    hub_file,
    load_pretrained,
    load_state_dict,
    one_line_errors,
    read_json,
    rename_keys,
)


MODEL_ID = "xswu/HPSv2"
# open_clip's configuration of the published checkpoints, used if the folder has no open_clip_config.json.
VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
# open_clip's key names -> transformers', applied in this order.
RENAMES = (
    (r"^visual\.", "vision_model."),
    (r"^(transformer|token_embedding|positional_embedding|ln_final)", r"text_model.\1"),
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"(class_embedding|token_embedding)", r"embeddings.\1"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"conv1\.", "embeddings.patch_embedding."),
    (r"ln_pre\.", "pre_layrnorm."),
    (r"ln_post\.", "post_layernorm."),
    (r"ln_final\.", "final_layer_norm."),
    (r"\.ln_", ".layer_norm"),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"^vision_model\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
)


def clip_config(model):
    """Convert open_clip's `model_cfg` to a transformers CLIPConfig."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

    def tower(part, heads):
        return {
            "hidden_size": part["width"],
            "intermediate_size": int(part["width"] * part.get("mlp_ratio", 4)),
            "num_hidden_layers": part["layers"],
            "num_attention_heads": heads,
            "hidden_act": activation,
            "projection_dim": model["embed_dim"],
        }

    return CLIPConfig(
        vision_config={
            **tower(vision, vision["width"] // vision.get("head_width", 64)),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config={
            **tower(text, text["heads"]),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            # The last two tokens of CLIP's vocabulary are start and end of text.
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
        },
        projection_dim=model["embed_dim"],
    )


def clip_state(state):
    """Convert an open_clip state dict to the keys of a transformers CLIPModel."""
    result = {}
    for key, value in rename_keys(state, RENAMES).items():
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T
        if ".in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                result[key.replace("in_proj_", f"{name}_proj.")] = part.contiguous()
        else:
            result[key] = value.contiguous()
    return result


def load(path, revision, device, dtype, file_name="HPS_v2_compressed.pt"):
    """Load from the Hub, or from a folder with the published checkpoint `file_name`.

    The folder may also hold the tokenizer's files, for offline use, and `open_clip_config.json`, for a model of
    another size. R = cos(f(image), g(prompt)), without a scale.
    """
    file = hub_file(MODEL_ID, file_name, revision) if path is None else existing_file(path, file_name)
    config = clip_config(VIT_H_14)
    if has_file(path, "open_clip_config.json"):
        config_file = os.path.join(path, "open_clip_config.json")
        content = read_json(config_file)
        with one_line_errors(config_file):
            config = clip_config(content["model_cfg"])
    state = load_state_dict(file, "state_dict")
    with one_line_errors(file):
        state = clip_state(state)
    clip = load_pretrained(CLIPModel, file, config=config, state_dict=state, dtype=dtype)
    tokenizer = load_tokenizer(tokenizer_source(path))
    return ClipAgreement(clip, tokenizer, preprocess_letterbox).to(device)


load_v2_1 = functools.partial(load, file_name="HPS_v2.1_compressed.pt")
