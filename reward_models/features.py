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
"""How far sets of pictures are from each other, in the embeddings of a CLIP: diversity, drift, Frechet distance.

No reward: nothing here is to be raised. All distances of pictures are 1 - cosine, from 0 (the same) to 2.
"""

import os

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from .clip import CLIP_ID, image_embeds
from .loading import existing_file, load_pretrained


class ClipFeatures(torch.nn.Module):
    """The embedding of pictures under a CLIPModel."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    @torch.no_grad()
    def forward(self, images, batch_size=8):
        """Images (N, 3, H, W) in [0, 1] -> (N, D) of unit norm, on the CPU."""
        device = self.clip.device
        parts = [image_embeds(self.clip, part.to(device)).cpu() for part in images.split(batch_size)]
        return F.normalize(torch.cat(parts), dim=1)


def load_features(path=None, device="cpu"):
    """`ClipFeatures` of CLIP ViT-L/14 from the Hub, or of the CLIPModel of a folder.

    Raises:
        ValueError: if it cannot be loaded.
    """
    source = CLIP_ID if path is None else os.path.dirname(existing_file(path, "config.json"))
    clip = load_pretrained(CLIPModel, source, dtype=torch.float32)
    clip.text_model = clip.text_projection = None  # never looked at
    return ClipFeatures(clip).to(device).eval().requires_grad_(False)


def diversity(features, prompts):
    """Mean distance between two pictures of the same prompt, over the prompts that have at least two; NaN if none has.

    Args:
        features: (N, D) of unit norm.
        prompts: N strings.
    """
    means = []
    for prompt in dict.fromkeys(prompts):
        own = features[[i for i, other in enumerate(prompts) if other == prompt]]
        if len(own) > 1:
            pairs = torch.triu_indices(len(own), len(own), offset=1)
            means.append((1 - (own @ own.T)[pairs[0], pairs[1]]).mean())
    return torch.stack(means).mean().item() if means else float("nan")


def drift(base, tuned):
    """Distance of each picture from the base model's of the same prompt and seed, (N, D) and (N, D) -> (N,)."""
    return (1 - (base * tuned).sum(1)).clamp(min=0)


def frechet_distance(first, second):
    r"""Distance of the Gaussians that fit two sets of features (N, D) and (M, D) (huggingface.co/papers/1706.08500).

        ||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2))

    It shrinks as the sets grow: compare only sets of the same sizes.
    """
    first, second = first.double(), second.double()
    values, vectors = torch.linalg.eigh(torch.cov(first.T))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.cov(second.T) @ root).clamp(min=0).sqrt().sum()
    spread = first.var(0).sum() + second.var(0).sum()
    return max(((first.mean(0) - second.mean(0)).square().sum() + spread - 2 * cross).item(), 0.0)
