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
"""Reading image files."""

import numpy as np
import torch
from PIL import Image, ImageOps


def open_image(path):
    """Open an image file as a PIL image. Its pixels are not read yet.

    Raises:
        ValueError: if the file is missing, is not an image, or has more than 8 bits per channel. The message names it.
    """
    try:
        image = Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path!r} cannot be opened as an image: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path!r} has more than 8 bits per channel ({image.mode}): convert it first")
    return image


def read_image(path):
    """Read an image file as a tensor (1, 3, H, W) in [0, 1], rotated as its EXIF data says.

    Raises:
        ValueError: see `open_image`; also if the file is damaged. The message names the file.
    """
    image = open_image(path)
    try:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
