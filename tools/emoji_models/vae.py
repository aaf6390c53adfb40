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
"""The autoencoder of tiny-emoji: 48 x 48 pixels to latents of 4 x 12 x 12."""

import os

import torch
import torch.nn.functional as F

from diffusers import AutoencoderKL

from .data import RESOLUTION
from .training import fit


LATENT_CHANNELS = 4
KL_WEIGHT = 2e-4  # per latent, beside the error per value of a pixel


def make_vae():
    return AutoencoderKL(
        sample_size=RESOLUTION,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )


def reconstruction_error(decoded, images):
    """(what is minimized, what is shown of it): squared error plus a tenth of the absolute error."""
    squared = F.mse_loss(decoded, images)
    return squared + 0.1 * F.l1_loss(decoded, images), {"squared error": squared}


def train_vae(emoji, state_file, steps, batch_size=8):
    """Train on squared and absolute error with a small KL term; the scaling factor is 1 / std of the latents."""
    torch.manual_seed(1)
    vae = make_vae()

    def loss(generator):
        images = 2 * emoji.batch(batch_size, generator).images - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error, figures = reconstruction_error(decoded, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error + KL_WEIGHT * kl, {**figures, "kl": kl}

    vae = fit(vae, loss, steps, 2e-3, seed=1, state_file=state_file)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        images = 2 * emoji.batch(512, generator).images - 1
        std = vae.encode(images).latent_dist.sample(generator).std()
    vae.register_to_config(scaling_factor=round(1 / std.item(), 5))
    return vae


def load_vae(out):
    """The autoencoder that `save_vae` wrote."""
    return AutoencoderKL.from_pretrained(os.path.join(out, "tiny-emoji", "vae"))


def train_decoder(vae, emoji, state_file, steps, batch_size=8):
    """Train the decoder alone for longer, on the latents of the encoder as it is; returns the whole autoencoder."""
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    def loss(generator):
        images = 2 * emoji.batch(batch_size, generator).images - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample(generator)
        decoded = vae.decode(latents).sample
        return reconstruction_error(decoded, images)

    average = fit(decoder, loss, steps, 1e-3, seed=9, state_file=state_file)
    decoder.load_state_dict(average.state_dict())
    return vae
