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
"""Code shared by the rewards built on CLIP: preprocessing, embeddings, and the similarity of image and prompt."""

import functools
import json
import os

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .base import check_batch
from .loading import existing_file, has_file, load_pretrained, one_line_errors


CLIP_ID = "openai/clip-vit-large-patch14"
VIT_H_ID = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def normalize(pixels, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD):
    """Subtract a mean, by default CLIP's, from pixels in [0, 1], (B, 3, H, W), and divide by the standard deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def resize(images, size):
    """Images (B, 3, H, W) in [0, 1] in another size. Bicubic resizing overshoots at edges, which 8-bit images clip."""
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def preprocess_clip(images, size, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD):
    """CLIP's preprocessing, differentiable: resize the short side to `size`, centre crop, normalise.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: side of the vision tower's square input, in pixels.

    Returns:
        (B, 3, size, size), normalised.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        shape = (height * size // short, width * size // short)
        images = resize(images, shape)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    return normalize(images, mean, std)


def preprocess_letterbox(images, size):
    """HPSv2's preprocessing, differentiable: resize the long side to `size`, pad to a square with black, normalise.

    The original also resizes tensors, so values are not clamped.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: side of the vision tower's square input, in pixels.

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
    """Projected embeddings (B, D) of images (B, 3, H, W) in [0, 1], in float32 or wider.

    Images are resized before they are cast to the network's precision.
    """
    wide = torch.promote_types(clip.dtype, torch.float32)
    pixels = preprocess(images.to(wide), clip.config.vision_config.image_size)
    return clip.get_image_features(pixel_values=pixels.to(clip.dtype)).pooler_output.to(wide)


class ClipAgreement(torch.nn.Module):
    """R = s cos(f(image), g(prompt)), where f and g are the projected embeddings of a CLIPModel and s is a scale.

    Raises:
        ValueError: if the tokenizer does not fit the model, see `check_tokenizer`.
    """

    differentiable = True

    def __init__(self, clip, tokenizer, preprocess=preprocess_clip, scale=1.0):
        super().__init__()
        check_tokenizer(tokenizer, clip.config.text_config)
        self.clip = clip
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.scale = scale
        # Training repeats its prompts, so their embeddings are cached, by device because the model may be moved.
        self.text_embeds = functools.lru_cache(maxsize=4096)(self._text_embeds)

    @torch.no_grad()
    def _text_embeds(self, prompt, device):
        """Embedding (D,) of one prompt. In a batch its last digits would depend on the other prompts."""
        length = self.clip.config.text_config.max_position_embeddings
        text = self.tokenizer(prompt, max_length=length, truncation=True, return_tensors="pt").to(device)
        return self.clip.get_text_features(**text).pooler_output[0]

    def forward(self, images, prompts):
        check_batch(images, prompts)
        embeds = image_embeds(self.clip, images, self.preprocess)
        text_embeds = torch.stack([self.text_embeds(prompt, images.device) for prompt in prompts])
        return self.scale * F.cosine_similarity(embeds, text_embeds.to(embeds.dtype))


def load_clip(source, dtype, revision=None):
    """Load the transformers CLIPModel of a folder or Hub repository.

    Raises:
        ValueError: if it is another model, is damaged, or its weights do not fit its configuration. The message names
            the source.
    """
    with one_line_errors(source):
        config, _ = CLIPConfig.get_config_dict(source, revision=revision)
        kind = config.get("model_type", "clip")
        if kind != "clip":
            raise ValueError(f"its config.json describes a model of type {kind!r}, not 'clip'")
        for name, default in (("text_config", CLIPTextConfig()), ("vision_config", CLIPVisionConfig())):
            tower = config.get(name) or {}
            # A default number of heads would fit the weights, whose shapes do not depend on it, but not the scores.
            has_default_width = tower.get("hidden_size", default.hidden_size) == default.hidden_size
            if "num_attention_heads" not in tower and not has_default_width:
                raise ValueError(f"the {name} of its config.json has no num_attention_heads")
    return load_pretrained(CLIPModel, source, revision=revision, dtype=dtype)


def load_tokenizer(source, revision=None):
    """Load the CLIP tokenizer of a folder or Hub repository.

    Raises:
        ValueError: if it has no tokenizer. The message names the source.
    """
    if os.path.isdir(source):
        existing_file(source, *TOKENIZER_FILES)  # without these files transformers would create an empty tokenizer
    with one_line_errors(source):
        return CLIPTokenizer.from_pretrained(source, revision=revision)


def check_tokenizer(tokenizer, text_config):
    """Check that a CLIP tokenizer makes the tokens that a text encoder reads.

    Raises:
        ValueError: if its ids are not those of the encoder's embeddings, its merges are incomplete, or it does not end a
            prompt with the token at which the encoder reads the embedding. The message names the tokenizer's source.
    """
    size, vocabulary = text_config.vocab_size, tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    unmade = vocabulary.keys() - {"".join(pair) for pair in merges} - tokenizer.get_added_vocab().keys()
    unmade = [token for token in unmade if len(token.removesuffix("</w>")) > 1]
    # Older configurations say 2, and transformers then looks for the highest id.
    end = len(vocabulary) - 1 if text_config.eos_token_id == 2 else text_config.eos_token_id
    last = tokenizer("").input_ids[-1]
    if len(vocabulary) > size or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        problem = f"its {len(vocabulary)} tokens do not have the ids from 0 on of the text encoder's {size}"
    elif unmade:
        problem = f"it has no merges for {len(unmade)} of its tokens, such as {min(unmade)!r}"
    elif last != end:
        problem = f"it ends prompts with the token {last}, and the text encoder looks for the token {end}"
    else:
        return
    raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} does not fit: {problem}")


def tokenizer_source(path):
    """The folder `path` if it has a tokenizer, else the Hub repository of CLIP ViT-H/14.

    The published checkpoints of HPSv2 and PickScore come without a tokenizer.
    """
    return path if any(has_file(path, name) for name in TOKENIZER_FILES) else VIT_H_ID
