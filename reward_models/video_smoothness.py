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
"""Temporal consistency of a video: mean cosine of the CLIP embeddings of consecutive frames.

It is 1 for a still video, so train it together with `motion` or a reward that reads the prompt.
"""

import os

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .base import check_batch
from .clip import CLIP_ID, image_embeds, load_clip
from .loading import existing_file
from .videos import check_pairs


class VideoSmoothness(torch.nn.Module):
    """R = mean_i cos(f(frame_i), f(frame_{i+1})), where f are projected CLIP image embeddings. Prompts are ignored.

    The frames are embedded one after the other, and again in the backward pass, as by `PerFrame`.
    """

    differentiable = True
    takes_videos = True

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, videos, prompts):
        check_batch(videos, prompts, "videos")
        check_pairs(videos, "video_smoothness")
        embeds = [checkpoint(image_embeds, self.clip, frames, use_reentrant=False) for frames in videos.unbind(1)]
        embeds = torch.stack(embeds, dim=1)
        return F.cosine_similarity(embeds[:, :-1], embeds[:, 1:], dim=-1).mean(1)


def load(path, revision, device, dtype):
    """Load from the Hub, or from a folder with a transformers CLIPModel."""
    source = CLIP_ID if path is None else os.path.dirname(existing_file(path, "config.json"))
    clip = load_clip(source, dtype, revision)
    clip.text_model = clip.text_projection = None  # not used
    return VideoSmoothness(clip).to(device)
