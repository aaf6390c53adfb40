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
"""How good the video models are: the figures of their cards, by a network trained on real videos."""

import os

import torch
import torch.nn.functional as F
from emoji_models.measuring import sheet
from PIL import Image
from tqdm import trange

from .data import COLORS, DIGITS, MOTIONS, NUM_FRAMES, RESOLUTION, DigitVideos, caption
from .reader import accuracies, load_reader, read
from .vae import encode


SETTINGS = {"num_inference_steps": 20, "guidance_scale": 5.0, "max_sequence_length": 16}


def draw(pipeline, prompts, seed, size=50, **settings):
    """One video for each prompt: (B, F, 3, 32, 32) in [0, 1], with the settings of `SETTINGS` and others."""
    settings = {"height": RESOLUTION, "width": RESOLUTION, "num_frames": NUM_FRAMES, **SETTINGS, **settings}
    videos = []
    for start in trange(0, len(prompts), size, desc="videos"):
        generator = torch.Generator().manual_seed(seed + start)
        batch = pipeline(prompts[start : start + size], generator=generator, output_type="pt", **settings)
        videos.append(batch.frames)
    return torch.cat(videos)


def spread_prompts(count):
    """`count` prompts that go round all digits, colors and motions: (texts, digits, colors, motions), of indices (B,)."""
    order = torch.arange(count)
    digits = order % len(DIGITS)
    colors, motions = (order + order // len(DIGITS)) % len(COLORS), (order + order // len(DIGITS)) % len(MOTIONS)
    texts = [caption(*indices) for indices in zip(digits.tolist(), colors.tolist(), motions.tolist())]
    return texts, digits, colors, motions


def share(found, true):
    return (found == true).float().mean().item()


@torch.no_grad()
def measure_real(pipeline, out, count):
    """Autoencoder and reader on `count` videos of scans that are held out of all training."""
    batch = DigitVideos(held_out=True).batch(count, torch.Generator().manual_seed(7))
    decoded = pipeline.vae.decode(encode(pipeline.vae, batch.videos).mean).sample.transpose(1, 2)
    figures = {"vae_mse": F.mse_loss(decoded, 2 * batch.videos - 1).item()}
    figures["decoded_digits"] = share(read(decoded / 2 + 0.5, out)[0], batch.digits[:, None])
    return figures | dict(zip(("real_digits", "real_colors", "real_motions"), accuracies(batch, out)))


def measure_prompts(pipeline, out, count, **settings):
    """Whether the pipeline draws the digit, the color and the motion that prompts ask for."""
    texts, digits, colors, motions = spread_prompts(count)
    videos = draw(pipeline, texts, seed=0, **settings)
    found_digits, found_colors, found_motions = read(videos, out)
    far = load_reader(out)[1]["displacement"](videos).norm(dim=1)
    still = motions == list(MOTIONS).index("standing still")
    return {
        "digits": share(found_digits, digits[:, None]),
        "colors": share(found_colors, colors[:, None]),
        "motions": share(found_motions, motions),
        "moved": far[~still].mean().item(),
        "moved_deviation": far[~still].std().item(),
        "moved_still": far[still].mean().item(),
    }


def difference(videos):
    """How much videos (N, F, 3, H, W) differ: the root of the mean squared difference of two of them, on average."""
    flat = videos.flatten(1)
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return (distances.sum() / (len(flat) * (len(flat) - 1))).item()


def measure_variety(pipeline, seeds, **settings):
    """`difference` of the videos of a prompt over `seeds` seeds, and of as many real ones: means of a prompt a digit."""
    prompts, *indices = spread_prompts(len(DIGITS))
    drawn = draw(pipeline, [prompt for prompt in prompts for _ in range(seeds)], seed=2000, **settings).split(seeds)
    real, generator = DigitVideos(held_out=True), torch.Generator().manual_seed(9)
    differences = []
    for videos, digit, color, motion in zip(drawn, *indices):
        scans = (real.labels == digit).nonzero()[:seeds, 0]
        like = real.videos(scans, color.expand(len(scans)), motion.expand(len(scans)), generator)
        differences.append([difference(videos), difference(like)])
    return dict(zip(("difference", "real_difference"), torch.tensor(differences).mean(0).tolist()))


def write_samples(pipeline, out, **settings):
    """One video of each digit in each color in samples.gif; in samples.png, some of them from left to right."""
    videos = draw(pipeline, spread_prompts(len(DIGITS) * len(COLORS))[0], seed=1000, **settings)
    folder = os.path.join(out, "tiny-wan")
    sheet(videos[: len(DIGITS)], os.path.join(folder, "samples.png"))
    rows = videos.unflatten(0, (len(COLORS), len(DIGITS)))  # (rows, columns, F, 3, H, W)
    frames = rows.permute(2, 0, 4, 1, 5, 3).flatten(1, 2).flatten(2, 3)  # (F, rows x H, columns x W, 3)
    images = [Image.fromarray(frame.numpy()) for frame in (255 * frames).round().byte()]
    images = [image.quantize(64, dither=Image.Dither.NONE) for image in images]  # a third of the size
    images[0].save(os.path.join(folder, "samples.gif"), save_all=True, append_images=images[1:], duration=120, loop=0)
