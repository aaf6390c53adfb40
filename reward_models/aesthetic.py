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
"""LAION's aesthetic predictor: an affine map of the CLIP image embedding. Scores range from about 1 to 10.

SD 1.x scores 5 to 6.
"""

import os

import torch

from .base import ScoreHead, check_batch
from .clip import CLIP_ID, image_embeds, load_clip
from .loading import existing_file, hub_file, load_into, load_state_dict


HEAD_ID, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
# File names under which the same head is distributed.
HEAD_FILES = ("aesthetic_head.safetensors", "aesthetic_head.pth", HEAD_FILE, "sac+logos+ava1-l14-linearMSE.pth")


class AestheticReward(torch.nn.Module):
    """R = head(e / ||e||), where e is the projected CLIP image embedding. The prompt is ignored."""

    differentiable = True

    def __init__(self, clip, head):
        super().__init__()
        self.clip = clip
        self.head = head

    def forward(self, images, prompts):
        check_batch(images, prompts)
        embeds = image_embeds(self.clip, images)
        return self.head(embeds / embeds.norm(dim=-1, keepdim=True))


def load(path, revision, device, dtype):
    """Load from the Hub, or from a folder with `clip/` (a transformers CLIPModel) and one of `HEAD_FILES`.

    `revision` is that of the head's repository. The head takes embeddings of the CLIP's projection_dim.
    """
    if path is None:
        clip_path, head_file = CLIP_ID, hub_file(HEAD_ID, HEAD_FILE, revision)
    else:
        head_file = existing_file(path, *HEAD_FILES)
        clip_path = os.path.dirname(existing_file(os.path.join(path, "clip"), "config.json"))
    state = load_state_dict(head_file)
    clip = load_clip(clip_path, dtype)
    head = ScoreHead(clip.config.projection_dim)
    first = state.get("layers.0.weight", head.layers[0].weight)
    if first.dim() == 2 and first.shape[1] != clip.config.projection_dim:
        raise ValueError(
            f"{head_file!r} takes embeddings of {first.shape[1]} numbers, and the CLIP of {clip_path!r} makes"
            f" {clip.config.projection_dim} (its projection_dim)"
        )
    load_into(head, state, head_file)
    clip.text_model = clip.text_projection = None  # not used
    return AestheticReward(clip, head.to(torch.promote_types(dtype, torch.float32))).to(device)
