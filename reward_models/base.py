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
"""The interface of a reward, and the code that several rewards share.

A reward is a callable `reward(images, prompts) -> scores` with a boolean attribute `differentiable`:

    images     (B, 3, H, W), RGB in [0, 1]
    prompts    B strings; image i is scored with prompt i
    scores     (B,), higher is better; differentiable with respect to `images` if `reward.differentiable` is true
"""

from typing import NamedTuple, Optional

import torch


def check_batch(images, prompts):
    """Check the input of a reward.

    Raises:
        ValueError: if the images are not (B, 3, H, W) in [0, 1], or there is not exactly one prompt per image.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} are not (B, 3, H, W)")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images with {len(prompts)} prompts: give one prompt per image")
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], but their values range from {low:.4g} to {high:.4g}")


class ScoreHead(torch.nn.Module):
    """The head of LAION's aesthetic predictor and of ImageReward: embeddings (B, width) -> scores (B,).

    Its linear layers have no activations between them, so the head is an affine map. Dropout acts in training only.
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
    """Scores of a batch under a weighted sum of rewards. All tensors are detached.

    Attributes:
        differentiable: (B,), weighted sum of the differentiable members; zero if there are none.
        black_box: (B,), weighted sum of the other members; zero if there are none.
        members: unweighted score (B,) of each member, by name.
        gradient: (B, 3, H, W), gradient of the sum of `differentiable` with respect to the images, or `None` if it was
            not requested.
    """

    differentiable: torch.Tensor
    black_box: torch.Tensor
    members: dict
    gradient: Optional[torch.Tensor]

    @property
    def total(self):
        """(B,), the weighted sum of all members."""
        return self.differentiable + self.black_box


class WeightedSum:
    """The weighted sum R = sum_m w_m R_m of rewards. Differentiable and black-box members are summed separately.

    Args:
        members: `{name: (weight, reward)}`.
        batch_size: number of images that a reward scores, and differentiates, at a time. Default: all. It changes the
            memory use only.
    """

    def __init__(self, members, batch_size=None):
        self.members = members
        self.batch_size = batch_size

    @property
    def differentiable(self):
        """Whether all members are differentiable."""
        return all(reward.differentiable for _, reward in self.members.values())

    @property
    def has_gradient(self):
        """Whether at least one member is differentiable."""
        return any(reward.differentiable for _, reward in self.members.values())

    @property
    def modules(self):
        """The members with parameters, for example to move them between devices."""
        modules = [reward for _, reward in self.members.values() if isinstance(reward, torch.nn.Module)]
        return [module for module in modules if next(module.parameters(), None) is not None]

    def __call__(self, images, prompts, with_gradient=False, device=None):
        """Score images (B, 3, H, W) in [0, 1] with B prompts.

        At any time there is the graph of only one reward on `batch_size` images.

        Args:
            with_gradient: also compute `Scores.gradient`.
            device: move the images to this device, `batch_size` at a time.

        Returns:
            `Scores`.

        Raises:
            ValueError: if a member does not return B finite numbers. The message names the member, and the prompt of
                a score that is not finite.
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
            problem = find_problem(result, prompts)
            if problem is not None:
                raise ValueError(f"reward {name!r} {problem}")
            if backward and result.requires_grad:  # otherwise the score is a constant, with gradient zero
                gradient += weight * getattr(reward, "gradient", score_gradient)(result, images)
            scores[name] = result.detach().float().to(images.device)
            sums[reward.differentiable] = sums[reward.differentiable] + weight * scores[name]
        return Scores(sums[True], sums[False], scores, gradient)


def score_gradient(scores, images):
    """The gradient (B, 3, H, W) of the sum of scores (B,) with respect to the images."""
    return torch.autograd.grad(scores.sum(), images, materialize_grads=True)[0]


def find_problem(scores, prompts):
    """Describe why `scores` is not a tensor with one finite float32 number per prompt. Returns `None` if it is one.

    The tensor may be on any device and of any real type.
    """
    if not isinstance(scores, torch.Tensor):
        return f"returned a {type(scores).__name__} instead of a tensor of shape ({len(prompts)},)"
    if scores.shape != (len(prompts),):
        return f"returned a tensor of shape {tuple(scores.shape)} instead of ({len(prompts)},)"
    if scores.is_meta:
        return "returned a tensor on the device 'meta', which has no numbers"
    if scores.is_complex():
        return f"returned complex numbers ({scores.dtype}) instead of real ones"
    values = scores.detach().float()
    bad = ~torch.isfinite(values)
    if bad.any():
        i = bad.nonzero()[0].item()
        return f"returned {values[i].item()} for prompt {prompts[i][:80]!r}"
    return None
