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
"""JPEG file size, a black-box reward (it has no gradient) used by DDPO (huggingface.co/papers/2305.13301)."""

import io

import torch
from PIL import Image

from .base import check_batch


QUALITY = 95


def jpeg_incompressibility(images, prompts):
    """Size of each image as a JPEG of quality 95, in kB (1000 bytes).

    Images are (B, 3, H, W) in [0, 1] and scores are (B,). Prompts are ignored.
    """
    check_batch(images, prompts)
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, device=images.device)


def jpeg_compressibility(images, prompts):
    """Negative JPEG size in kB: simpler images score higher."""
    return -jpeg_incompressibility(images, prompts)


jpeg_incompressibility.differentiable = False
jpeg_compressibility.differentiable = False
