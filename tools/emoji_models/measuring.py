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
"""How good the emoji models are: the figures of their cards, by a classifier trained on real images."""

import os

import torch
import torch.nn.functional as F
from PIL import Image
from reward_models import load_reward
from reward_models.clip import preprocess_clip
from tqdm import trange
from transformers import CLIPModel
from word_tokenizer import tokenize

from diffusers import StableDiffusionPipeline

from .classifier import HELD_OUT, accuracies, read
from .data import BACKGROUNDS, RESOLUTION, STYLE_WORDS, caption


SETTINGS = {"num_inference_steps": 20, "guidance_scale": 4.5, "eta": 1.0}
DISTINGUISHABLE = 0.1  # root of the mean squared difference of two images in [0, 1]


def load_pipeline(out):
    pipeline = StableDiffusionPipeline.from_pretrained(
        os.path.join(out, "tiny-emoji"), dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seed, size=50):
    """One image for each prompt: (B, 3, 48, 48) in [0, 1] on the CPU."""
    images = []
    for start in trange(0, len(prompts), size, desc="images"):
        generator = torch.Generator().manual_seed(seed + start)
        batch = pipeline(prompts[start : start + size], generator=generator, output_type="pt", **SETTINGS)
        images.append(batch.images)
    return torch.cat(images)


def sheet(rows, path, zoom=2):
    """Write rows of images, a list of (N, 3, H, W) in [0, 1], as one picture."""
    pixels = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    image = Image.fromarray((255 * pixels.permute(1, 2, 0)).round().clamp(0, 255).byte().numpy())
    image.resize((zoom * image.width, zoom * image.height), Image.NEAREST).save(path)


def accuracy(read_indices, indices, where=slice(None)):
    return (read_indices[where] == indices[where]).float().mean().item()


@torch.no_grad()
def measure_real(emoji, out, work_dir, num_images):
    """Autoencoder, classifier, CLIP and head on real images that no training has seen.

    Writes the reconstructions of the first 32 below their originals to vae.png in `work_dir`.
    """
    figures, generator = {}, torch.Generator().manual_seed(7)
    batch = emoji.batch(4 * num_images, generator)
    vae = load_pipeline(out).vae
    some = batch.images[:num_images]
    decoded = vae.decode(vae.encode(2 * some - 1).latent_dist.mean).sample
    figures["vae_mse"] = F.mse_loss(decoded, 2 * some - 1).item()
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    sheet([x for i in range(0, 32, 8) for x in (some[i : i + 8], decoded[i : i + 8])], f"{work_dir}/vae.png", zoom=4)
    clip = CLIPModel.from_pretrained(os.path.join(out, "tiny-emoji-rewards", "clip"), dtype=torch.float32)
    text = tokenize(load_pipeline(out).tokenizer, [caption(concept) for concept in emoji.concepts])
    text = F.normalize(clip.get_text_features(input_ids=text).pooler_output, dim=1)
    pixels = preprocess_clip(batch.images, RESOLUTION)
    embeds = torch.cat([clip.get_image_features(pixel_values=p).pooler_output for p in pixels.split(200)])
    figures["clip_concept"] = accuracy((embeds @ text.T).argmax(1), batch.concepts)
    scores = load_reward("aesthetic", path=os.path.join(out, "tiny-emoji-rewards"))(
        batch.images, [""] * len(batch.images)
    )
    for index, style in enumerate(STYLE_WORDS):
        figures[f"real_score_{style}"] = scores[batch.styles == index].mean().item()
        figures[f"real_deviation_{style}"] = scores[batch.styles == index].std().item()
    shifted = emoji.batch(4 * num_images, generator, **HELD_OUT)
    names = ("classifier_concept", "classifier_style", "classifier_background")
    return figures | dict(zip(names, accuracies(shifted, out)))


def measure_pipeline(emoji, out, num_images, seeds):
    """Whether the pipeline draws what prompts ask for, and how much its images of one prompt differ.

    Writes two images of each concept to samples.png of the pipeline.
    """
    pipeline, generator = load_pipeline(out), torch.Generator().manual_seed(8)
    concepts = torch.arange(num_images) % len(emoji.concepts)
    styles = torch.randint(-1, len(STYLE_WORDS), (num_images,), generator=generator)
    backgrounds = torch.randint(-1, len(BACKGROUNDS), (num_images,), generator=generator)
    style_words, colors = [*STYLE_WORDS, None], [*BACKGROUNDS, None]  # index -1 names none
    prompts = [
        caption(emoji.concepts[c], style_words[s], colors[b])
        for c, s, b in zip(concepts.tolist(), styles.tolist(), backgrounds.tolist())
    ]
    images = draw(pipeline, prompts, seed=0)
    concept, style, background = read(images, out)
    figures = {
        "concept": accuracy(concept, concepts),
        "style": accuracy(style, styles, styles >= 0),
        "background": accuracy(background, backgrounds, backgrounds >= 0),
        "share_3d": (style[styles < 0] == STYLE_WORDS.index("3d")).float().mean().item(),
    }
    wrong = (concept != concepts).nonzero().flatten().tolist()
    print("drawn as another:", ", ".join(f"{prompts[i]} ({emoji.concepts[concept[i]]})" for i in wrong))
    plain = [caption(concept) for concept in emoji.concepts]
    drawn = draw(pipeline, [prompt for prompt in plain for _ in range(seeds)], seed=1000).unflatten(0, (-1, seeds))
    figures["least_variety"] = min(count_distinguishable(images) for images in drawn)
    figures["plain_concept"] = accuracy(
        read(drawn.flatten(0, 1), out)[0], torch.arange(len(plain)).repeat_interleave(seeds)
    )
    aesthetic = load_reward("aesthetic", path=os.path.join(out, "tiny-emoji-rewards"))
    figures["plain_score"] = aesthetic(drawn.flatten(0, 1), [""] * len(drawn) * seeds).mean().item()
    sheet(
        [torch.cat([images[:2] for images in drawn[i : i + 8]]) for i in range(0, 64, 8)],
        os.path.join(out, "tiny-emoji", "samples.png"),
    )
    return figures


def count_distinguishable(images):
    """How many of the images (N, 3, H, W) differ from each other, counted greedily."""
    kept = []
    for image in images:
        if all((image - other).square().mean().sqrt() > DISTINGUISHABLE for other in kept):
            kept.append(image)
    return len(kept)
