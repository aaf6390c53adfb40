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
"""Read videos from files, for scoring."""

import os
import re

import numpy as np
import torch
from PIL import ImageSequence

from .images import naming_the_file, open_image, read_image, to_rgb


MOVIES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")


def read_video(path):
    """Read a video as a tensor (1, F, 3, H, W) in [0, 1], and its number of frames per second.

    Args:
        path: a file of one of the types `MOVIES`, an animation that Pillow reads (GIF, WebP, PNG), or a folder with one
            image file for each frame, in the order of the numbers in their names.

    Returns:
        (video, frames per second or `None` if the file does not say it).

    Raises:
        ValueError: if the file or folder cannot be read, or its images differ in size. The message names it.
    """
    if os.path.isdir(path):
        return read_folder(path), None
    if path.lower().endswith(MOVIES):
        return read_movie(path)
    return read_animation(path)


def read_folder(path):
    """Read the frames of a video from the image files of a folder."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    # 10.png comes after 9.png.
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    if not names:
        raise ValueError(f"{path!r} holds no frames: give a folder of image files")
    frames = [read_image(os.path.join(path, name)) for name in names]
    for name, frame in zip(names, frames):
        if frame.shape != frames[0].shape:
            sizes = (f"{other.shape[-1]}x{other.shape[-2]}" for other in (frame, frames[0]))
            raise ValueError(f"{os.path.join(path, name)!r} is {' and the first frame '.join(sizes)}: use one size")
    return torch.stack(frames, dim=1)


def read_animation(path):
    """Read an animation with Pillow. Transparent parts are white. The frame rate is the mean one."""
    image = open_image(path)
    with naming_the_file(path, "cannot be read"):
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.array(to_rgb(frame)))
            durations.append(frame.info.get("duration", 0))  # milliseconds
    return to_video(frames), 1000 * len(frames) / sum(durations) if all(durations) else None


def read_movie(path):
    """Read a video file with imageio, with which diffusers writes them."""
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{path!r} cannot be read without imageio: pip install imageio imageio-ffmpeg") from error
    with naming_the_file(path, "cannot be read"), imageio.get_reader(path, format="ffmpeg") as reader:
        return to_video(list(reader.iter_data())), reader.get_meta_data()["fps"]


def to_video(frames):
    """A video (1, F, 3, H, W) in [0, 1] of frames, which are arrays (H, W, 3) of 8 bits."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None] / 255
