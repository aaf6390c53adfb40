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
"""Decoders whose blocks are computed again by the backward pass."""

import weakref

import pytest
import torch
from diffusion_models.decoders import computed_again, decoder_blocks, recompute_blocks
from rlr_training.memory import LiveBytes

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)


IMAGES = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
SHORT = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
# Of Wan 2.2, whose upsampling has a shortcut.
RESIDUAL = {"is_residual": True, "decoder_base_dim": 8, "patch_size": 2, "in_channels": 12, "out_channels": 12}
VAES = {
    "images": (lambda: AutoencoderKL(**IMAGES), (2, 4, 8, 8)),
    "qwen": (lambda: AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1), (1, 16, 1, 4, 4)),
    "wan": (lambda: AutoencoderKLWan(base_dim=8, num_res_blocks=1), (1, 16, 3, 4, 4)),
    "wan 2.2": (lambda: AutoencoderKLWan(base_dim=8, num_res_blocks=1, **RESIDUAL), (1, 16, 3, 4, 4)),
    "ltx": (lambda: AutoencoderKLLTXVideo(block_out_channels=(8, 16, 16, 16)), (1, 128, 2, 2, 2)),
    "cogvideox": (lambda: AutoencoderKLCogVideoX(**SHORT), (1, 16, 3, 2, 2)),
}


@pytest.mark.parametrize("name", VAES)
def test_the_graph_keeps_the_inputs_of_blocks_and_the_numbers_stay(name):
    """Also where a decoder of videos hands on features from frame to frame."""
    make, shape = VAES[name]
    torch.manual_seed(0)
    vae, latents = make().requires_grad_(False), torch.randn(shape, requires_grad=True)

    def decoded():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            images = vae.decode(latents, return_dict=False)[0]
        (gradient,) = torch.autograd.grad(images.square().sum(), latents)
        return images, gradient, sum(kept)

    images, gradient, kept = decoded()
    assert gradient.norm() > 0 and len(list(decoder_blocks(vae.decoder))) >= 4
    recompute_blocks(vae.decoder)
    images_again, gradient_again, kept_again = decoded()
    assert torch.equal(images, images_again) and torch.equal(gradient, gradient_again)
    assert kept_again < kept / 3
    with torch.no_grad():
        assert torch.equal(vae.decode(latents, return_dict=False)[0], images)


def test_less_is_taken_than_by_the_checkpointing_of_diffusers():
    vae = AutoencoderKL(**IMAGES, layers_per_block=3).requires_grad_(False)
    latents, peaks = torch.randn(1, 4, 16, 16, requires_grad=True), []
    for prepare in (vae.enable_gradient_checkpointing, lambda: recompute_blocks(vae.decoder)):
        prepare()
        with LiveBytes() as live:
            vae.decode(latents, return_dict=False)[0].sum().backward()
        peaks.append(live.peak)
        vae.disable_gradient_checkpointing()
    assert peaks[1] < 0.8 * peaks[0]


def test_within_another_one_nothing_is_kept_of_what_lists_and_dicts_hold():
    made = []

    def inner(x, parts):
        return x * parts["list"][0] + parts["text"].count("a")

    def outer(x):
        memory = x.sin()
        made.append(weakref.ref(memory))
        return computed_again(inner, x, {"list": [memory], "text": "a"}).cos()

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = computed_again(outer, x)
    assert made[0]() is None
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = -(x * x.sin() + 1).sin() * (x.sin() + x * x.cos())
    torch.testing.assert_close(gradient, expected)
    assert len(made) == 2
