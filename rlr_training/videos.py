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
"""Images and videos as files that people look at."""

import os
import tempfile

import torch
from PIL import Image

from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import export_to_gif

from .display import evenly_spaced
from .plots import plot_grid


# Frames of a video that are shown beside each other, and of an animation in which every frame is a whole plot.
FRAMES_IN_A_STRIP, FRAMES_OF_PLOTS = 9, 16


def pil_images(images):
    """Images (N, 3, H, W) in [0, 1] as PIL images."""
    return VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())


def save_image(image, path, fps):
    """Write an image (3, H, W) as PNG, or a video (F, 3, H, W) as GIF; returns the path with that ending.

    Args:
        path: without an ending.
        fps: frames per second of a video.
    """
    if image.dim() == 3:
        path = f"{path}.png"
        pil_images(image[None])[0].save(path)
        return path
    return export_to_gif(pil_images(image), f"{path}.gif", fps=max(1, round(fps)))


def strips(videos):
    """Some frames of each video (N, F, 3, H, W) beside each other, (N, 3, H, n W), with a white line between them."""
    frames = videos[:, evenly_spaced(videos.shape[1], FRAMES_IN_A_STRIP)]
    line = max(1, frames.shape[-1] // 32)
    frames = torch.nn.functional.pad(frames, (0, line), value=1.0)
    return frames.permute(0, 2, 3, 1, 4).flatten(3)[..., :-line]


def plot_strips(videos, prompts, path):
    """A grid as of `plot_grid` of the `strips` of videos {model: (N, F, 3, H, W)}."""
    plot_grid({name: strips(drawn) for name, drawn in videos.items()}, prompts, path)


def animate(plot, videos, path, fps):
    """Write a GIF of plots of some frames of videos; it lasts as long as they do.

    Args:
        plot: `plot({model: (N, 3, H, W)}, file)` writes the plot of a frame of all videos as PNG.
        videos: {model: (N, F, 3, H, W)}.
        fps: of the videos.
    """
    num_frames = next(iter(videos.values())).shape[1]
    numbers, plots = evenly_spaced(num_frames, FRAMES_OF_PLOTS), []
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            file = os.path.join(folder, f"{number}.png")
            plot({name: drawn[:, number] for name, drawn in videos.items()}, file)
            with Image.open(file) as image:
                plots.append(image.convert("RGB"))
    export_to_gif(plots, path, fps=max(1, round(fps * len(numbers) / num_frames)))
