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
"""Captioned images of emoji: a concept in a style on a background, varied in place, size and tilt."""

import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


RESOLUTION = 48
CELL = 128  # pixels of an emoji in a sheet
COLUMNS = 8  # emoji in a row of a sheet
STYLES = {"fluent3d": "3d", "noto": "cartoon", "noto_v1": "cartoon"}  # sheet -> the word of captions
STYLE_WORDS = ["cartoon", "3d"]
BACKGROUNDS = {
    "white": (1.00, 1.00, 1.00),
    "blue": (0.62, 0.80, 1.00),
    "green": (0.68, 0.92, 0.68),
    "yellow": (1.00, 0.92, 0.58),
    "pink": (1.00, 0.74, 0.84),
    "purple": (0.80, 0.72, 1.00),
}
WHITE_SHARE = 0.4  # of the images; the other backgrounds share the rest


@dataclass
class Batch:
    """Images (B, 3, 48, 48) in [0, 1] with the indices (B,) of their concepts, style words and backgrounds."""

    images: torch.Tensor
    concepts: torch.Tensor
    styles: torch.Tensor
    backgrounds: torch.Tensor


class EmojiImages:
    """Endless images of the emoji in `folder` (assets/emoji): one draw of `batch` is one augmented batch."""

    def __init__(self, folder):
        with open(os.path.join(folder, "concepts.json"), encoding="utf-8") as file:
            available = json.load(file)
        self.concepts = list(available)
        sheets = [read_sheet(os.path.join(folder, f"{style}.webp"), len(self.concepts)) for style in STYLES]
        self.sprites = torch.stack(sheets)  # (styles, concepts, 4, 128, 128), color multiplied by alpha
        self.available = torch.tensor([[style in available[word]["styles"] for word in available] for style in STYLES])

    def batch(self, size, generator, concepts=None, shift=(0.0, 3.0), scale=(0.74, 0.94), tilt=8.0):
        """`size` images, of random concepts or of `concepts` (size,).

        `shift` is the least and the largest in pixels, `tilt` the largest in degrees, both to either side; `scale` is the
        size of the emoji's cell against the image.
        """
        if concepts is None:
            concepts = torch.randint(len(self.concepts), (size,), generator=generator)
        sheets = torch.multinomial(self.available.float()[:, concepts].T, 1, generator=generator).squeeze(1)
        colored = torch.randint(1, len(BACKGROUNDS), (size,), generator=generator)
        white = torch.rand(size, generator=generator) < WHITE_SHARE
        backgrounds = torch.where(white, 0, colored)
        theta = random_placement(size, generator, shift, scale, tilt)
        sprites = place(self.sprites[sheets, concepts], theta)
        color = torch.tensor(list(BACKGROUNDS.values()))[backgrounds]
        color = color + 0.02 * torch.randn(color.shape, generator=generator)
        images = sprites[:, :3] + (1 - sprites[:, 3:]) * color.clamp(0, 1)[:, :, None, None]
        words = torch.tensor([STYLE_WORDS.index(word) for word in STYLES.values()])
        return Batch(images.clamp(0, 1), concepts, words[sheets], backgrounds)


def degrade(images, generator):
    """Images (B, 3, H, W), half of them blurred or noisy as an early sample is, in [0, 1]; and by how much (B,), 0 to 1."""
    size = len(images)
    amount = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < 0.5)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    blur, noise = (torch.rand(size, generator=generator) < 0.5).float() * amount, 0.15 * amount
    images = images + blur[:, None, None, None] * (blurred - images)
    images = images + noise[:, None, None, None] * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1), amount


def read_sheet(path, count):
    """A sheet of `count` emoji in rows of 8 -> (count, 4, 128, 128) in [0, 1], color multiplied by alpha."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGBA"))).float() / 255
    cells = pixels.unflatten(0, (-1, CELL)).unflatten(2, (COLUMNS, CELL)).transpose(1, 2).flatten(0, 1)
    sprites = cells[:count].permute(0, 3, 1, 2).contiguous()
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)


def random_placement(size, generator, shift, scale, tilt):
    """Affine maps (size, 2, 3) from the image to the emoji, as `affine_grid` takes them; half are mirrored."""

    def uniform(low, high):
        return torch.empty(size).uniform_(low, high, generator=generator)

    angle, zoom = uniform(-tilt, tilt) * math.pi / 180, uniform(*scale)
    mirror = 1.0 - 2.0 * (torch.rand(size, generator=generator) < 0.5).float()
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    pixel, (least, most) = 2 / RESOLUTION / zoom, shift

    def moved():
        distance = uniform(least - most, most - least)
        return (distance + least * distance.sign()) * pixel

    return torch.stack(
        [
            torch.stack([mirror * cos, mirror * -sin, moved()], 1),
            torch.stack([sin, cos, moved()], 1),
        ],
        1,
    )


def place(sprites, theta):
    """Sprites (B, 4, 128, 128) seen through `theta`: (B, 4, 48, 48), sampled at twice the resolution and averaged."""
    grid = F.affine_grid(theta, (len(sprites), 4, 2 * RESOLUTION, 2 * RESOLUTION), align_corners=False)
    return F.avg_pool2d(F.grid_sample(sprites, grid, align_corners=False), 2)


def caption(concept, style=None, background=None):
    """Words -> "a fox", "a 3d fox on a blue background"; a style or background that is None is not named."""
    words = f"{style} {concept}" if style else concept
    words = f"{'an' if words[0] in 'aeio' else 'a'} {words}"
    return f"{words} on a {background} background" if background else words


class Captions:
    """All captions: each concept with its style and its background named or not."""

    def __init__(self, concepts):
        self.styles, self.backgrounds = [None, *STYLE_WORDS], [None, *BACKGROUNDS]
        self.texts = [caption(c, s, b) for c in concepts for s in self.styles for b in self.backgrounds]

    def index(self, batch, generator):
        """One caption (B,) for each image: it names the style of half of them, the background of two thirds."""
        size = len(batch.concepts)
        style = torch.where(torch.rand(size, generator=generator) < 1 / 2, 0, 1 + batch.styles)
        background = torch.where(torch.rand(size, generator=generator) < 1 / 3, 0, 1 + batch.backgrounds)
        return (batch.concepts * len(self.styles) + style) * len(self.backgrounds) + background

    def describe(self, index, batch):
        """Whether caption j is true of image i, for captions (C,) and images (B,): (B, C) booleans."""
        background = index % len(self.backgrounds)
        style = index // len(self.backgrounds) % len(self.styles)
        concept = index // len(self.backgrounds) // len(self.styles)
        named_style = (style == 0) | (style - 1 == batch.styles[:, None])
        named_background = (background == 0) | (background - 1 == batch.backgrounds[:, None])
        return (concept == batch.concepts[:, None]) & named_style & named_background
