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
"""Images as vision-language models read them, in torch, so that a gradient passes."""

import math
import os

import numpy as np
import torch
from PIL import Image

from .base import check_batch
from .clip import TOKENIZER_FILES, normalize, preprocess_clip, resize
from .loading import existing_file


# Qwen2-VL's chat format for an image or video and a text.
QWEN2_VL_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{vision}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
# Key names of its weights in transformers 4 -> transformers 5.
QWEN2_VL_NAMES = ((r"^model\.(?!language_model|visual)", "model.language_model."), (r"^visual\.", "model.visual."))
# Mean difference from the model's own processor, which rounds to 8 bits, in normalized units.
TOLERANCE = 0.05


class OneByOne(torch.nn.Module):
    """A reward of a language model, which scores one image or video after the other: padding would make all texts equally long.

    A subclass has `score(image, prompt)` of an image (3, H, W), or a video (F, 3, H, W), in [0, 1], and `tokens(prompt, number)`
    of the text about one of so many tokens, which raises a ValueError for a prompt that it cannot hold.
    """

    differentiable = True
    kind = "images"

    def forward(self, images, prompts):
        check_batch(images, prompts, self.kind)
        return torch.stack([self.score(image, prompt) for image, prompt in zip(images, prompts)])

    def check_prompts(self, prompts):
        for prompt in prompts:
            self.tokens(prompt, 1)


def check_special_tokens(name, prompt, tokens):
    """Refuse a prompt with one of the special tokens.

    Args:
        name: of the reward.

    Raises:
        ValueError: naming reward, prompt and token.
    """
    special = next((token for token in tokens if token in prompt), None)
    if special is not None:
        raise ValueError(f"{name}: the prompt {prompt[:80]!r} contains the special token {special}")


def base_of(path, name):
    """The folder `base` in a reward's folder, with the model that was fine-tuned, or else the model's name on the Hub.

    Raises:
        ValueError: if the folder lacks its configuration or tokenizer.
    """
    base = None if path is None else os.path.join(path, "base")
    if base is None or not os.path.isdir(base):
        return name
    for names in (("config.json",), TOKENIZER_FILES):
        existing_file(base, *names)  # without them transformers would ask the Hub, or create an empty tokenizer
    return base


def choose_size(height, width, factor, min_pixels, max_pixels):
    """Height and width to which Qwen2-VL resizes images: multiples of `factor`, with about the same aspect ratio."""
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        scale = math.sqrt(max_pixels / (height * width))
        return [max(factor, math.floor(side * scale / factor) * factor) for side in (height, width)]
    if math.prod(sides) < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return sides


def make_patches(frames, patch, merge):
    """Cut frames (2 T, 3, H, W) into patches of two frames each.

    The order is that of Qwen2-VL: patches that are merged to one token, a square of `merge` x `merge`, are neighbours.

    Returns:
        patches (N, 6 patch^2), grid (T, H / patch, W / patch) of N patches.
    """
    time, height, width = len(frames) // 2, frames.shape[-2] // patch, frames.shape[-1] // patch
    shape = (time, 2, 3, height // merge, merge, patch, width // merge, merge, patch)
    patches = frames.reshape(shape).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.flatten(5).flatten(0, 4), (time, height, width)


class Patches:
    """What Qwen2-VL, Qwen2.5-VL and Qwen3-VL read of an image: patches, of about as many pixels as the image has.

    Args:
        patch: side of a patch in pixels.
        merge: side of the square of patches that become a token.
        limits: the least and the largest number of pixels to which an image is resized.
        colors: mean and standard deviation of the pixels. Default: CLIP's.
    """

    def __init__(self, patch, merge, limits, colors=()):
        self.patch, self.merge, self.limits, self.colors = patch, merge, limits, colors

    @classmethod
    def of(cls, processor):
        """Those of a model's own image processor."""
        limits = processor.size["shortest_edge"], processor.size["longest_edge"]
        return cls(processor.patch_size, processor.merge_size, limits, (processor.image_mean, processor.image_std))

    def __call__(self, image):
        """An image (1, 3, H, W) in [0, 1] -> arguments of the network."""
        size = choose_size(*image.shape[-2:], self.patch * self.merge, *self.limits)
        image = normalize(resize(image, size), *self.colors)
        patches, grid = make_patches(image.expand(2, -1, -1, -1), self.patch, self.merge)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([grid], device=image.device)}


class Crop:
    """What CLIP and SigLIP, and models such as LLaVA and PaliGemma, read of an image: a square of a fixed size.

    Args:
        processor: the model's own image processor.
    """

    def __init__(self, processor):
        self.shortest, self.sides = processor.size.get("shortest_edge"), None
        if self.shortest is None:
            self.sides = processor.size["height"], processor.size["width"]
        self.colors = processor.image_mean, processor.image_std

    def __call__(self, image):
        """An image (1, 3, H, W) in [0, 1] -> arguments of the network."""
        if self.sides is None:
            return {"pixel_values": preprocess_clip(image, self.shortest, *self.colors)}
        return {"pixel_values": normalize(resize(image, self.sides), *self.colors)}


def reading_of(processor):
    """`Patches` or `Crop`, whichever does what a model's own image processor does.

    Raises:
        ValueError: if neither does, on an image that both are tried on.
    """
    reading = Patches.of(processor) if hasattr(processor, "merge_size") else Crop(processor)
    image = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    image = (resize(image, (90, 110)) * 255).round().to(torch.uint8)
    expected = processor(images=Image.fromarray(image[0].permute(1, 2, 0).numpy()), return_tensors="pt")
    own = reading(image / 255)
    kind = type(processor).__name__
    for name, value in expected.items():
        value = torch.as_tensor(np.asarray(value))
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"images of a {kind} cannot be prepared with a gradient: its {name} is not reproduced")
        if (own[name].float() - value.float()).abs().mean() > TOLERANCE:
            raise ValueError(f"images of a {kind} cannot be prepared with a gradient: its {name} differs")
    return reading
