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
"""Aesthetic predictor v2.5 on SigLIP so400m."""

import os

import torch
from transformers import SiglipModel

from .base import ScoreHead, check_batch
from .clip import normalize, resize
from .loading import existing_file, load_into, load_pretrained, load_state_dict, rename_keys


MODEL_ID, FOLDER = "google/siglip-so400m-patch14-384", "siglip"
HEAD_FILE = "aesthetic_predictor_v2_5.pth"
# Its head has one more dropout at the end than LAION's.
NAMES = ((r"^scoring_head\.8\.", "layers.7."), (r"^scoring_head\.", "layers."))


class AestheticPredictor(torch.nn.Module):
    """R = head(e / |e|), where e is SigLIP's embedding of the image, resized to a square.

    Args:
        vision: the vision tower of a SiglipModel.
        head: `ScoreHead`, in float32 or wider.
    """

    differentiable = True

    def __init__(self, vision, head):
        super().__init__()
        self.vision, self.head = vision, head

    def forward(self, images, prompts):
        check_batch(images, prompts)
        wide, side = self.head.layers[0].weight.dtype, self.vision.config.image_size
        half = (0.5, 0.5, 0.5)
        pixels = normalize(resize(images.to(wide), (side, side)), half, half)
        embeds = self.vision(pixels.to(self.vision.dtype)).pooler_output.to(wide)
        return self.head(embeds / embeds.norm(dim=-1, keepdim=True))


def load(path, revision, device, dtype):
    """Load from a folder with the original's `HEAD_FILE`, which is on GitHub only.

    The folder may also hold `siglip/`, a transformers SiglipModel, instead of the Hub's. The head's license is the AGPL-3.0.
    """
    if path is None:
        raise ValueError(
            f"its {HEAD_FILE} is not on the Hub: download it from github.com/discus0434/aesthetic-predictor-v2-5 (folder"
            " models), and give the folder that holds it as --reward_path aesthetic_v2.5=DIR"
        )
    state = rename_keys(load_state_dict(existing_file(path, HEAD_FILE)), NAMES)
    local = os.path.join(path, FOLDER)
    source = os.path.dirname(existing_file(local, "config.json")) if os.path.isdir(local) else MODEL_ID
    vision = load_pretrained(SiglipModel, source, dtype=dtype).vision_model
    head = ScoreHead(vision.config.hidden_size)
    load_into(head, state, os.path.join(path, HEAD_FILE))
    return AestheticPredictor(vision, head.to(torch.promote_types(dtype, torch.float32))).to(device)
