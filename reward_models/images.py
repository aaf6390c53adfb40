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
"""Reading image files: the first frame of each, on white where it is transparent."""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps

from .loading import first_line


BACKGROUND = "white"


@contextmanager
def naming_the_file(path, problem):
    """Within it, every failure is a ValueError "PATH PROBLEM: ..."."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(f"{path!r} {problem}: {first_line(error)}") from error


def open_image(path):
    """Open an image file as a PIL image. Its pixels are not read yet.

    Raises:
        ValueError: if the file is missing, is not an image, or has more than 8 bits per channel. The message names it.
    """
    with naming_the_file(path, "cannot be opened as an image"):
        image = Image.open(path)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path!r} has more than 8 bits per channel ({image.mode}): convert it first")
    return image


def to_rgb(image):
    """Convert a PIL image of any mode to RGB, composited on `BACKGROUND` where it is transparent.

    Color profiles are not applied.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        # Not `convert("RGB")`, which shows the hidden colors of transparent pixels.
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def read_image(path):
    """Read an image file as a tensor (1, 3, H, W) in [0, 1], rotated as its EXIF data says.

    Of an animation, or of several pages, it is the first. Transparent pixels are composited on `BACKGROUND`.

    Raises:
        ValueError: see `open_image`; also if the file is damaged. The message names the file.
    """
    image = open_image(path)
    with naming_the_file(path, "cannot be read"):
        pixels = np.array(to_rgb(ImageOps.exif_transpose(image)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
