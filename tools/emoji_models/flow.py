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
"""The flow-matching pipeline: a small Stable Diffusion 3 on the autoencoder and the text tower that are there."""

import os

import torch
from tiny_stable_diffusion import tokenize
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling

from .data import Captions
from .training import fit
from .unet import EMPTY_CAPTIONS, encode_images
from .vae import load_vae


SHIFT = 3.0  # Stable Diffusion 3's own
# The pipeline has no T5. For it Stable Diffusion 3 appends zeros: 256 tokens, or as many as max_sequence_length says.
PADDINGS, LONG_PADDING, LONG_SHARE = (1, 8), 256, 0.1


def make_second_encoder(tokenizer, length):
    """A small second text encoder, trained with the transformer: of one layer, whose input alone the pipeline takes."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer(latent_channels, latent_size, width, pooled_width):
    return SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=width,
        caption_projection_dim=96,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=latent_size,
        qk_norm="rms_norm",
    )


def encode(encoder, ids):
    """What the pipeline takes of a text encoder: its last layer but one (B, L, D), and the projection (B, D')."""
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def draw_padding(generator):
    """A number of zeros after a prompt: few, so that steps are fast, and now and then as many as the pipeline appends."""
    if torch.rand((), generator=generator) < LONG_SHARE:
        return LONG_PADDING
    return int(torch.randint(PADDINGS[0], PADDINGS[1] + 1, (), generator=generator))


def train_flow(emoji, state_file, steps, out, num_latents, batch_size=48):
    """Train on the velocity of the flow from images to noise. Returns the parts of the pipeline.

    Args:
        num_latents: images that are encoded once; each is seen several times.
    """
    vae = load_vae(out)
    clip_folder = os.path.join(out, "tiny-emoji-rewards", "clip")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    first = CLIPTextModelWithProjection.from_pretrained(clip_folder, dtype=torch.float32)
    latents, index = encode_images(emoji, vae, os.path.join(os.path.dirname(state_file), "latents.pt"), num_latents)
    texts = Captions(emoji.concepts).texts
    ids = tokenize(tokenizer, [*texts, ""])
    with torch.no_grad():
        embeds, pooled = encode(first, ids)
    torch.manual_seed(9)
    second = make_second_encoder(tokenizer, ids.shape[1])
    widths = [first.config.hidden_size + 32, first.config.projection_dim + 32]
    transformer = make_transformer(vae.config.latent_channels, latents.shape[-1], *widths)
    model = torch.nn.ModuleDict({"transformer": transformer, "text_encoder_2": second})

    def loss(generator):
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        mean, std = latents[pick].chunk(2, 1)
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        dropped = torch.rand(batch_size, generator=generator) < EMPTY_CAPTIONS
        prompts = torch.where(dropped, len(texts), index[pick])
        own, own_pooled = encode(model["text_encoder_2"], ids[prompts])
        zeros = torch.zeros(batch_size, draw_padding(generator), widths[0])
        noise = torch.randn(clean.shape, generator=generator)
        sigma = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, 1.0, generator=generator)
        level = sigma[:, None, None, None]
        predicted = model["transformer"](
            (1 - level) * clean + level * noise,
            encoder_hidden_states=torch.cat([torch.cat([embeds[prompts], own], 2), zeros], 1),
            pooled_projections=torch.cat([pooled[prompts], own_pooled], 1),
            timestep=1000 * sigma,
        ).sample
        error = (predicted - (noise - clean)).square().mean()
        return error, {"error": error}

    model = fit(model, loss, steps, 1e-3, seed=9, state_file=state_file, weight_decay=1e-3)
    return {
        **{"vae": with_shift(vae), "text_encoder": first, "tokenizer": tokenizer, "tokenizer_2": tokenizer},
        **{"text_encoder_2": model["text_encoder_2"], "transformer": model["transformer"]},
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    }


def with_shift(vae):
    """The same autoencoder with the shift of its latents that Stable Diffusion 3 asks for: none."""
    shifted = AutoencoderKL.from_config({**vae.config, "shift_factor": 0.0})
    shifted.load_state_dict(vae.state_dict())
    return shifted
