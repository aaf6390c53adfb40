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
"""Gradient estimators: each is a schedule for `backward_sweep`, namely gamma_k for every step and where to stop.

The steps are numbered as in the sweep: k = 1 is the last one of the chain, the one that ends in the picture.
"""

import random
from typing import NamedTuple

import torch


class Schedule(NamedTuple):
    """`mixing[k]` = gamma_k for k = 1..T (index 0 is ignored) and the last step `stop_after` that is swept."""

    mixing: list
    stop_after: int


def full_bp(num_steps):
    """Backpropagation through the whole chain: gamma_k = 1, k = 1..T. Unbiased; needs a differentiable reward."""
    return Schedule([1.0] * (num_steps + 1), num_steps)


def truncated_bp(num_steps, truncation_steps):
    """Backpropagation through the last K steps only: gamma_k = 1, k = 1..K, the rest dropped, which biases it.

    DRaFT-K (huggingface.co/papers/2309.17400); K = 1 is also ReFL's choice.
    """
    return Schedule([1.0] * (num_steps + 1), min(truncation_steps, num_steps))


def alignprop(num_steps):
    """Truncated backpropagation with a new K ~ U{1..T} at every call, from Python's global generator. Biased.

    AlignProp (huggingface.co/papers/2310.03739).
    """
    return truncated_bp(num_steps, random.randint(1, num_steps))


def ddpo(num_steps):
    """The likelihood ratio at every step: gamma_k = 0, k = 1..T; the reward needs no gradient.

    REINFORCE along the chain. DDPO (huggingface.co/papers/2305.13301) takes it with normalised advantages and PPO's
    clipped ratio: see `policy_gradient.ClippedRatio` and `baselines.normalize`.
    """
    return Schedule([0.0] * (num_steps + 1), num_steps)


def rlr(num_steps, mixing, differentiable):
    """Every step mixes both unbiased cotangents: gamma_1 = 1 if the reward has a gradient, else 0; gamma_k, k >= 2.

    The chain's first-, half- and zeroth-order estimates of RLR (huggingface.co/papers/2502.00639) in one sweep, where
    gamma_k decides how much each step takes of them.

    Args:
        mixing: one gamma for all k >= 2, or the `AdaptiveMixing` that chooses them.
        differentiable: whether any part of the reward has a gradient.
    """
    gammas = mixing.gammas() if isinstance(mixing, AdaptiveMixing) else [mixing] * (num_steps + 1)
    gammas[1] = float(differentiable)
    return Schedule(gammas, num_steps)


class AdaptiveMixing:
    r"""gamma_k by inverse variance of the two cotangents (total propagation, huggingface.co/papers/1902.01240).

        gamma_k = v^L_k / (v^L_k + v^P_k)

    with v running means of the batch mean of ||c||^2 of each cotangent. They come from earlier batches only: a gamma
    that depends on the sample it weighs would bias the estimate.

    Args:
        num_steps: T.
        decay: weight of the past in the running means.
        initial: gamma_k before the first batch.
    """

    def __init__(self, num_steps, decay=0.7, initial=0.9):
        self.num_steps = num_steps
        self.decay = decay
        self.initial = initial
        self.squares = None

    def gammas(self):
        """gamma_k for k = 0..T as a list; index 0 means nothing."""
        if self.squares is None:
            return [self.initial] * (self.num_steps + 1)
        pathwise, likelihood_ratio = self.squares
        # Where both are zero (every reward the same) or one is missing, neither is preferred.
        gammas = likelihood_ratio / (likelihood_ratio + pathwise)
        return torch.nan_to_num(gammas, nan=self.initial).tolist()

    def update(self, squares):
        """Take in the statistics of a batch: a `SweepStatistics`, or its two rows as a tensor (2, T + 1)."""
        squares = torch.stack(list(squares)).detach().double().cpu()
        self.squares = squares if self.squares is None else self.decay * self.squares + (1 - self.decay) * squares

    def state_dict(self):
        """JSON-ready; `None` stands for a cotangent that was not there."""
        if self.squares is None:
            return {"squares": None}
        return {"squares": [[None if v != v else v for v in row] for row in self.squares.tolist()]}

    def load_state_dict(self, state):
        rows = state["squares"]
        if rows is not None:
            rows = torch.tensor([[float("nan") if v is None else v for v in row] for row in rows], dtype=torch.float64)
            if rows.shape != (2, self.num_steps + 1):
                raise ValueError(
                    f"the checkpoint's mixing statistics are for {rows.shape[1] - 1} inference steps, not {self.num_steps}"
                )
        self.squares = rows
