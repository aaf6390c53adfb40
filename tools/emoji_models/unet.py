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
"""The U-Net of tiny-emoji, trained on the latents of its autoencoder and the captions' embeddings of its CLIP."""

import os

import torch
from tiny_stable_diffusion import make_scheduler, tokenize
from tqdm import trange
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers import UNet2DConditionModel
from diffusers.training_utils import compute_snr

from .data import Captions
from .training import fit
from .vae import load_vae


EMPTY_CAPTIONS = 0.1  # the share that classifier-free guidance needs
SNR_GAMMA = 5.0  # min-SNR weighting (huggingface.co/papers/2303.09556)


def make_unet(latent_channels, latent_size, width):
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
    )


@torch.no_grad()
def encode_images(emoji, vae, file, count, size=100):
    """Means and standard deviations (count, 2c, h, w) of the latents of `count` images, with a caption (count,) each.

    Kept in `file`: a later call with the same autoencoder reads them.
    """
    weights = torch.cat([parameter.flatten() for parameter in vae.parameters()])
    saved = torch.load(file, weights_only=True) if os.path.exists(file) else {}
    if len(saved.get("captions", [])) != count or not torch.equal(saved["weights"], weights):
        generator, captions = torch.Generator().manual_seed(5), Captions(emoji.concepts)
        latents, index = [], []
        for _ in trange(0, count, size, desc="latents"):
            batch = emoji.batch(size, generator)
            posterior = vae.encode(2 * batch.images - 1).latent_dist
            latents.append(torch.cat([posterior.mean, posterior.std], 1))
            index.append(captions.index(batch, generator))
        saved = {"latents": torch.cat(latents), "captions": torch.cat(index), "weights": weights}
        torch.save(saved, f"{file}.new")
        os.replace(f"{file}.new", file)
    return saved["latents"], saved["captions"]


def train_unet(emoji, state_file, steps, out, num_latents, batch_size=32):
    """Train on noise prediction. Returns the parts of the pipeline.

    Args:
        num_latents: images that are encoded once; each is seen several times.
    """
    vae = load_vae(out)
    clip_folder = os.path.join(out, "tiny-emoji-rewards", "clip")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32)
    latents, index = encode_images(emoji, vae, os.path.join(os.path.dirname(state_file), "latents.pt"), num_latents)
    texts = Captions(emoji.concepts).texts
    with torch.no_grad():
        embeds = text_encoder(tokenize(tokenizer, [*texts, ""]))[0]
    scheduler = make_scheduler()
    torch.manual_seed(6)
    unet = make_unet(vae.config.latent_channels, latents.shape[-1], embeds.shape[-1])

    def loss(generator):
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        mean, std = latents[pick].chunk(2, 1)
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        dropped = torch.rand(batch_size, generator=generator) < EMPTY_CAPTIONS
        prompt_embeds = embeds[torch.where(dropped, len(texts), index[pick])]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, prompt_embeds).sample
        error = (predicted - noise).square().mean((1, 2, 3))
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=SNR_GAMMA) / snr
        return (weight * error).mean(), {"error": error.mean()}

    unet = fit(unet, loss, steps, 1e-3, seed=6, state_file=state_file, weight_decay=1e-3)
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
