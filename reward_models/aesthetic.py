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
"""The LAION aesthetic predictor: an affine map of the CLIP image embedding. SD 1.x scores 5 to 6 of about 10."""

import os

import torch
from huggingface_hub import hf_hub_download
from transformers import CLIPModel

from .base import existing_file, load_into, preprocess_clip


CLIP_ID = "openai/clip-vit-large-patch14"
HEAD_ID, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class AestheticHead(torch.nn.Module):
    """Embeddings (B, 768) -> scores (B,): linear layers without activations, dropout only in training."""

    def __init__(self):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            *(linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)),
            *(linear(64, 16), linear(16, 1)),
        )

    def forward(self, embeds):
        return self.layers(embeds).squeeze(-1)


class AestheticReward(torch.nn.Module):
    """R = head(e / ||e||) with e the projected CLIP image embedding; the prompt is not looked at."""

    differentiable = True

    def __init__(self, clip, head):
        super().__init__()
        self.clip = clip
        self.head = head

    def forward(self, images, prompts):
        pixels = preprocess_clip(images.to(self.clip.dtype), self.clip.config.vision_config.image_size)
        embeds = self.clip.get_image_features(pixel_values=pixels).pooler_output
        embeds = embeds.to(self.head.layers[0].weight.dtype)
        return self.head(embeds / embeds.norm(dim=-1, keepdim=True))


def load(path, device, dtype):
    """From the Hub, or from a folder with `clip/` and `aesthetic_head.safetensors` or `.pth`.

    The head, and so the score, stays in float32 where `dtype` is narrower.
    """
    if path is None:
        clip_path, head_file = CLIP_ID, hf_hub_download(HEAD_ID, HEAD_FILE)
    else:
        head_file = existing_file(path, "aesthetic_head.safetensors", "aesthetic_head.pth")
        clip_path = os.path.dirname(existing_file(os.path.join(path, "clip"), "config.json"))
    head = AestheticHead()
    load_into(head, head_file)
    clip = CLIPModel.from_pretrained(clip_path, dtype=dtype)
    clip.text_model = clip.text_projection = None  # never looked at
    reward = AestheticReward(clip, head.to(torch.promote_types(dtype, torch.float32)))
    return reward.to(device).eval().requires_grad_(False)
