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
"""What every reward is, and what the rewards share.

A reward is a callable `reward(images, prompts) -> (B,) tensor` with an attribute `differentiable`:

    images     (B, 3, H, W), RGB in [0, 1]
    prompts    B strings; image i is scored with prompt i
    result     (B,), higher is better; with a graph back to `images` if `reward.differentiable`
"""

from typing import NamedTuple, Optional

import torch


def check_batch(images, prompts):
    """Refuse what no reward can score.

    Raises:
        ValueError: for images of another shape or outside of [0, 1], and for another number of prompts than images.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} are not (B, 3, H, W)")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images with {len(prompts)} prompts: give one prompt per image")
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], these have values from {low:.4g} to {high:.4g}")


class ScoreHead(torch.nn.Module):
    """Embeddings (B, width) -> scores (B,): linear layers without activations, dropout only in training.

    The head of LAION's aesthetic predictor, which ImageReward has taken over.
    """

    def __init__(self, width):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            *(linear(width, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)),
            *(linear(64, 16), linear(16, 1)),
        )

    def forward(self, embeds):
        return self.layers(embeds).squeeze(-1)


class Scores(NamedTuple):
    """The scores of one batch under a weighted sum of rewards, all of them detached.

    Attributes:
        differentiable: (B,), the weighted sum of the members with a gradient, zero without such members.
        black_box: (B,), the weighted sum of the members without.
        members: each member's own unweighted score (B,), by name.
        gradient: (B, 3, H, W), that of the sum of `differentiable` with respect to the images, or `None`.
    """

    differentiable: torch.Tensor
    black_box: torch.Tensor
    members: dict
    gradient: Optional[torch.Tensor]

    @property
    def total(self):
        """(B,), the whole sum."""
        return self.differentiable + self.black_box


class WeightedSum:
    """sum_m w_m R_m, kept apart by whether the members have a gradient.

    Args:
        members: `{name: (weight, reward)}`.
        batch_size: images that a reward sees at a time, gradient included; default: all. A matter of memory only.
    """

    def __init__(self, members, batch_size=None):
        self.members = members
        self.batch_size = batch_size

    @property
    def differentiable(self):
        """Whether every member has a gradient."""
        return all(reward.differentiable for _, reward in self.members.values())

    @property
    def has_gradient(self):
        """Whether any member has one."""
        return any(reward.differentiable for _, reward in self.members.values())

    @property
    def modules(self):
        """The members with parameters, which can be moved between devices."""
        modules = [reward for _, reward in self.members.values() if isinstance(reward, torch.nn.Module)]
        return [module for module in modules if next(module.parameters(), None) is not None]

    def __call__(self, images, prompts, with_gradient=False, device=None):
        """Images (B, 3, H, W) in [0, 1] and B prompts -> `Scores`, with their gradient on demand.

        The graph of one reward on `batch_size` images is alive at a time, and with a `device` no more of the images are
        there.

        Raises:
            ValueError: if a member returns anything but B finite numbers, naming the member and the prompt.
        """
        size = self.batch_size or len(images)
        parts = [
            self._score(images[i : i + size].to(device=device), prompts[i : i + size], with_gradient)
            for i in range(0, len(images), size)
        ]
        return Scores(
            torch.cat([part.differentiable for part in parts]),
            torch.cat([part.black_box for part in parts]),
            {name: torch.cat([part.members[name] for part in parts]) for name in self.members},
            torch.cat([part.gradient for part in parts]) if with_gradient else None,
        )

    def _score(self, images, prompts, with_gradient):
        images = images.detach().requires_grad_(with_gradient)
        zero = torch.zeros(len(images), device=images.device)
        sums, scores = {True: zero, False: zero}, {}
        gradient = torch.zeros_like(images) if with_gradient else None
        for name, (weight, reward) in self.members.items():
            backward = with_gradient and reward.differentiable
            with torch.set_grad_enabled(backward):
                result = reward(images if backward else images.detach(), prompts)
            problem = problem_of(result, prompts)
            if problem is not None:
                raise ValueError(f"reward {name!r} {problem}")
            if backward and result.requires_grad:  # a score that does not depend on the images is a constant
                gradient += weight * torch.autograd.grad(result.sum(), images, materialize_grads=True)[0]
            scores[name] = result.detach().to(images.device).float()
            sums[reward.differentiable] = sums[reward.differentiable] + weight * scores[name]
        return Scores(sums[True], sums[False], scores, gradient)


def problem_of(scores, prompts):
    """What keeps `scores` from being a tensor of one finite number per prompt, or `None`."""
    if not isinstance(scores, torch.Tensor):
        return f"returned a {type(scores).__name__} instead of a tensor of shape ({len(prompts)},)"
    if scores.shape != (len(prompts),):
        return f"returned a tensor of shape {tuple(scores.shape)} instead of ({len(prompts)},)"
    bad = ~torch.isfinite(scores.detach())
    if bad.any():
        i = bad.nonzero()[0].item()
        return f"returned {scores[i].item()} for prompt {prompts[i]!r}"
    return None
