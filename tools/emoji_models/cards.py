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
"""The model cards of tiny-emoji and tiny-emoji-rewards, with what was measured on them."""

import os

from transformers import CLIPModel

from .classifier import load_classifier
from .clip import SCORES
from .data import STYLE_WORDS
from .flow import LONG_PADDING
from .measuring import load_pipeline, measure_plain_prompts, measure_prompts, measure_real, measure_samples


PIPELINE_CARD = """---
library_name: diffusers
license: apache-2.0
tags: [text-to-image, stable-diffusion]
---
# tiny-emoji: a Stable Diffusion that draws emoji

![two images of each concept, prompts without style and background](samples.png)

A `StableDiffusionPipeline` with the classes and the folder layout of Stable Diffusion v1.4, small enough to be trained and
fine-tuned on a CPU: images of 48 x 48 pixels, latents of 4 x 12 x 12. The weights are stored in float16 and work in float32.

```python
pipeline = StableDiffusionPipeline.from_pretrained("assets/tiny-emoji", dtype=torch.float32, safety_checker=None)
image = pipeline("a 3d fox on a blue background", num_inference_steps=20, guidance_scale=4.5, eta=1.0).images[0]
```

**Prompts.** "a fox", "a cartoon fox", "a 3d fox on a blue background". {num_concepts} concepts
([`../emoji/concepts.json`](../emoji/concepts.json)), two styles, six backgrounds (white, blue, green, yellow, pink, purple).
It knows no other words.

**License.** Apache-2.0 for the model. The images that it learned from are Fluent Emoji (copyright (c) Microsoft Corporation, MIT)
and Noto Emoji (copyright 2013 Google LLC, Apache-2.0); the notices are in [`../emoji/README.md`](../emoji/README.md).

**Data.** The emoji of [`../emoji`](../emoji) in three styles, at random places, sizes and angles, half of them mirrored, on a
white background (40 %) or one of five colors.

**Recipe** (`make emoji-assets`, seeded). VAE: {vae_parameters:,} parameters, {vae_steps:,} steps of 8 images, squared error plus
.1 of the absolute error and 2e-4 of the KL term, then {decoder_steps:,} steps of the decoder alone. Text encoder: the text tower
of `../tiny-emoji-rewards/clip`, frozen. U-Net: {unet_parameters:,} parameters, {unet_steps:,} steps of 32 images, noise
prediction on Stable Diffusion's schedule with min-SNR weights of 5, 10 % empty captions. Captions name the style of half of
the images and the background of two thirds. VAE and U-Net are moving averages of .999.

**Figures.** {images} images, guidance 4.5, eta 1, 20 steps, read by the classifier of `../tiny-emoji-rewards`:

| | |
|---|---|
| concept as asked | {concept:.1%} |
| style as asked, where it is | {style:.1%} |
| background as asked, where it is | {background:.1%} |
| concept as asked by prompts such as "a fox", two seeds of each | {plain_concept:.1%} |
| share of 3D images of these prompts | {share_3d:.0%} |
| fewest distinguishable images of a prompt such as "a fox on a white background", over {seeds} seeds | {least_variety} |
| squared error of the VAE in [-1, 1], on new placements of the emoji | {vae_mse:.4f} |

Two images are distinguishable if the root of their mean squared difference in [0, 1] is above .1. The classifier reads
{classifier_concept:.1%} of the concepts, {classifier_style:.1%} of the styles and {classifier_background:.1%} of the backgrounds of the
emoji themselves, at shifts that its training did not have.

**What is poor.** The finest textures are smudged, by the autoencoder (the veins of the butterfly, the spots of the giraffe, the
teeth of the robot) and more so in drawn images. Eyes and whiskers may be missing or uneven, thin parts (the flamingo's leg, the
helicopter's rotor) may be broken, and flat areas are slightly mottled. Sometimes an image mixes two styles. Without a named
style about five of six images are cartoons, though two thirds of the training images were.
"""

REWARDS_CARD = """---
library_name: transformers
license: apache-2.0
tags: [image-feature-extraction, reward-model]
---
# tiny-emoji-rewards: a small CLIP, an aesthetic head and a classifier

For images of [`../tiny-emoji`](../tiny-emoji). The data are the same emoji, under the licenses in
[`../emoji/README.md`](../emoji/README.md): Fluent Emoji, copyright (c) Microsoft Corporation, MIT; Noto Emoji, copyright 2013
Google LLC, Apache-2.0.

**CLIP and aesthetic head.** The layout of the LAION aesthetic predictor: `clip/` is a transformers `CLIPModel`
({clip_parameters:,} parameters, 48 x 48 pixels, projection to 768), `aesthetic_head.safetensors` the affine head with the keys
`layers.{{0,2,4,6,7}}`. The head scores glossy 3D emoji {target_3d:g} and flat cartoons {target_cartoon:g}, less where the image
is blurred or noisy. Recipe: {clip_steps:,} steps of 96 images (24 concepts, four images each), contrastive loss plus .1 of the
head's squared error.

```bash
python train_rlr_sd.py --pretrained_model_name_or_path assets/tiny-emoji --prompts assets/emoji.txt \\
  --reward aesthetic --reward_path aesthetic=assets/tiny-emoji-rewards \\
  --heldout_reward assets/tiny-emoji-rewards/emoji_classifier.py:ConceptAccuracy \\
  --feature_model assets/tiny-emoji-rewards/clip
```

**Classifier.** `emoji_classifier.py` reads concept, style and background with a convolutional network
({classifier_parameters:,} parameters, {classifier_steps:,} steps of 64 images) trained on the same
emoji without captions. Its custom reward `ConceptAccuracy` is 1 if an image shows the concept of its prompt and 0 if not: a
black box, or a held-out reward.

| | |
|---|---|
| new placements of the emoji whose concept is the nearest of all {num_concepts} captions such as "a fox" | {clip_concept:.1%} |
| aesthetic score of the 3D emoji, mean and standard deviation | {real_score_3d:.2f}, {real_deviation_3d:.2f} |
| aesthetic score of the cartoons | {real_score_cartoon:.2f}, {real_deviation_cartoon:.2f} |
| aesthetic score of tiny-emoji's images of prompts such as "a fox" | {plain_score:.2f}, {plain_deviation:.2f} |
| concepts, styles and backgrounds that the classifier reads from emoji at shifts that its training did not have | {classifier_concept:.1%}, {classifier_style:.1%}, {classifier_background:.1%} |
"""


FLOW_CARD = """---
library_name: diffusers
license: apache-2.0
tags: [text-to-image, stable-diffusion-3, flow-matching]
---
# tiny-emoji-sd3: a Stable Diffusion 3 that draws emoji

![an image of each concept, prompts without style and background](samples.png)

A `StableDiffusion3Pipeline` without T5, with the classes and the folder layout of Stable Diffusion 3, small enough to be
trained and fine-tuned on a CPU: images of 48 x 48 pixels, latents of 4 x 12 x 12, 36 patches. The weights are stored in float16
and work in float32.

```python
pipeline = StableDiffusion3Pipeline.from_pretrained(
    "assets/tiny-emoji-sd3", dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
)
image = pipeline(
    "a 3d fox on a blue background", num_inference_steps=20, guidance_scale=4.5, max_sequence_length=1
).images[0]
```

Prompts, data and license are those of [`../tiny-emoji`](../tiny-emoji), and so are the weights of the VAE. Where T5 is missing,
the pipeline appends `max_sequence_length` zeros to a prompt, 256 if the call does not say. The model was trained with 1 to 8,
and with 256 in a tenth of the steps: it draws with any number, and with few it is about five times as fast.

**Recipe** (`make emoji-assets`, seeded). First text encoder: the text tower of `../tiny-emoji-rewards/clip`, frozen. Second text
encoder: {second_parameters:,} parameters, one layer, trained with the transformer. Transformer: {flow_parameters:,} parameters, 4
blocks of width 96, {flow_steps:,} steps of 48 images, flow matching with logit-normal levels, 10 % empty captions. Both are
moving averages of .999.

**Figures.** {images} images, guidance 4.5, 20 steps without noise, read by the classifier of `../tiny-emoji-rewards`:

| | |
|---|---|
| concept as asked | {concept:.1%} |
| style as asked, where it is | {style:.1%} |
| background as asked, where it is | {background:.1%} |
| concept as asked by prompts such as "a fox", two seeds of each | {plain_concept:.1%} |
| the same with 256 zeros | {long_concept:.1%} |
| share of 3D images of these prompts | {share_3d:.0%} |
| their aesthetic score, mean and standard deviation | {plain_score:.2f}, {plain_deviation:.2f} |
| fewest distinguishable images of a prompt such as "a fox on a white background", over {seeds} seeds | {least_variety} |

Two images are distinguishable if the root of their mean squared difference in [0, 1] is above .1.

**What is poor.** What `../tiny-emoji` smudges is smudged here too, and more: faces are blurred, and thin parts are often missing.
"""


def write_flow_card(emoji, out, sizes):
    """Measure the Stable Diffusion 3, and write README.md of its folder; `sizes` as for `write_cards`."""
    name = "tiny-emoji-sd3"
    pipeline = load_pipeline(out, name)
    models = {"flow": pipeline.transformer, "second": pipeline.text_encoder_2}
    facts = {f"{part}_parameters": sum(p.numel() for p in model.parameters()) for part, model in models.items()}
    facts |= sizes | {"flow_steps": sizes["flow"]}
    facts |= measure_prompts(pipeline, emoji, out, sizes["images"])
    facts |= measure_samples(pipeline, emoji, out, sizes["seeds"], name)
    facts["long_concept"] = measure_plain_prompts(pipeline, emoji, out, max_sequence_length=LONG_PADDING)
    with open(os.path.join(out, name, "README.md"), "w", encoding="utf-8") as file:
        file.write(FLOW_CARD.format(**facts))


def write_cards(emoji, out, work_dir, sizes):
    """Measure the models, and write README.md of both folders.

    Args:
        sizes: of `make_emoji_assets.py`: the steps of each stage, and how many images are measured.
    """
    pipeline, classifier = load_pipeline(out), load_classifier(out)
    clip = CLIPModel.from_pretrained(os.path.join(out, "tiny-emoji-rewards", "clip"))
    models = {"vae": pipeline.vae, "unet": pipeline.unet, "clip": clip, "classifier": classifier}
    facts = {f"{name}_parameters": sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    facts |= sizes | {f"{stage}_steps": count for stage, count in sizes.items()}
    facts |= {f"target_{style}": score for style, score in zip(STYLE_WORDS, SCORES.tolist())}
    facts |= {"num_concepts": len(emoji.concepts)}
    facts |= measure_real(pipeline, emoji, out, work_dir, sizes["images"])
    facts |= measure_prompts(pipeline, emoji, out, sizes["images"])
    facts |= measure_samples(pipeline, emoji, out, sizes["seeds"])
    for folder, card in {"tiny-emoji": PIPELINE_CARD, "tiny-emoji-rewards": REWARDS_CARD}.items():
        with open(os.path.join(out, folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(card.format(**facts))
