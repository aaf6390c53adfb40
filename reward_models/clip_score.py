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
"""CLIP score: the cosine of image and prompt, about .275 for SD 1.5 under CLIP ViT-L/14."""

import os

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from .base import existing_file, preprocess_clip


CLIP_ID = "openai/clip-vit-large-patch14"


class ClipScoreReward(torch.nn.Module):
    """R = cos(projected image embedding, projected text embedding of its prompt), in [-1, 1]."""

    differentiable = True

    def __init__(self, clip, tokenizer):
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.score_dtype = torch.promote_types(clip.dtype, torch.float32)

    def forward(self, images, prompts):
        pixels = preprocess_clip(images.to(self.clip.dtype), self.clip.config.vision_config.image_size)
        length = self.clip.config.text_config.max_position_embeddings
        text = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        image_embeds = self.clip.get_image_features(pixel_values=pixels).pooler_output
        text_embeds = self.clip.get_text_features(
            input_ids=text.input_ids.to(images.device), attention_mask=text.attention_mask.to(images.device)
        ).pooler_output
        return F.cosine_similarity(image_embeds.to(self.score_dtype), text_embeds.to(self.score_dtype))


def load(path, device, dtype):
    """From the Hub, or from a folder with a transformers CLIPModel and its tokenizer."""
    if path is not None:
        existing_file(path, "tokenizer.json", "vocab.json")  # or transformers makes up an empty one
        path = os.path.dirname(existing_file(path, "config.json"))
    source = path or CLIP_ID
    clip, tokenizer = CLIPModel.from_pretrained(source, dtype=dtype), CLIPTokenizer.from_pretrained(source)
    return ClipScoreReward(clip, tokenizer).to(device).eval().requires_grad_(False)
