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
from tiny_stable_diffusion import tokenize
from tqdm import trange
from transformers import CLIPModel

from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from .classifier import HELD_OUT, accuracies, accuracy, read
from .data import BACKGROUNDS, RESOLUTION, STYLE_WORDS, caption


SETTINGS = {
    "tiny-emoji": {"num_inference_steps": 20, "guidance_scale": 4.5, "eta": 1.0},
    "tiny-emoji-sd3": {"num_inference_steps": 20, "guidance_scale": 4.5, "max_sequence_length": 1},
}
DISTINGUISHABLE = 0.1  # root of the mean squared difference of two images in [0, 1]


def load_pipeline(out, name="tiny-emoji"):
    if name == "tiny-emoji":
        pipeline_class, missing = StableDiffusionPipeline, {"safety_checker": None}
    else:
        pipeline_class, missing = StableDiffusion3Pipeline, {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = pipeline_class.from_pretrained(os.path.join(out, name), dtype=torch.float32, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seed, size=50, **settings):
    """One image for each prompt: (B, 3, 48, 48) in [0, 1] on the CPU, with the settings of `SETTINGS` and others."""
    images, name = [], "tiny-emoji" if isinstance(pipeline, StableDiffusionPipeline) else "tiny-emoji-sd3"
    settings = {**SETTINGS[name], **settings}
    for start in trange(0, len(prompts), size, desc="images"):
        generator = torch.Generator().manual_seed(seed + start)
        batch = pipeline(prompts[start : start + size], generator=generator, output_type="pt", **settings)
        images.append(batch.images)
    return torch.cat(images)


def sheet(rows, path, zoom=2):
    """Write rows of images, a list of (N, 3, H, W) in [0, 1], as one image."""
    pixels = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    image = Image.fromarray((255 * pixels.permute(1, 2, 0)).round().clamp(0, 255).byte().numpy())
    image.resize((zoom * image.width, zoom * image.height), Image.NEAREST).save(path)


def load_aesthetic(out):
    return load_reward("aesthetic", path=os.path.join(out, "tiny-emoji-rewards"))


@torch.no_grad()
def measure_real(pipeline, emoji, out, work_dir, num_images):
    """Autoencoder, classifier, CLIP and head on new placements of the emoji.

    Writes reconstructions below their originals to vae.png in `work_dir`.
    """
    figures, generator = {}, torch.Generator().manual_seed(7)
    batch = emoji.batch(4 * num_images, generator)
    some = batch.images[:num_images]
    decoded = pipeline.vae.decode(pipeline.vae.encode(2 * some - 1).latent_dist.mean).sample
    figures["vae_mse"] = F.mse_loss(decoded, 2 * some - 1).item()
    both = zip(some.split(8)[:4], (decoded / 2 + 0.5).clamp(0, 1).split(8))
    sheet([images for pair in both for images in pair], os.path.join(work_dir, "vae.png"), zoom=4)
    clip = CLIPModel.from_pretrained(os.path.join(out, "tiny-emoji-rewards", "clip"))
    text = tokenize(pipeline.tokenizer, [caption(concept) for concept in emoji.concepts])
    text = F.normalize(clip.get_text_features(input_ids=text).pooler_output, dim=1)
    pixels = preprocess_clip(batch.images, RESOLUTION)
    embeds = torch.cat([clip.get_image_features(pixel_values=p).pooler_output for p in pixels.split(200)])
    figures["clip_concept"] = accuracy((embeds @ text.T).argmax(1), batch.concepts)
    scores = load_aesthetic(out)(batch.images, [""] * len(batch.images))
    for index, style in enumerate(STYLE_WORDS):
        figures[f"real_score_{style}"] = scores[batch.styles == index].mean().item()
        figures[f"real_deviation_{style}"] = scores[batch.styles == index].std().item()
    shifted = emoji.batch(4 * num_images, generator, **HELD_OUT)
    names = ("classifier_concept", "classifier_style", "classifier_background")
    return figures | dict(zip(names, accuracies(shifted, out)))


def measure_prompts(pipeline, emoji, out, num_images):
    """Whether the pipeline draws the concept, the style and the background that prompts of all kinds ask for."""
    generator = torch.Generator().manual_seed(8)
    concepts = torch.arange(num_images) % len(emoji.concepts)
    styles = torch.randint(-1, len(STYLE_WORDS), (num_images,), generator=generator)
    backgrounds = torch.randint(-1, len(BACKGROUNDS), (num_images,), generator=generator)
    style_words, colors = [*STYLE_WORDS, None], [*BACKGROUNDS, None]  # index -1 names none
    prompts = [
        caption(emoji.concepts[c], style_words[s], colors[b])
        for c, s, b in zip(concepts.tolist(), styles.tolist(), backgrounds.tolist())
    ]
    concept, style, background = read(draw(pipeline, prompts, seed=0), out)
    wrong = (concept != concepts).nonzero().flatten().tolist()
    print("drawn as another:", ", ".join(f"{prompts[i]} ({emoji.concepts[concept[i]]})" for i in wrong) or "none")
    return {
        "concept": accuracy(concept, concepts),
        "style": accuracy(style, styles, styles >= 0),
        "background": accuracy(background, backgrounds, backgrounds >= 0),
    }


def measure_samples(pipeline, emoji, out, seeds, name="tiny-emoji"):
    """What prompts such as "a fox" give, with images in samples.png of the pipeline, and how much seeds differ."""
    prompts = [caption(concept) for concept in emoji.concepts]
    images = draw(pipeline, [prompt for prompt in prompts for _ in range(2)], seed=1000)
    # One image of each instead of two, and not enlarged: the folder of the second pipeline is kept below 6 MB.
    rows, zoom = (images, 2) if name == "tiny-emoji" else (images[::2], 1)
    sheet(rows.split(16), os.path.join(out, name, "samples.png"), zoom)
    concept, style, _ = read(images, out)
    scores = load_aesthetic(out)(images, [""] * len(images))
    # On one background, whose color would make any two images differ.
    on_white = [f"{prompt} on a white background" for prompt in prompts]
    by_prompt = draw(pipeline, [prompt for prompt in on_white for _ in range(seeds)], seed=2000).split(seeds)
    return {
        "plain_concept": accuracy(concept, torch.arange(len(prompts)).repeat_interleave(2)),
        "share_3d": (style == STYLE_WORDS.index("3d")).float().mean().item(),
        "plain_score": scores.mean().item(),
        "plain_deviation": scores.std().item(),
        "least_variety": min(count_distinguishable(images) for images in by_prompt),
    }


def measure_plain_prompts(pipeline, emoji, out, **settings):
    """The share of the concepts that prompts such as "a fox" give, two seeds of each, with other settings."""
    prompts = [caption(concept) for concept in emoji.concepts for _ in range(2)]
    concept, _, _ = read(draw(pipeline, prompts, seed=1000, **settings), out)
    return accuracy(concept, torch.arange(len(emoji.concepts)).repeat_interleave(2))


def count_distinguishable(images):
    """How many of the images (N, 3, H, W) differ from each other, counted greedily."""
    kept = []
    for image in images:
        if all((image - other).square().mean().sqrt() > DISTINGUISHABLE for other in kept):
            kept.append(image)
    return len(kept)
