#!/usr/bin/env python
# coding=utf-8
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
"""Train the embedded models in assets/ from scratch: a small Stable Diffusion, its CLIP and its aesthetic head.

    make assets

The data are the 1,797 handwritten digits of scikit-learn (8x8 scans, UCI ML hand-written digits), enlarged to 32x32 and
colored, with captions such as "a red seven". The models have the classes and the folder layout of Stable Diffusion v1.4, so
a command that trains assets/tiny-sd trains the full-size pipeline when its path is changed.
"""

import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from reward_models import load_reward
from reward_models.base import ScoreHead
from reward_models.clip import preprocess_clip
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tiny_stable_diffusion import TOKEN_LENGTH, make_scheduler, tokenize
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLORS = {
    "green": (0.10, 0.85, 0.25),
    "red": (0.95, 0.10, 0.10),
    "blue": (0.15, 0.30, 1.00),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.80, 0.15, 0.90),
    "cyan": (0.10, 0.90, 0.90),
}
CAPTIONS = [f"a {color} {digit}" for color in COLORS for digit in DIGITS]
RESOLUTION = 32
NUM_TRAIN_DIGITS = 1500  # the other 297 scans are held out of all training


def load_scans():
    """The digit scans as ink maps (N, 1, 32, 32) in [0, 1] with labels (N,), shuffled once with a fixed seed."""
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    ink = torch.from_numpy(digits.images[order]).float().unsqueeze(1) / 16
    ink = F.interpolate(ink, size=RESOLUTION, mode="bicubic", align_corners=False).clamp(0, 1)
    return ink, torch.from_numpy(digits.target[order])


def paint(ink, colors, generator, jitter=0.06):
    """Ink maps (B, 1, H, W) in [0, 1] and color indices (B,) -> images (B, 3, H, W) in [0, 1] on black."""
    rgb = torch.tensor(list(COLORS.values()))[colors]
    rgb = (rgb + jitter * torch.randn(rgb.shape, generator=generator)).clamp(0, 1)
    return ink * rgb[:, :, None, None]


def vary(ink, generator):
    """Vary the handwriting beyond that of the scans: weight and strength of the strokes, symmetry and position."""
    count = len(ink)
    gamma = torch.exp(torch.empty(count, 1, 1, 1).uniform_(-1.0, 1.0, generator=generator))
    thick = F.max_pool2d(F.avg_pool2d(ink, 3, 1, 1), 5, 1, 2)
    weight = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.4)
    ink = ((1 - weight) * ink + weight * thick) ** gamma
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.15
    blend = torch.rand(count, 1, 1, 1, generator=generator)
    ink = torch.where(mirrored, torch.maximum(ink, blend * ink.flip(-1)), ink)
    shift = torch.empty(count, 2).uniform_(-0.12, 0.12, generator=generator)
    theta = torch.eye(2, 3).repeat(count, 1, 1)
    theta[:, :, 2] = shift
    return F.grid_sample(ink, F.affine_grid(theta, ink.shape, align_corners=False), align_corners=False).clamp(0, 1)


def ink_of(images):
    """Ink map (B, H, W) in [0, 1] of images (B, 3, H, W): the strongest channel of each pixel."""
    return images.amax(1)


class Quality:
    """What the aesthetic head is trained to predict: half boldness, half left-right symmetry, on a scale of 1 to 10.

    Boldness is the mean ink of an image, symmetry is 1 - sum|ink - mirrored ink| / (2 sum ink). Each is mapped so
    that the 1st and 99th percentile of the real images become 0 and 1, then clipped to that range.
    """

    def __init__(self, images):
        self.low, self.high = zip(*((q.quantile(0.01), q.quantile(0.99)) for q in self.parts(images)))

    @staticmethod
    def parts(images):
        ink = ink_of(images)
        boldness = ink.mean((1, 2))
        symmetry = 1 - (ink - ink.flip(-1)).abs().sum((1, 2)) / (2 * ink.sum((1, 2))).clamp_min(1e-3)
        return boldness, symmetry

    def __call__(self, images):
        """Images (B, 3, H, W) in [0, 1] -> quality (B,) in [1, 10]."""
        unit = [((q - a) / (b - a)).clamp(0, 1) for q, a, b in zip(self.parts(images), self.low, self.high)]
        return 1 + 9 * sum(unit) / 2


def real_quality():
    """`Quality` as the assets use it, fitted on every training scan in every color."""
    ink, _ = load_scans()
    generator = torch.Generator().manual_seed(0)
    images = [paint(ink[:NUM_TRAIN_DIGITS], torch.full((NUM_TRAIN_DIGITS,), c), generator) for c in range(len(COLORS))]
    return Quality(torch.cat(images))


def make_tokenizer():
    """A CLIPTokenizer over all bytes that makes one token of every word in the captions."""
    words = ["a", *DIGITS, *COLORS]
    letters = sorted(ByteLevel.alphabet())
    merges = []
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TOKEN_LENGTH
    )
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise RuntimeError(f"the order of the merges splits {split}: list those words earlier")
    return tokenizer


def draw_batch(ink, labels, generator):
    """One scan for each of the 60 captions, in the order of CAPTIONS: ink (60, 1, 32, 32) and colors (60,)."""
    picks = []
    for _ in COLORS:
        for digit in range(10):
            candidates = (labels == digit).nonzero().squeeze(1)
            picks.append(candidates[torch.randint(len(candidates), (1,), generator=generator)])
    return ink[torch.cat(picks)], torch.arange(len(COLORS)).repeat_interleave(10)


def train_clip(out, steps):
    """Train CLIP contrastively on the 60 captions, together with the head, which predicts the quality."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 768}
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=TOKEN_LENGTH,
            num_hidden_layers=2,
            pad_token_id=tokenizer.pad_token_id,
            **ids,
            **tower,
        ).to_dict(),
        vision_config=CLIPVisionConfig(image_size=RESOLUTION, patch_size=4, num_hidden_layers=3, **tower).to_dict(),
        projection_dim=768,
    )
    clip, head, quality = CLIPModel(config), ScoreHead(768), real_quality()
    ink, labels = load_scans()
    ink, labels = ink[:NUM_TRAIN_DIGITS], labels[:NUM_TRAIN_DIGITS]
    text = tokenize(tokenizer, CAPTIONS)
    parameters = [*clip.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    target = torch.arange(len(CAPTIONS))
    bar = tqdm(range(steps), desc="clip + aesthetic head")
    for _ in bar:
        batch_ink, colors = draw_batch(ink, labels, generator)
        images = paint(vary(batch_ink, generator), colors, generator)
        noise = torch.rand(len(images), 1, 1, 1, generator=generator) * 0.08
        seen = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        output = clip(input_ids=text, pixel_values=preprocess_clip(seen, RESOLUTION))
        contrast = F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_text, target)
        error = F.mse_loss(head(output.image_embeds), quality(images))
        optimizer.zero_grad()
        (contrast / 2 + 0.3 * error).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(contrastive=contrast.item() / 2, rmse=error.item() ** 0.5)

    directory = os.path.join(out, "tiny-aesthetic")
    clip_directory = os.path.join(directory, "clip")
    clip.save_pretrained(clip_directory)
    tokenizer.save_pretrained(clip_directory)
    CLIPImageProcessorPil(size={"shortest_edge": RESOLUTION}, crop_size=RESOLUTION).save_pretrained(clip_directory)
    save_file(head.state_dict(), os.path.join(directory, "aesthetic_head.safetensors"))


def train_vae(out, steps):
    """Train the autoencoder on reconstruction with a small KL term; its scaling factor is 1 / std of the latents."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    vae = AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )
    ink, _ = load_scans()
    ink = ink[:NUM_TRAIN_DIGITS]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)

    def batch(size):
        pick = torch.randint(len(ink), (size,), generator=generator)
        half = ink[pick]
        half[size // 2 :] = vary(half[size // 2 :], generator)
        return 2 * paint(half, torch.randint(len(COLORS), (size,), generator=generator), generator) - 1

    bar = tqdm(range(steps), desc="vae")
    for _ in bar:
        images = batch(64)
        posterior = vae.encode(images).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample(generator)).sample, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (error + 1e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=error.item(), kl=kl.item())

    with torch.no_grad():
        images = batch(512)
        std = vae.encode(images).latent_dist.sample(generator).std()
    vae.register_to_config(scaling_factor=round(1 / std.item(), 5))
    vae.save_pretrained(os.path.join(out, "tiny-sd", "vae"))


def train_unet(out, steps):
    """Train the U-Net on noise prediction; one caption in ten is empty, for classifier-free guidance."""
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(2)
    clip_directory = os.path.join(out, "tiny-aesthetic", "clip")
    tokenizer = CLIPTokenizer.from_pretrained(clip_directory)
    text_encoder = CLIPTextModel.from_pretrained(clip_directory)
    vae = AutoencoderKL.from_pretrained(os.path.join(out, "tiny-sd", "vae"))
    scheduler = make_scheduler()
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )

    ink, labels = load_scans()
    ink, labels = ink[:NUM_TRAIN_DIGITS], labels[:NUM_TRAIN_DIGITS]
    latents, captions = [], []
    with torch.no_grad():
        for color in range(len(COLORS)):
            for _ in range(4):
                images = paint(ink, torch.full((len(ink),), color), generator)
                latents.append(vae.encode(2 * images - 1).latent_dist.sample(generator) * vae.config.scaling_factor)
                captions.append(10 * color + labels)
        embeds = text_encoder(tokenize(tokenizer, [*CAPTIONS, ""]))[0]
    latents, captions = torch.cat(latents), torch.cat(captions)

    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    ema = EMAModel(unet.parameters(), decay=0.999)
    bar = tqdm(range(steps), desc="unet")
    for _ in bar:
        pick = torch.randint(len(latents), (64,), generator=generator)
        clean, caption = latents[pick], captions[pick]
        caption = torch.where(torch.rand(64, generator=generator) < 0.1, len(CAPTIONS), caption)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (64,), generator=generator)
        error = F.mse_loss(
            unet(scheduler.add_noise(clean, noise, timesteps), timesteps, embeds[caption]).sample, noise
        )
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
        bar.set_postfix(mse=error.item())
    ema.copy_to(unet.parameters())

    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(os.path.join(out, "tiny-sd"))


def to_tensor(images):
    """PIL images -> (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in images])).permute(0, 3, 1, 2).float() / 255


def read_digits(images):
    """Digits (B,) that a support vector machine, fitted on all real scans, recognizes in images (B, 3, 32, 32)."""
    ink, labels = load_scans()
    svm = SVC(gamma=2.0).fit(F.avg_pool2d(ink, 4).flatten(1).numpy(), labels.numpy())
    return torch.from_numpy(svm.predict(F.avg_pool2d(ink_of(images)[:, None], 4).flatten(1).numpy()))


def read_colors(images):
    """Indices (B,) into COLORS of the colors closest in direction to the ink-weighted means of images (B, 3, H, W)."""
    mean = F.normalize((images * ink_of(images)[:, None]).mean((2, 3)), dim=1)
    return (mean @ F.normalize(torch.tensor(list(COLORS.values())), dim=1).T).argmax(1)


@torch.no_grad()
def measure(out):
    """The figures of the model cards: autoencoder and CLIP on held-out scans, the pipeline on 500 images."""
    figures = {}
    aesthetic_directory = os.path.join(out, "tiny-aesthetic")
    pipeline = StableDiffusionPipeline.from_pretrained(os.path.join(out, "tiny-sd"))
    clip = CLIPModel.from_pretrained(os.path.join(aesthetic_directory, "clip"))
    reward, quality = load_reward("aesthetic", path=aesthetic_directory), real_quality()
    generator = torch.Generator().manual_seed(3)
    ink, labels = load_scans()
    ink, labels = ink[NUM_TRAIN_DIGITS:], labels[NUM_TRAIN_DIGITS:]
    colors = torch.randint(len(COLORS), (len(ink),), generator=generator)
    images = paint(ink, colors, generator)
    reconstructed = pipeline.vae.decode(pipeline.vae.encode(2 * images - 1).latent_dist.mean).sample
    figures["vae_mse"] = F.mse_loss(reconstructed, 2 * images - 1).item()
    text = clip.get_text_features(input_ids=tokenize(pipeline.tokenizer, CAPTIONS)).pooler_output
    embeds = clip.get_image_features(pixel_values=preprocess_clip(images, RESOLUTION)).pooler_output
    similarity = F.normalize(embeds, dim=1) @ F.normalize(text, dim=1).T
    figures["clip_top1"] = (similarity.argmax(1) == 10 * colors + labels).float().mean().item()
    scores = reward(images, [""] * len(images))
    figures["rank_correlation"] = spearmanr(scores, quality(images)).statistic
    figures["best_real"], figures["real_mean"] = scores.max().item(), scores.mean().item()

    drawn, captions = [], []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, 500, 50), desc="images"):
        prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(start, start + 50)]
        generator = torch.Generator().manual_seed(start)
        drawn += pipeline(prompts, num_inference_steps=50, guidance_scale=5.0, eta=1.0, generator=generator).images
        captions += [i % len(CAPTIONS) for i in range(start, start + 50)]
    images, captions = to_tensor(drawn), torch.tensor(captions)
    figures["digit_accuracy"] = (read_digits(images) == captions % 10).float().mean().item()
    figures["color_accuracy"] = (read_colors(images) == captions // 10).float().mean().item()
    scores = reward(images, [""] * len(images))
    figures["base_mean"], figures["base_std"] = scores.mean().item(), scores.std().item()
    figures["base_rank_correlation"] = spearmanr(scores, quality(images)).statistic
    for name, model in {"unet": pipeline.unet, "vae": pipeline.vae, "clip": clip}.items():
        figures[f"{name}_parameters"] = model.num_parameters()

    grid = np.concatenate(
        [np.concatenate([np.asarray(p) for p in drawn[row : row + 10]], axis=1) for row in range(0, 60, 10)]
    )
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.NEAREST).save(
        os.path.join(out, "tiny-sd", "samples.png")
    )
    return figures


SD_CARD = """---
library_name: diffusers
license: apache-2.0
tags: [text-to-image, stable-diffusion]
---
# tiny-sd: a Stable Diffusion that draws colored digits

![one image of each caption](samples.png)

A `StableDiffusionPipeline` with the classes and the folder layout of Stable Diffusion v1.4, small enough to be trained
and fine-tuned on a CPU: images of 32 x 32 pixels, latents of 4 x 8 x 8.

**Data.** The handwritten digits that scikit-learn carries (`load_digits`: 1,797 scans of 8 x 8 pixels from the UCI ML
repository, CC BY 4.0), enlarged bicubically, painted in six colors with a little jitter, captioned "a red seven". The
last 297 scans (after one seeded shuffle) are held out of all training.

**Recipe** (`make assets`, seeded). VAE: {vae_parameters:,} parameters, 2,500 steps of batch 64, squared error and 1e-4
of the KL term. Text encoder: the text tower of `../tiny-aesthetic/clip`, frozen. U-Net: {unet_parameters:,} parameters,
6,000 steps of batch 64 at a peak learning rate of 2e-3, noise prediction on Stable Diffusion's schedule, 10 % empty
captions, exponential moving average of .999. It does not know prompts outside the 60 captions.

**Figures**, 500 images at guidance 5, eta 1, 50 steps:

| | |
|---|---|
| digit recognized by a support vector machine fitted on the real scans | {digit_accuracy:.1%} |
| color recognized | {color_accuracy:.1%} |
| aesthetic reward of `../tiny-aesthetic`, mean and standard deviation | {base_mean:.2f}, {base_std:.2f} |
| VAE mean squared error on held-out images in [-1, 1] | {vae_mse:.5f} |
"""

AESTHETIC_CARD = """---
library_name: transformers
license: apache-2.0
tags: [image-feature-extraction, reward-model]
---
# tiny-aesthetic: a small CLIP with an aesthetic head

The layout of the LAION aesthetic predictor: `clip/` is a transformers `CLIPModel` ({clip_parameters:,} parameters, 32 x
32 pixels, projection to 768), `aesthetic_head.safetensors` the affine head with the keys `layers.{{0,2,4,6,7}}`.

**What it scores.** A quantity that can be computed from the image: half boldness (mean ink) and half left-right
symmetry (1 - sum|ink - mirrored ink| / 2 sum ink), each mapped so that the 1st and 99th percentile of the real images
become 0 and 1, on a scale of 1 to 10. Ink is the strongest channel of a pixel. See `Quality` in
`tools/make_tiny_assets.py`.

**Data and recipe** (`make assets`, seeded). The images of `../tiny-sd` with strokes made thinner, thicker, blurred,
shifted and more symmetric than the scans are; 3,000 steps of 60 images, one of each caption, contrastive loss plus .3 of
the head's squared error. Both towers and the head are trained together, because captions say nothing about strokes.

**Figures.**

| | |
|---|---|
| rank correlation of score and quantity, 297 held-out real images | {rank_correlation:.3f} |
| rank correlation of score and quantity, 500 images of tiny-sd | {base_rank_correlation:.3f} |
| mean score of held-out real images, and the best of them | {real_mean:.2f}, {best_real:.2f} |
| mean score of tiny-sd's images | {base_mean:.2f} |
| held-out images whose own caption is the nearest of all 60 | {clip_top1:.1%} |
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets", help="Folder for tiny-sd/ and tiny-aesthetic/. Default: assets.")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["clip", "vae", "unet", "cards"],
        choices=["clip", "vae", "unet", "cards"],
        help="What to make. The U-Net needs CLIP and VAE, the cards need all three, from this run or an earlier one.",
    )
    args = parser.parse_args()
    if "clip" in args.parts:
        train_clip(args.out, steps=3000)
    if "vae" in args.parts:
        train_vae(args.out, steps=2500)
    if "unet" in args.parts:
        train_unet(args.out, steps=6000)
    if "cards" in args.parts:
        figures = measure(args.out)
        for directory, card in {"tiny-sd": SD_CARD, "tiny-aesthetic": AESTHETIC_CARD}.items():
            with open(os.path.join(args.out, directory, "README.md"), "w", encoding="utf-8") as file:
                file.write(card.format(**figures))


if __name__ == "__main__":
    main()
