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
"""What the rewards on CLIP share: the preprocessing, and the agreement of picture and prompt."""

import functools
import os

import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .base import check_batch
from .loading import existing_file, holds, loading


CLIP_ID = "openai/clip-vit-large-patch14"
VIT_H_ID = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def normalize(pixels):
    """Pixels in [0, 1] -> less CLIP's mean, over its deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def preprocess_clip(images, size):
    """CLIP's preprocessing as one differentiable resize: short side to `size`, centre crop, CLIP mean and deviation.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: the side of the square that the vision tower sees, in pixels.

    Returns:
        (B, 3, size, size), normalised.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        shape = (height * size // short, width * size // short)
        # Bicubic overshoots at edges, which an 8-bit picture cannot: hence the clamp.
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    return normalize(images)


def preprocess_letterbox(images, size):
    """HPSv2's: long side to `size`, centred on black, CLIP mean and deviation. Its resize has always been one of
    tensors, so nothing is clamped.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: the side of the square that the vision tower sees, in pixels.

    Returns:
        (B, 3, size, size), normalised.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        scale = size / max(height, width)
        shape = (max(round(height * scale), 1), max(round(width * scale), 1))
        images = F.interpolate(images, shape, mode="bicubic", antialias=True)
        top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
        images = F.pad(images, (left, size - shape[1] - left, top, size - shape[0] - top))
    return normalize(images)


def image_embeds(clip, images, preprocess=preprocess_clip):
    """Projected embeddings (B, D) of images (B, 3, H, W) in [0, 1], in float32 at least.

    Pictures are resized before they are narrowed to the network's precision.
    """
    wide = torch.promote_types(clip.dtype, torch.float32)
    pixels = preprocess(images.to(wide), clip.config.vision_config.image_size)
    return clip.get_image_features(pixel_values=pixels.to(clip.dtype)).pooler_output.to(wide)


class ClipAgreement(torch.nn.Module):
    """R = s cos(f(image), g(prompt)) with f and g the projected embeddings of a CLIPModel; image i with prompt i."""

    differentiable = True

    def __init__(self, clip, tokenizer, preprocess=preprocess_clip, scale=1.0):
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.scale = scale
        # A run sees the same prompts again and again. The device is part of the key, for models that are moved.
        self.text_embeds = functools.lru_cache(maxsize=4096)(self._text_embeds)

    @torch.no_grad()
    def _text_embeds(self, prompt, device):
        """(D,) of one prompt, by itself: in a batch its last digits would depend on the other prompts."""
        length = self.clip.config.text_config.max_position_embeddings
        text = self.tokenizer(prompt, max_length=length, truncation=True, return_tensors="pt").to(device)
        return self.clip.get_text_features(**text).pooler_output[0]

    def forward(self, images, prompts):
        check_batch(images, prompts)
        pictures = image_embeds(self.clip, images, self.preprocess)
        texts = torch.stack([self.text_embeds(prompt, images.device) for prompt in prompts])
        return self.scale * F.cosine_similarity(pictures, texts.to(pictures.dtype))


def load_tokenizer(source, revision=None):
    """The CLIP tokenizer of a folder or Hub repository.

    Raises:
        ValueError: naming the source, if it has none.
    """
    if os.path.isdir(source):
        existing_file(source, *TOKENIZER_FILES)  # or transformers makes up an empty one
    with loading(source):
        return CLIPTokenizer.from_pretrained(source, revision=revision)


def tokenizer_source(path):
    """The folder, if it holds a tokenizer, else the Hub's of CLIP ViT-H/14, whose checkpoints come without."""
    return path if any(holds(path, name) for name in TOKENIZER_FILES) else VIT_H_ID
