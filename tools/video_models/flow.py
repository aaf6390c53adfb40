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
"""The transformer of tiny-wan and its text encoder, trained together on the latents of its autoencoder."""

import copy
import os

import torch
import torch.nn.functional as F
from emoji_models.training import best_device, fit
from tqdm import trange
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import compute_density_for_timestep_sampling

from .data import Captions
from .vae import encode, load_vae


EMPTY_CAPTIONS = 0.1  # the share that classifier-free guidance needs
IMAGE_SHARE = 0.25  # of the steps; an image is the first frame of a video
SHIFT = 3.0  # of the scheduler, Wan's own for small videos
# The mean and standard deviation of the noise levels' logits: more noise than none, for the shift.
LEVELS = {"logit_mean": 0.5, "logit_std": 1.2}
# Wan's pipeline fills prompts with zeros up to max_sequence_length, 512 if the call does not say.
LENGTHS, LONG_LENGTH, LONG_SHARE = (8, 16), 512, 0.05
TEXT_WIDTH = 64


def make_tokenizer():
    """A T5Tokenizer with one token for each word of the captions; other words are unknown."""
    words = dict.fromkeys(word for text in Captions().texts for word in text.split())
    tokens = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words)]
    return T5Tokenizer(vocab=[(token, -float(index)) for index, token in enumerate(tokens)], extra_ids=0)


def make_text_encoder(tokenizer):
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UMT5EncoderModel(config)


def make_transformer(latent_channels):
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
        rope_max_seq_len=64,
    )


@torch.no_grad()
def encode_videos(digits, vae, file, count, size=50):
    """Means and standard deviations (count, 2 x 16, f, h, w) of the latents of `count` videos, with a caption (count,) each.

    Kept in `file`: a later call with the same autoencoder reads them.
    """
    weights = torch.cat([parameter.flatten() for parameter in vae.parameters()])
    vae = copy.deepcopy(vae).to(best_device())
    saved = torch.load(file, weights_only=True) if os.path.exists(file) else {}
    if len(saved.get("captions", [])) != count or not torch.equal(saved["weights"], weights):
        generator, captions = torch.Generator().manual_seed(4), Captions()
        latents, index = [], []
        for _ in trange(0, count, size, desc="latents"):
            batch = digits.batch(size, generator)
            posterior = encode(vae, batch.videos.to(vae.device))
            latents.append(torch.cat([posterior.mean, posterior.std], 1).cpu())
            index.append(captions.index(batch, generator))
        saved = {"latents": torch.cat(latents), "captions": torch.cat(index), "weights": weights}
        torch.save(saved, f"{file}.new")
        os.replace(f"{file}.new", file)
    return saved["latents"], saved["captions"]


def draw_length(generator):
    """A number of tokens to fill prompts to: few, so that steps are fast, and now and then as many as the pipeline has."""
    if torch.rand((), generator=generator) < LONG_SHARE:
        return LONG_LENGTH
    return int(torch.randint(LENGTHS[0], LENGTHS[1] + 1, (), generator=generator))


def embed(text_encoder, tokens, length):
    """Prompt embeddings (B, length, D) as Wan's pipeline makes them: zeros after the end of each prompt."""
    embeds = text_encoder(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
    return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def train_flow(digits, state_file, steps, out, num_latents, batch_size=64):
    """Train on the velocity of the flow from videos to noise. Returns the parts of the pipeline.

    Args:
        num_latents: videos that are encoded once; each is seen several times.
    """
    vae, tokenizer, device = load_vae(out), make_tokenizer(), best_device()
    file = os.path.join(os.path.dirname(state_file), "latents.pt")
    latents, index = encode_videos(digits, vae, file, num_latents)
    texts = [*Captions().texts, ""]
    tokens = tokenizer(texts, padding="max_length", max_length=LENGTHS[0], return_tensors="pt")
    shift, scale = (
        torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.manual_seed(5)
    parts = {"transformer": make_transformer(vae.config.z_dim), "text_encoder": make_text_encoder(tokenizer)}
    model = torch.nn.ModuleDict(parts).to(device)

    def loss(generator):
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        of_images = torch.rand((), generator=generator) < IMAGE_SHARE
        mean, std = latents[pick, :, : 1 if of_images else None].chunk(2, 1)
        clean = (mean + std * torch.randn(mean.shape, generator=generator) - shift) / scale
        dropped = torch.rand(batch_size, generator=generator) < EMPTY_CAPTIONS
        prompts = torch.where(dropped, texts.index(""), index[pick])
        asked = {name: tokens[name][prompts].to(device) for name in ("input_ids", "attention_mask")}
        embeds = embed(model["text_encoder"], asked, draw_length(generator))
        noise = torch.randn(clean.shape, generator=generator)
        sigma = compute_density_for_timestep_sampling("logit_normal", batch_size, **LEVELS, generator=generator)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        predicted = model["transformer"](noisy.to(device), 1000 * sigma.to(device), embeds).sample
        error = (predicted - (noise - clean).to(device)).square().mean()
        return error, {"error": error}

    model = fit(model, loss, steps, 1.5e-3, seed=5, state_file=state_file, weight_decay=1e-3).cpu()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    return {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler, **dict(model.items())}


def load_pipeline(out):
    """The trained pipeline in the folder of the assets."""
    pipeline = WanPipeline.from_pretrained(os.path.join(out, "tiny-wan"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
