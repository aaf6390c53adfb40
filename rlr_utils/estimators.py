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
"""Gradient estimators: each is a function that returns a `Schedule` for `backward_sweep`.

Steps are numbered as in the sweep: k = 1 is the last one of the chain, the one that ends in the image.
"""

import random

import torch

from .mixing import AdaptiveMixing, check_steps
from .sweep import Schedule


def full_bp(num_steps):
    """Backpropagation through the whole chain: gamma_k = 1, k = 1..T. Unbiased; needs a differentiable reward.

    DRaFT (huggingface.co/papers/2309.17400) with K = T.
    """
    return Schedule([1.0] * (num_steps + 1), num_steps)


def truncated_bp(num_steps, truncation_steps):
    """Backpropagation through the last K steps only: gamma_k = 1, k = 1..K. Biased, since the other steps are dropped.

    DRaFT-K (huggingface.co/papers/2309.17400).
    """
    return Schedule([1.0] * (num_steps + 1), truncation_steps)


def draft_lv(num_steps):
    """The last step only, as `truncated_bp` with K = 1, averaged over several re-noisings of the same image. Biased.

    DRaFT-LV (huggingface.co/papers/2309.17400); `rollout.renoise` makes the re-noisings.
    """
    return truncated_bp(num_steps, 1)


def alignprop(num_steps, rng=random):
    """Truncated backpropagation with a new K ~ U{1..T} at every call. Biased.

    AlignProp (huggingface.co/papers/2310.03739).

    Args:
        num_steps: T.
        rng: a `random.Random`, or Python's global generator.
    """
    return truncated_bp(num_steps, rng.randint(1, num_steps))


def ddpo(num_steps):
    """The likelihood ratio at every step: gamma_k = 0, k = 1..T; the reward needs no gradient.

    REINFORCE along the chain. DDPO (huggingface.co/papers/2305.13301) uses it with normalised advantages and PPO's
    clipped ratio: see `baselines.normalize` and `policy_gradient.ClippedRatio`.
    """
    return Schedule([0.0] * (num_steps + 1), num_steps)


def rlr(num_steps, mixing, differentiable):
    r"""Every step mixes both unbiased cotangents; the default of this project.

        c_{k-1} = gamma_k c^P_{k-1} + (1 - gamma_k) A z_k / sigma_k,        gamma_1 = 1 or 0

    gamma_1 = 1 if any part of the reward has a gradient (`likelihood_ratio` says how the other parts enter), else 0. The
    first- and half-order estimates of RLR (huggingface.co/papers/2502.00639) are the cases gamma = 1 and gamma in {0, 1}.

    Args:
        num_steps: T.
        mixing: one gamma for all k >= 2, or the `AdaptiveMixing` that chooses them.
        differentiable: whether any part of the reward has a gradient.
    """
    gammas = mixing.gammas(differentiable) if isinstance(mixing, AdaptiveMixing) else [mixing] * (num_steps + 1)
    gammas[1] = float(differentiable)
    return Schedule(gammas, num_steps)


def rlr_paper(num_steps, start, length, rest, differentiable=True):
    r"""Equation 6 of RLR (huggingface.co/papers/2502.00639): one first-order step, one sub-chain, and the other steps.

        G = D mu_1^T dR/dx_0                                    first order, k = 1
          + A D mu_{j:j+h}^T z_j / sigma_j                      half order, k = j..j+h-1
          + sum over the other k of  A eps_k / s                zeroth order, or A D mu_k^T z_k / sigma_k

    The sub-chain takes the likelihood ratio of the noise that its last executed step j injects, and backpropagates it
    through its h steps. Unbiased for every j, except with `rest="none"`, which drops the other steps; with
    `rest="zeroth_order"` for the reward under perturbed weights, which differs by O(s^2).

    Args:
        num_steps: T.
        start: j in 2..T - h + 1.
        length: h; 0 for no sub-chain.
        rest: "zeroth_order", "likelihood_ratio" or "none", for the other steps.
        differentiable: whether any part of the reward has a gradient; without one k = 1 takes the likelihood ratio.
    """
    other = 0.0 if rest == "likelihood_ratio" else None
    mixing = [other, float(differentiable)] + [other] * (num_steps - 1)
    subchain = range(start, start + length)
    for k in subchain:
        mixing[k] = 0.0 if k == start else 1.0
    perturbed = [k for k in range(2, num_steps + 1) if k not in subchain] if rest == "zeroth_order" else []
    return Schedule(mixing, num_steps, tuple(perturbed))


def subchain_length(num_steps, budget, half_order_memory, zeroth_order_memory, variance_ratio=0.0):
    r"""The length of the sub-chain by equation 8 of RLR (huggingface.co/papers/2502.00639).

        h = min( floor((B - B_z (T - 1)) / (B_h - B_z)),  floor(T V_z / (2 (V_z - V_h)) - 1) )

    Args:
        num_steps: T.
        budget: B, the memory to spend, in the unit of the next two.
        half_order_memory, zeroth_order_memory: B_h and B_z, what a step of each kind takes; 8 and .24 GB in the paper.
        variance_ratio: V_h / V_z < 1; the paper's half order has far less variance than its zeroth.

    Raises:
        ValueError: if the budget does not hold a sub-chain of length 1.
    """
    by_memory = int((budget - zeroth_order_memory * (num_steps - 1)) // (half_order_memory - zeroth_order_memory))
    by_variance = int(num_steps / (2 * (1 - variance_ratio)) - 1)
    if by_memory < 1:
        needed = half_order_memory + zeroth_order_memory * (num_steps - 2)
        raise ValueError(
            f"a memory budget of {budget} GB holds no sub-chain in {num_steps} steps, {needed:.2f} GB would"
        )
    return max(1, min(by_memory, by_variance))


class SubchainSampler:
    """Where the sub-chain of `rlr_paper` starts: uniformly, or by the softmax of the steps' running gradient norms.

    The norms are divided by their mean first, so that the softmax does not depend on the scale of the reward.

    Args:
        num_steps, length: T and h.
        low, high: the range of starts, both included; default 2..T - h + 1.
        by_gradient_norm: `False` for uniform.
        decay: weight of the past in the running means.

    Raises:
        ValueError: if the range is empty or reaches out of the chain.
    """

    def __init__(self, num_steps, length, low=None, high=None, by_gradient_norm=False, decay=0.7):
        last = num_steps - length + 1 if length > 0 else max(num_steps, 2)
        low, high = 2 if low is None else low, last if high is None else high
        if not 2 <= low <= high <= last:
            raise ValueError(
                f"a sub-chain of {length} of {num_steps} steps may start at 2..{last} from the end, not at {low}..{high}"
            )
        self.low, self.high = low, high
        self.by_gradient_norm = by_gradient_norm
        self.decay = decay
        self.norms = [None] * (num_steps + 1)

    def probabilities(self):
        """p_j for j = low..high."""
        norms = self.norms[self.low : self.high + 1]
        known = [norm for norm in norms if norm is not None]
        mean = sum(known) / len(known) if known else 0.0
        if not self.by_gradient_norm or mean == 0:
            return [1 / len(norms)] * len(norms)
        # A step that has not been seen yet counts as the mean.
        return torch.tensor([1.0 if n is None else n / mean for n in norms], dtype=torch.float64).softmax(0).tolist()

    def draw(self, rng=random):
        """j, drawn from a `random.Random`, or from Python's global generator."""
        return rng.choices(range(self.low, self.high + 1), self.probabilities())[0]

    def update(self, statistics):
        """Take in the `SweepStatistics` of a batch, with gradient norms."""
        norms = statistics.gradient_norm
        for k in norms.isfinite().nonzero().flatten().tolist():
            norm, old = norms[k].item(), self.norms[k]
            self.norms[k] = norm if old is None else self.decay * old + (1 - self.decay) * norm

    def state_dict(self):
        return {"norms": list(self.norms)}

    def load_state_dict(self, state):
        """Raises ValueError for statistics of another number of steps."""
        check_steps("sub-chain", len(state["norms"]), len(self.norms))
        self.norms = list(state["norms"])
