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
"""What a video of a moving digit shows: the digit and its color, read by a small network, and how its center moves.

`DigitAccuracy` and `DirectionAccuracy` are custom rewards for `--heldout_reward`: does a video still show what its prompt
asks for?
"""

import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


FOLDER = os.path.dirname(os.path.abspath(__file__))
RESOLUTION = 32
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLORS = ["green", "red", "blue", "yellow", "purple", "cyan"]
DIRECTIONS = ["left", "right", "up", "down", "still"]
STILL = 2.0  # pixels of 32 from the first frame to the last: less is standing still


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]


class DigitReader(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] -> logits of the digit (B, 10) and the color (B, 6)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(*block(3, 16), nn.MaxPool2d(2)),
            *(*block(16, 32), nn.MaxPool2d(2)),
            *(*block(32, 64), nn.MaxPool2d(2)),
            *block(64, 96),
        )
        self.head = nn.Linear(2 * 96, len(DIGITS) + len(COLORS))

    def forward(self, images):
        features = self.features(2 * images - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.head(pooled).split([len(DIGITS), len(COLORS)], 1)


def load_reader():
    """The trained network."""
    reader = DigitReader()
    state = load_file(os.path.join(FOLDER, "video_reader.safetensors"))
    reader.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return reader.eval().requires_grad_(False)


def read_frames(reader, videos):
    """Videos (B, F, 3, H, W) in [0, 1] -> indices (B, F) of the digits and of the colors that `reader` reads."""
    images = videos.flatten(0, 1)
    if images.shape[-2:] != (RESOLUTION, RESOLUTION):
        images = F.interpolate(images, (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True).clamp(0, 1)
    return [logits.argmax(1).view(videos.shape[:2]) for logits in reader(images)]


def displacement(videos):
    """How far the center of the digit moves in videos (B, F, 3, H, W): (B, 2), right and down, in pixels of 32.

    The center of a frame is the mean place of its ink, which is the strongest channel of each pixel. A line through the
    centers, fitted by least squares, gives the way from the first frame to the last.
    """
    ink = videos.amax(2)
    down, across = ((torch.arange(side, device=ink.device) + 0.5) * RESOLUTION / side for side in ink.shape[2:])
    mass = ink.sum((2, 3)).clamp_min(1e-6)
    centers = torch.stack([(ink.sum(2) * across).sum(2), (ink.sum(3) * down).sum(2)], 2) / mass[..., None]
    time = torch.linspace(-0.5, 0.5, ink.shape[1], device=ink.device)
    return (centers * time[:, None]).sum(1) / time.square().sum()


def read_directions(videos):
    """Videos (B, F, 3, H, W) in [0, 1] -> indices (B,) into `DIRECTIONS`, by the larger part of the displacement."""
    way = displacement(videos)
    axis = way.abs().argmax(1)
    along = way.gather(1, axis[:, None])[:, 0]
    return torch.where(along.abs() < STILL, DIRECTIONS.index("still"), 2 * axis + (along > 0))


def named(prompt, words, kind):
    """The index of the one of `words` that a prompt names.

    Raises:
        ValueError: It names none, or more than one.
    """
    said = prompt.lower().replace(",", " ").replace(".", " ").split()
    found = [index for index, word in enumerate(words) if word in said]
    if len(found) != 1:
        raise ValueError(f"the prompt {prompt!r} names {len(found)} of the {kind} {', '.join(words)}: name one")
    return found[0]


class DigitAccuracy(nn.Module):
    """The share of the frames that show the digit of the prompt: a black box."""

    takes_videos, differentiable = True, False

    def __init__(self):
        super().__init__()
        self.reader = load_reader()

    @torch.no_grad()
    def forward(self, videos, prompts):
        """Videos (B, F, 3, H, W) in [0, 1] and B prompts such as "a red seven moving left" -> (B,)."""
        asked = torch.tensor([named(prompt, DIGITS, "digits") for prompt in prompts], device=videos.device)
        return (read_frames(self.reader, videos)[0] == asked[:, None]).float().mean(1)


class DirectionAccuracy(nn.Module):
    """1 for a video whose digit moves as its prompt says, 0 for another: a black box."""

    takes_videos, differentiable = True, False

    @torch.no_grad()
    def forward(self, videos, prompts):
        """Videos (B, F, 3, H, W) in [0, 1] and B prompts such as "a red seven moving left" -> (B,)."""
        asked = torch.tensor([named(prompt, DIRECTIONS, "directions") for prompt in prompts], device=videos.device)
        return (read_directions(videos) == asked).float()
