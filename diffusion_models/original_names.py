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
"""The names of a U-Net's modules in Stability's own code, which single files and other programs go by."""

# Of what does not lie in a block.
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
# Within a resnet; an attention has the same names.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(unet):
    """{diffusers' name: original name} of the modules of a `UNet2DConditionModel` that hold weights.

    The original counts one resnet, the attention after it and a downsampler each as a block of their own kind, where
    diffusers has lists of them in few blocks.
    """
    parts = {**OUTSIDE, **_down_parts(unet), **_up_parts(unet)}
    names = {}
    for name, module in unet.named_modules():
        part = next((part for part in parts if name == part or name.startswith(f"{part}.")), None)
        if part is not None and next(module.parameters(), None) is not None:
            rest = name.removeprefix(part).removeprefix(".")
            rest = RESNET.get(rest, rest) if ".resnets." in part else rest
            names[name] = ".".join(filter(None, (parts[part], rest)))
    return names


def _layer_parts(block, name, original, place):
    """The resnets and attentions of a block, whose first pair is block number `place` of the original."""
    parts = {}
    for j in range(len(block.resnets)):
        parts[f"{name}.resnets.{j}"] = f"{original}.{place + j}.0"
        parts[f"{name}.attentions.{j}"] = f"{original}.{place + j}.1"
    return parts


def _down_parts(unet):
    parts, place = {}, 1
    for i, block in enumerate(unet.down_blocks):
        parts.update(_layer_parts(block, f"down_blocks.{i}", "input_blocks", place))
        place += len(block.resnets)
        parts[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"  # all but the last have one
        place += 1
    return parts


def _up_parts(unet):
    parts, place = {}, 0
    for i, block in enumerate(unet.up_blocks):
        parts.update(_layer_parts(block, f"up_blocks.{i}", "output_blocks", place))
        place += len(block.resnets)
        # The upsampler is in the last of them, after the attention if there is one.
        after = 2 if hasattr(block, "attentions") else 1
        parts[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    return parts
