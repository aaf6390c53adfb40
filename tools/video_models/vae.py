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
"""The autoencoder of tiny-wan: 9 frames of 32 x 32 pixels to latents of 16 x 3 x 4 x 4."""

import os

import torch
import torch.nn.functional as F
from emoji_models.training import best_device, fit

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

from .data import NUM_FRAMES


LATENT_CHANNELS = 16
PATCH = 2  # the network sees half the resolution: fast on a CPU
VIDEO_BATCH, IMAGE_BATCH = (8, NUM_FRAMES), (32, 1)  # how many, and their frames
IMAGE_SHARE = 0.5  # of the steps
KL_WEIGHT = 2e-4  # per latent, beside the error per value of a pixel


def make_vae():
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=4 * PATCH,
    )


def encode(vae, videos):
    """Videos (B, F, 3, H, W) in [0, 1] -> the distribution of their latents (B, 16, f, h, w)."""
    return vae.encode(2 * videos.transpose(1, 2) - 1).latent_dist


def decode(vae, latents):
    """Latents (B, 16, f, h, w) -> videos (B, F, 3, H, W), not clamped: beyond [0, 1], a clamp has no gradient."""
    cache = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    frames = [vae.decoder(one, feat_cache=cache, feat_idx=[0]) for one in vae.post_quant_conv(latents).split(1, 2)]
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size).transpose(1, 2) / 2 + 0.5


def train_vae(digits, state_file, steps):
    """Train on videos and images, on squared and absolute error with a small KL term.

    The means and standard deviations of the latents' channels go to the configuration.
    """
    torch.manual_seed(1)
    vae = make_vae().to(best_device())

    def loss(generator):
        size, num_frames = IMAGE_BATCH if torch.rand((), generator=generator) < IMAGE_SHARE else VIDEO_BATCH
        videos = digits.batch(size, generator, num_frames).videos.to(vae.device)
        posterior = encode(vae, videos)
        decoded = decode(vae, posterior.sample(generator))
        squared = 4 * F.mse_loss(decoded, videos)  # in [-1, 1], as the network has it
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return squared + 0.2 * F.l1_loss(decoded, videos) + KL_WEIGHT * kl, {"squared error": squared, "kl": kl}

    vae = fit(vae, loss, steps, 2e-3, seed=1, state_file=state_file).cpu()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        latents = encode(vae, digits.batch(512, generator).videos).sample(generator)
    std, mean = torch.std_mean(latents, (0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def load_vae(out):
    """The trained autoencoder in the folder of the assets."""
    return AutoencoderKLWan.from_pretrained(os.path.join(out, "tiny-wan", "vae"), dtype=torch.float32)
