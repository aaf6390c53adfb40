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
"""Diversity, drift and Frechet distance of sets of images, measured on CLIP embeddings.

These are metrics for evaluation, not rewards. The distance of two images is 1 - cosine similarity, from 0 to 2.
"""

import os

import torch
import torch.nn.functional as F

from .clip import CLIP_ID, image_embeds, load_clip
from .loading import existing_file
from .motion import motion


class ClipFeatures(torch.nn.Module):
    """Normalised image embeddings of a CLIPModel."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    @torch.no_grad()
    def forward(self, images, batch_size=8):
        """Embed images (N, 3, H, W) in [0, 1], `batch_size` at a time. Returns (N, D) of unit norm, on the CPU.

        Of videos (N, F, 3, H, W) it returns those of all frames, (N, F, D).
        """
        if images.dim() == 5:
            return torch.stack([self(video, batch_size) for video in images])
        device = self.clip.device
        parts = [image_embeds(self.clip, part.to(device)).cpu() for part in images.split(batch_size)]
        return F.normalize(torch.cat(parts), dim=1)


def load_features(path=None, device="cpu"):
    """Load `ClipFeatures`: CLIP ViT-L/14 from the Hub, or the transformers CLIPModel in the folder `path`.

    Raises:
        ValueError: if the model cannot be loaded.
    """
    source = CLIP_ID if path is None else os.path.dirname(existing_file(path, "config.json"))
    clip = load_clip(source, torch.float32)
    clip.text_model = clip.text_projection = None  # not used
    return ClipFeatures(clip).to(device).eval().requires_grad_(False)


def mean_over_frames(features):
    """The features (N, D) of images, or of videos, from those of their frames (N, F, D); all are of unit norm."""
    return features if features.dim() == 2 else F.normalize(features.mean(1), dim=1)


def video_figures(videos, features):
    """How videos (N, F, 3, H, W) in [0, 1] change in time, {figure: (N,)}; empty for images and single frames.

    `flicker` is the mean absolute difference of consecutive frames, and `subject_consistency` the mean over frames of the
    cosines with the frame before and with the first, both as in VBench (huggingface.co/papers/2311.17982), but from 0 for
    none and with CLIP's features in place of DINO's. `motion` is the reward of that name.

    Args:
        features: (N, F, D) of the frames, of unit norm.
    """
    if videos.dim() == 4 or videos.shape[1] == 1:
        return {}
    with_previous = (features[:, 1:] * features[:, :-1]).sum(2)
    with_first = (features[:, 1:] * features[:, :1]).sum(2)
    return {
        "flicker": (videos[:, 1:] - videos[:, :-1]).abs().flatten(1).mean(1),
        "motion": motion(videos, [""] * len(videos)),
        "subject_consistency": ((with_previous + with_first) / 2).mean(1),
    }


def diversity(features, prompts):
    """Mean distance between two images of the same prompt.

    The mean over pairs is taken per prompt, then averaged over the prompts that have at least two images.

    Args:
        features: (N, D) of unit norm.
        prompts: N strings.

    Returns:
        A float; NaN if no prompt has two images.
    """
    means = []
    for prompt in dict.fromkeys(prompts):
        same_prompt = features[[i for i, other in enumerate(prompts) if other == prompt]]
        if len(same_prompt) > 1:
            pairs = torch.triu_indices(len(same_prompt), len(same_prompt), offset=1)
            means.append((1 - (same_prompt @ same_prompt.T)[pairs[0], pairs[1]]).mean())
    return torch.stack(means).mean().item() if means else float("nan")


def drift(base, tuned):
    """Distance (N,) of each image from the base model's image with the same prompt and seed.

    Args:
        base, tuned: features (N, D) of unit norm.
    """
    return (1 - (base * tuned).sum(1)).clamp(min=0)


def frechet_distance(first, second):
    r"""Frechet distance of two sets of features, (N, D) and (M, D) (huggingface.co/papers/1706.08500).

    It is the distance of the Gaussians with the sets' means m and covariances S:

        ||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2))

    The estimate is biased upwards for small sets, so compare only sets of equal sizes.
    """
    first, second = first.double(), second.double()
    values, vectors = torch.linalg.eigh(torch.cov(first.T))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.cov(second.T) @ root).clamp(min=0).sqrt().sum()
    spread = first.var(0).sum() + second.var(0).sum()
    return max(((first.mean(0) - second.mean(0)).square().sum() + spread - 2 * cross).item(), 0.0)
