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
"""The model cards of tiny-wan and tiny-wan-rewards, with what was measured on them."""

import os

from .flow import LONG_LENGTH, LONG_SHARE, load_pipeline
from .measuring import measure_prompts, measure_real, measure_variety, write_samples
from .reader import load_reader


PIPELINE_CARD = """---
library_name: diffusers
license: apache-2.0
tags: [text-to-video, wan, flow-matching]
---
# tiny-wan: a Wan that draws moving digits

![one video of each digit in each color](samples.gif)

A `WanPipeline` with the classes and the folder layout of Wan 2.1, small enough to be trained and fine-tuned on a CPU: videos of
9 frames of 32 x 32 pixels, latents of 16 x 3 x 4 x 4. The first frame is a latent frame of its own, and so are the four after
it and the last four. The weights are stored in float16 and work in float32.

```python
pipeline = WanPipeline.from_pretrained("assets/tiny-wan")
video = pipeline("a red seven moving left", height=32, width=32, num_frames=9, num_inference_steps=20).frames[0]
```

**Prompts.** "a red seven moving left": ten digits, six colors (green, red, blue, yellow, purple, cyan), and "moving left",
"moving right", "moving up", "moving down", "standing still", or none of these. All 300 that name a motion are in
[`../videos.txt`](../videos.txt). Other words are unknown to it. With `num_frames=1` it draws an image.

The pipeline fills prompts with zeros up to `max_sequence_length`, 512 if the call does not say. With 16 it is faster and better.

**Data.** The handwritten digits that scikit-learn carries (`load_digits`: 1,797 scans of 8 x 8 pixels from the UCI ML
repository, CC BY 4.0), enlarged bicubically to 18 to 22 pixels, painted in six colors with a little jitter. A digit moves
6 to 12 pixels at constant speed, anywhere in the frame, or stands still. The last 297 scans (after one seeded shuffle) are held
out of all training.

**Recipe** (`make video-assets`, seeded). VAE: {vae_parameters:,} parameters, {vae_steps:,} steps of 8 videos or 32 images, squared error plus
.1 of the absolute error and 2e-4 of the KL term. Transformer: {transformer_parameters:,} parameters, 4 blocks of width 128, 12 patches for a
video, {flow_steps:,} steps of 64 videos (three quarters) or images, flow matching with logit-normal levels of mean .5 and
deviation 1.2, 10 % empty captions. Prompts were filled to 8 to 16 tokens, and to 512 in {long_share:.0%} of the steps; a fifth of the
captions do not name the motion. Text encoder: a UMT5 of {text_parameters:,} parameters and two layers, trained with the
transformer. All are moving averages of .999.

**Figures.** {videos} videos, guidance 5, {drawing} steps, read by [`../tiny-wan-rewards`](../tiny-wan-rewards), which reads real videos
of held-out scans as the last column says:

| | tiny-wan | real videos |
|---|---|---|
| digit as asked, share of the frames | {digits:.1%} | {real_digits:.1%} |
| the same with 512 tokens | {long_digits:.1%} | |
| color as asked, share of the frames | {colors:.1%} | {real_colors:.1%} |
| motion as asked, share of the videos | {motions:.1%} | {real_motions:.1%} |
| pixels from the first frame to the last if asked to move, mean and deviation | {moved:.1f}, {moved_deviation:.1f} | 9.0, 1.7 |
| the same if asked to stand still, mean | {moved_still:.2f} | 0 |
| root of the mean squared difference of two videos of a prompt, in [0, 1] | {difference:.3f} | {real_difference:.3f} |
| squared error of the VAE in [-1, 1] | | {vae_mse:.4f} |

![frames of ten of the videos](samples.png)

**What is poor.** The autoencoder blurs the strokes: from its reconstructions of the real videos the reader reads {decoded_digits:.1%}
of the digits. In some videos a digit changes its shape as it moves, and with 512 tokens more of them do.
"""

REWARDS_CARD = """---
license: apache-2.0
tags: [video-classification, reward-model]
---
# tiny-wan-rewards: what the videos of tiny-wan show

For videos of [`../tiny-wan`](../tiny-wan), on the same data (see there). `video_reader.py` reads digit and color of each frame
with a convolutional network ({reader_parameters:,} parameters, {reader_steps:,} steps of 64 frames), and the motion from a line through the
centers of the frames' ink. Its custom rewards are black boxes, for `--heldout_reward`:

| | |
|---|---|
| `DigitAccuracy` | the share of the frames that show the digit of the prompt |
| `DirectionAccuracy` | 1 if the digit moves as the prompt says, 0 if not; less than 2 pixels of 32 is standing still |

On real videos of scans that no training saw it reads {real_digits:.1%} of the digits, {real_colors:.1%} of the colors and
{real_motions:.1%} of the motions.
"""


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def write_cards(out, sizes):
    """Measure the models, and write the samples and README.md of both folders.

    Args:
        sizes: of `make_video_assets.py`: the steps of each stage, and how many videos are measured.
    """
    pipeline = load_pipeline(out)
    models = {"vae": pipeline.vae, "transformer": pipeline.transformer, "text": pipeline.text_encoder}
    models["reader"] = load_reader(out)[0]
    facts = {f"{name}_parameters": count_parameters(model) for name, model in models.items()}
    facts |= {f"{stage}_steps": count for stage, count in sizes.items()} | sizes | {"long_share": LONG_SHARE}
    facts |= measure_real(pipeline, out, sizes["videos"])
    steps = {"num_inference_steps": sizes["drawing"]}
    facts |= measure_prompts(pipeline, out, sizes["videos"], **steps)
    facts |= measure_variety(pipeline, sizes["seeds"], **steps)
    long = measure_prompts(pipeline, out, sizes["videos"], max_sequence_length=LONG_LENGTH, **steps)
    facts["long_digits"] = long["digits"]
    write_samples(pipeline, out, **steps)
    for folder, card in {"tiny-wan": PIPELINE_CARD, "tiny-wan-rewards": REWARDS_CARD}.items():
        with open(os.path.join(out, folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(card.format(**facts))
