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
"""LoRA files of the layouts that trainers write, and what their layers do."""

import json

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch.nn import functional as F


METADATA = "lora_adapter_metadata"
# Layers of all kinds that both tiny U-Nets have: (rank, alpha).
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (4, 2.0),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (4, 4.0),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (4, 2.0),
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": (2, 4.0),
    "up_blocks.0.attentions.0.proj_in": (4, 1.0),
    "mid_block.resnets.1.conv1": (3, 1.0),
    "down_blocks.0.downsamplers.0.conv": (4, 4.0),
    "down_blocks.0.resnets.0.time_emb_proj": (4, 2.0),
    "conv_in": (2, 3.0),
}


def matrices_of(network, layers=LAYERS):
    """{name: (A, B, alpha)} with random matrices for layers {name: (rank, alpha)}."""
    found = {}
    for name, (rank, alpha) in layers.items():
        shape = network.get_submodule(name).weight.shape
        B = torch.randn(shape[0], rank, *[1] * len(shape[2:]))
        found[name] = torch.randn(rank, *shape[1:]), B, alpha
    return found


def expected_updates(matrices, scale=lambda alpha, rank: alpha / rank):
    """{name: the weight that is added to a layer's}, computed in float64."""
    found = {}
    for name, (A, B, alpha) in matrices.items():
        product = B.double().flatten(1) @ A.double().flatten(1)
        found[name] = scale(alpha, len(A)) * product.reshape(len(B), *A.shape[1:])
    return found


def assert_updates(network, expected):
    """What the layers add to their input's image is what the expected weights do; of no other layers."""
    network.double()
    adapted = {name for name, module in network.named_modules() if hasattr(module, "lora_A")}
    assert adapted == expected.keys()
    for name, weight in expected.items():
        module = network.get_submodule(name)
        base = module.base_layer
        if weight.ndim == 2:
            x = torch.randn(5, weight.shape[1], dtype=torch.float64)
            wanted = F.linear(x, weight)
        else:
            x = torch.randn(2, weight.shape[1], 6, 6, dtype=torch.float64)
            wanted = F.conv2d(x, weight, stride=base.stride, padding=base.padding)
        torch.testing.assert_close(module(x) - base(x), wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


# The layouts


def in_kohya(matrices, spell=lambda name: name, prefix="lora_unet_"):
    tensors = {}
    for name, (A, B, alpha) in matrices.items():
        key = prefix + spell(name).replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def in_diffusers(matrices, down, up):
    """Without alphas: those are in the metadata."""
    tensors = {}
    for name, (A, B, _) in matrices.items():
        tensors |= {f"unet.{name}{down}": A, f"unet.{name}{up}": B}
    return tensors


def config_of(matrices, **changes):
    """The configuration that peft writes for such layers, with patterns for those that differ from the first."""
    (first, _, alpha), *_ = matrices.values()
    ranks = {name: len(A) for name, (A, _, _) in matrices.items() if len(A) != len(first)}
    alphas = {name: own for name, (_, _, own) in matrices.items() if own != alpha}
    config = LoraConfig(
        **{"r": len(first), "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, **changes},
        target_modules=list(matrices),
    ).to_dict()
    return {key: list(value) if isinstance(value, set) else value for key, value in config.items()}


def save(tensors, path, config=None, component="unet"):
    """Write a file, with a configuration in the metadata of diffusers."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata[METADATA] = json.dumps({f"{component}.{key}": value for key, value in config.items()})
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return str(path)
