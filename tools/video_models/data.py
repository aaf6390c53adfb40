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
"""Captioned videos of colored handwritten digits that move across a black background."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from make_tiny_assets import COLORS, DIGITS, NUM_TRAIN_DIGITS, load_scans, paint


RESOLUTION, NUM_FRAMES = 32, 9
MOTIONS = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "standing still": (0.0, 0.0),
}
SIZE = (18.0, 22.0)  # of a digit, in pixels
DISTANCE = (6.0, 12.0)  # pixels from the first frame to the last
REACH = 7.0  # pixels of a digit's center from the center of the frame, at most
UNNAMED_SHARE = 0.2  # of the captions, which do not say how the digit moves


@dataclass
class Batch:
    """Videos (B, F, 3, 32, 32) in [0, 1] with the indices (B,) of their digits, colors and motions."""

    videos: torch.Tensor
    digits: torch.Tensor
    colors: torch.Tensor
    motions: torch.Tensor


class DigitVideos:
    """Endless videos: one draw of `batch` paints some of the scans, of the training or of those held out of it."""

    def __init__(self, held_out=False):
        ink, labels = load_scans()
        of_split = slice(NUM_TRAIN_DIGITS, None) if held_out else slice(NUM_TRAIN_DIGITS)
        self.ink, self.labels = ink[of_split], labels[of_split]

    def batch(self, size, generator, num_frames=NUM_FRAMES):
        """A `Batch` of `size` videos of 9 frames, of which the first `num_frames` are drawn."""
        scans, colors, motions = (
            torch.randint(count, (size,), generator=generator) for count in (len(self.ink), len(COLORS), len(MOTIONS))
        )
        videos = self.videos(scans, colors, motions, generator, num_frames)
        return Batch(videos, self.labels[scans], colors, motions)

    def videos(self, scans, colors, motions, generator, num_frames=NUM_FRAMES):
        """Videos (B, F, 3, 32, 32) of the scans, colors and motions that have the indices (B,)."""
        ink = move(self.ink[scans], motions, generator, num_frames)
        # One jitter of the color for all frames of a video, which lie below each other while they are painted.
        return paint(ink.flatten(1, 2)[:, None], colors, generator).unflatten(2, ink.shape[1:3]).transpose(1, 2)


def move(ink, motions, generator, num_frames=NUM_FRAMES):
    """Ink maps (B, 1, 32, 32) as they cross the frame, at random sizes, places and speeds: (B, F, 32, 32)."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(len(ink), *shape, generator=generator)

    step = torch.tensor(list(MOTIONS.values()))[motions] * uniform(*DISTANCE, 1)
    middle = (REACH - step.abs() / 2) * uniform(-1.0, 1.0, 2)
    time = torch.linspace(-0.5, 0.5, NUM_FRAMES)[:num_frames, None]
    center = middle[:, None] + step[:, None] * time  # (B, F, 2), pixels from the center of the frame
    zoom = (RESOLUTION / uniform(*SIZE))[:, None, None]
    # The affine map leads from a place in the frame to a place in the scan, both in [-1, 1].
    theta = torch.eye(2).expand(*center.shape, 2) * zoom[..., None]
    theta = torch.cat([theta, -zoom[..., None] * center[..., None] * 2 / RESOLUTION], -1).flatten(0, 1)
    frames = ink.expand(-1, num_frames, -1, -1).reshape(-1, 1, RESOLUTION, RESOLUTION)
    moved = F.grid_sample(frames, F.affine_grid(theta, frames.shape, align_corners=False), align_corners=False)
    return moved.view(len(ink), num_frames, RESOLUTION, RESOLUTION)


def caption(digit, color, motion=None):
    """The words for indices: "a red seven moving left", or "a red seven"."""
    words = f"a {list(COLORS)[color]} {DIGITS[digit]}"
    return words if motion is None else f"{words} {list(MOTIONS)[motion]}"


class Captions:
    """All captions in `texts`: of each color and digit one for each motion, and one that names none."""

    def __init__(self):
        self.motions = [*range(len(MOTIONS)), None]
        self.texts = [
            caption(digit, color, motion)
            for color in range(len(COLORS))
            for digit in range(len(DIGITS))
            for motion in self.motions
        ]

    def index(self, batch, generator):
        """Indices (B,) into `texts` of captions for a batch; some do not name the motion."""
        unnamed = torch.rand(len(batch.motions), generator=generator) < UNNAMED_SHARE
        motions = torch.where(unnamed, len(MOTIONS), batch.motions)
        return (batch.colors * len(DIGITS) + batch.digits) * len(self.motions) + motions


def write_prompts(path):
    """Write the captions that name a motion, one a line."""
    texts = [text for text in Captions().texts if any(motion in text for motion in MOTIONS)]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{text}\n" for text in texts)
