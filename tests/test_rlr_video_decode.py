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
"""Decoding videos latent frame by latent frame: the same values and gradient in less memory."""

import copy

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.video import to_videos
from diffusion_models.wan import decoded_chunks
from rlr_video_models import WAN_FOLDERS, tiny_wan, tiny_wan22

from diffusers import AutoencoderTiny


VARIANTS = {"Wan 2.1": tiny_wan, "Wan 2.2 5B": tiny_wan22}
FRAMES = (1, 4)


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    """In float64, with a VAE that saturates some pixels."""
    return saturating(load_model(VARIANTS[request.param](), dtype=torch.float64))


def saturating(model):
    torch.manual_seed(0)
    for weight in model.pipeline.vae.decoder.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    return model


def random_latents(model, frames, batch_size=2):
    """Latents that need a gradient, (B, C, frames, 2, 4)."""
    shape = batch_size, model.latent_channels(model.pipeline), frames, 2, 4
    return torch.randn(shape, dtype=model.pipeline.vae.dtype, requires_grad=True)


def whole(vae, latents):
    """What the VAE itself decodes, clamped."""
    mean, std = (latents.new_tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode(latents * std + mean).sample


def unclamped(vae, latents):
    """The same before the clamp, to the bit: the last layer gives a 128th, of which nothing is clamped."""
    vae = copy.deepcopy(vae)
    for weight in vae.decoder.conv_out.parameters():
        weight.div_(128)
    return 128 * whole(vae, latents)


def gradient(values, weight, latents):
    return torch.autograd.grad((weight * values).sum(), latents)[0]


def assert_same(found, expected, tolerance=1e-10):
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


# Against the VAE's own decoding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_values_are_those_of_the_vae_to_the_bit(model, dtype):
    vae = copy.deepcopy(model.pipeline.vae)
    torch.nn.Module.to(vae, dtype)
    for frames in FRAMES:
        latents = random_latents(model, frames).to(dtype)
        chunks, expected = list(decoded_chunks(vae, latents)), unclamped(vae, latents)
        assert torch.equal(torch.cat(chunks, 2), expected) and chunks[0].dtype == dtype
        assert torch.equal(expected.clamp(-1, 1), whole(vae, latents))
        assert (
            [chunk.shape[2] for chunk in chunks] == model.chunk_frames(expected.shape[2]) == [1] + [4] * (frames - 1)
        )


def test_the_gradient_is_that_of_the_vae_also_of_pixels_that_it_clamps(model):
    for frames in FRAMES:
        latents = random_latents(model, frames)
        decoded = torch.cat(list(decoded_chunks(model.pipeline.vae, latents)), 2)
        expected = unclamped(model.pipeline.vae, latents)
        assert frames == 1 or expected.abs().max() > 1
        weight = torch.randn_like(expected)
        found = gradient(decoded, weight, latents)
        assert_same(found, gradient(expected, weight, latents))
        assert_same(gradient(model.decode(latents), weight.transpose(1, 2), latents), found / 2, 1e-6)


def test_gradients_may_be_asked_for_again_and_in_parts(model):
    """What is computed again has not been changed by the first time; frames may be left out."""
    latents = random_latents(model, 4, batch_size=1)
    chunks = list(decoded_chunks(model.pipeline.vae, latents))
    weights = [torch.randn_like(chunk) for chunk in chunks]
    parts = [torch.autograd.grad((w * c).sum(), latents, retain_graph=True)[0] for w, c in zip(weights, chunks)]
    together = sum((weight * chunk).sum() for weight, chunk in zip(weights, chunks))
    first, second = (torch.autograd.grad(together, latents, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_same(sum(parts), first, 1e-6)
    assert all(part[:, :, i + 1 :].eq(0).all() and part[:, :, 0].ne(0).any() for i, part in enumerate(parts))


# Prefixes


def test_a_chunk_is_that_of_the_whole_video_in_values_and_gradient(model):
    latents = random_latents(model, 4, batch_size=1)
    videos, start = model.decode(latents), 0
    for index, length in enumerate(model.chunk_frames(13)):
        chunk, expected = model.decode_chunk(latents, index), videos[:, start : start + length]
        assert torch.equal(chunk, expected)
        weight = torch.randn_like(chunk)
        found = gradient(chunk, weight, latents)
        assert_same(found, torch.autograd.grad((weight * expected).sum(), latents, retain_graph=True)[0], 1e-6)
        assert found[:, :, index + 1 :].eq(0).all()
        start += length
    assert start == videos.shape[1] == 13


def test_frames_behind_a_chunk_are_not_decoded(model):
    decoded = []
    hook = model.pipeline.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(1))
    with torch.no_grad():
        model.decode_chunk(random_latents(model, 5), 2)
    hook.remove()
    assert len(decoded) == 3


@pytest.mark.parametrize("index", [-1, 3])
def test_a_chunk_that_is_not_there_is_refused(model, index):
    with pytest.raises(ValueError, match=f"no latent frame {index} in latents of 3 frames"):
        model.decode_chunk(random_latents(model, 3), index)


def test_another_vae_is_refused(model):
    with pytest.raises(ValueError, match="the VAE of Wan can be replaced by no other"):
        model.decode(random_latents(model, 1), AutoencoderTiny())


# Values for the eye, gradients for the training


def test_videos_are_clamped_and_their_gradient_is_not():
    decoded = torch.tensor([-3.0, -1.0, -0.5, 0.25, 1.0, 7.5]).view(1, 1, 6, 1, 1).repeat(2, 3, 1, 2, 2)
    decoded.requires_grad_()
    videos = to_videos(decoded.bfloat16())
    assert videos.dtype == torch.float32 and videos.shape == (2, 6, 3, 2, 2)
    assert videos[0, :, 1, 0, 1].tolist() == [0.0, 0.0, 0.25, 0.625, 1.0, 1.0]
    weight = torch.randn_like(videos).bfloat16().float()
    assert torch.equal(gradient(videos, weight, decoded), weight.transpose(1, 2) / 2)


def test_values_that_are_not_finite_stay_so():
    assert not to_videos(torch.tensor([float("nan"), float("inf")]).view(1, 1, 2, 1, 1)).isfinite().any()


# Memory


def kept_bytes(decode, latents):
    """Bytes that autograd keeps for the backward pass of the decoded video."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoded = decode(latents)
    return sum(size for size, _ in kept.values()), decoded


def test_little_is_kept_of_a_long_video(model):
    """Of 33 frames, less than of 5 by the VAE itself; the parameters, which are always there, are not counted."""
    vae = model.pipeline.vae
    weights = sum({p.untyped_storage().data_ptr(): p.nbytes for p in vae.parameters()}.values())
    long, short = random_latents(model, 9), random_latents(model, 2)
    chunked, _ = kept_bytes(lambda x: list(decoded_chunks(vae, x)), long)
    by_vae, short_by_vae = (kept_bytes(lambda x: whole(vae, x), x)[0] - weights for x in (long, short))
    assert chunked < by_vae / 15 and chunked < short_by_vae / 2


def test_every_variant_says_its_chunks():
    for folder in WAN_FOLDERS.values():
        model = load_model(folder())
        assert [model.chunk_frames(frames) for frames in (1, 5, 9)] == [[1], [1, 4], [1, 4, 4]]
