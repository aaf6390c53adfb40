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

import math
import random
from typing import NamedTuple, Optional

import torch


# The last steps of a chain, whose Jacobians are far from multiples of the identity; all others inherit their cotangent.
ALWAYS_SWEPT = 3


class Schedule(NamedTuple):
    """What a sweep is to do.

    Attributes:
        mixing: gamma_k for k = 1..T (index 0 is ignored), `None` where a step is left out.
        stop_after: the last step that is swept.
        perturbed: the steps whose weights are perturbed in the rollout, see `zeroth_order.WeightPerturbation`.
        transport: lambda_k for k = 1..T, see `backward_sweep`; `None` for 1 throughout.
        fraction: p in (0, 1], the probability with which a step beyond `ALWAYS_SWEPT` is swept.
    """

    mixing: list
    stop_after: int
    perturbed: tuple = ()
    transport: Optional[list] = None
    fraction: float = 1.0

    @property
    def swept(self):
        """The steps that are swept, in the sweep's order."""
        return [k for k in range(1, self.stop_after + 1) if self.mixing[k] is not None]

    @property
    def probabilities(self):
        """{k: p_k, with which the step is swept}, in the sweep's order."""
        return {k: 1.0 if k <= ALWAYS_SWEPT else self.fraction for k in self.swept}

    @property
    def expected_steps(self):
        """How many steps are swept, in the mean of the draws."""
        return sum(self.probabilities.values())

    def draw_weights(self):
        """[w_k] for `backward_sweep`, each step on its own: 1 / p_k with probability p_k, else 0, from Python's global
        generator; 1 where nothing is drawn, as at index 0."""
        weights = [1.0] * len(self.mixing)
        for k, p in self.probabilities.items():
            if p < 1:
                weights[k] = 1 / p if random.random() < p else 0.0
        return weights


def full_bp(num_steps):
    """Backpropagation through the whole chain: gamma_k = 1, k = 1..T. Unbiased; needs a differentiable reward.

    DRaFT (huggingface.co/papers/2309.17400) with K = T.
    """
    return Schedule([1.0] * (num_steps + 1), num_steps)


def truncated_bp(num_steps, truncation_steps):
    """Backpropagation through the last K steps only: gamma_k = 1, k = 1..K, the rest dropped, which biases it.

    DRaFT-K (huggingface.co/papers/2309.17400).
    """
    return Schedule([1.0] * (num_steps + 1), truncation_steps)


def draft_lv(num_steps):
    """The last step only, as `truncated_bp` with K = 1, for each of several re-noisings of the same picture. Biased.

    DRaFT-LV (huggingface.co/papers/2309.17400); the re-noisings are `rollout.renoise`, and their gradients averaged.
    """
    return truncated_bp(num_steps, 1)


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
    r"""Every step mixes both unbiased cotangents; the default of this project.

        c_{k-1} = gamma_k c^P_{k-1} + (1 - gamma_k) A z_k / sigma_k,        gamma_1 = 1 or 0

    gamma_1 = 1 if any part of the reward has a gradient (the parts without enter through `likelihood_ratio`, see
    there), else 0. Between them lie the first- and half-order estimates of RLR (huggingface.co/papers/2502.00639).

    Args:
        mixing: one gamma for all k >= 2, or the `AdaptiveMixing` that chooses them.
        differentiable: whether any part of the reward has a gradient.
    """
    gammas = mixing.gammas(differentiable) if isinstance(mixing, AdaptiveMixing) else [mixing] * (num_steps + 1)
    gammas[1] = float(differentiable)
    return Schedule(gammas, num_steps)


def rlr_paper(num_steps, start, length, rest, differentiable=True):
    r"""Equation 6 of RLR (huggingface.co/papers/2502.00639): one first-order step, one sub-chain, a rest.

        G = D mu_1^T dR/dx_0                                    first order, k = 1
          + A D mu_{j:j+h}^T z_j / sigma_j                      half order, k = j..j+h-1
          + sum over the other k of  A eps_k / s                zeroth order, or A D mu_k^T z_k / sigma_k

    The sub-chain takes the likelihood ratio of the noise that its last executed step j injects, and backpropagates it
    through its h steps. Unbiased for every j (with `rest="zeroth_order"` for the reward under perturbed weights, which
    is off by O(s^2)), except with `rest="none"`, which drops the other steps.

    Args:
        start: j in 2..T - h + 1.
        length: h; 0 leaves the sub-chain to the rest.
        rest: "zeroth_order", "likelihood_ratio" or "none".
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
        half_order_memory, zeroth_order_memory: B_h and B_z, what a step of either kind takes.
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
        # A step that has not been seen yet stands at the mean.
        return torch.tensor([1.0 if n is None else n / mean for n in norms], dtype=torch.float64).softmax(0).tolist()

    def draw(self):
        """j, from Python's global generator."""
        return random.choices(range(self.low, self.high + 1), self.probabilities())[0]

    def update(self, statistics):
        """Take in the `SweepStatistics` of a batch, with gradient norms."""
        for k, norm in enumerate(statistics.gradient_norm.tolist()):
            if norm == norm:
                old = self.norms[k]
                self.norms[k] = norm if old is None else self.decay * old + (1 - self.decay) * norm

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state):
        self.norms = state["norms"]


class AdaptiveMixing:
    r"""gamma_k of least variance, from what earlier batches have shown of the two cotangents.

    v^P_k and v^L_k are running means of the variance of each cotangent, see `SweepStatistics`. They come from earlier
    batches only: a gamma that depends on the sample it weighs would bias the estimate.

    A black box's cotangents are fresh noise at every step, and each step is weighed by itself, by inverse variance
    (total propagation, huggingface.co/papers/1902.01240):

        gamma_k = v^L_k / (v^L_k + v^P_k)

    With a gradient all pathwise cotangents descend from the one dR/dx_0, so its error adds up along the sweep, T-fold
    in the sum of the steps where fresh noise adds up sqrt(T)-fold. The gamma_k minimise the variance of that sum,
    sum_k c_{k-1}, as if the Jacobians passed cotangents on unchanged. With V_k the variance of the cotangent that
    reaches step k, C_k its covariance with the sum so far, and W_k the weight of c_{k-1} in the whole sum,

        gamma_k = (v^L_k - C_k / W_k) / (v^L_k + V_k),        W_k = 1 + gamma_{k+1} W_{k+1}

    cut to [0, 1]; V_2 = C_2 = v^P_1. Inverse variance is the case C = 0, and leans on a rough gradient too long.

    Of what is not known yet, such as everything before the first batch, the gradient is preferred if there is one: noise in
    the first step of all would stay in Adam's second moments for a thousand more. A black box starts with each step's own
    noise, not with what the small one of the last step hands on. Neither share is nothing, or a cotangent that nobody asks
    for would stay unknown.

    Args:
        num_steps: T.
        decay: weight of the past in the running means.
    """

    trifle = 1e-3

    def __init__(self, num_steps, decay=0.7):
        self.num_steps = num_steps
        self.decay = decay
        self.squares = None

    def gammas(self, differentiable):
        """gamma_k for k = 0..T as a list; index 0 means nothing, and index 1 is the schedule's to set."""
        unknown = 1 - self.trifle if differentiable else self.trifle
        if self.squares is None:
            return [unknown] * (self.num_steps + 1)
        pathwise, likelihood_ratio = self.squares
        # One is missing where every score was the same, or where nobody has asked for it.
        gammas = torch.nan_to_num(likelihood_ratio / (likelihood_ratio + pathwise), nan=unknown).tolist()
        if not differentiable or not pathwise[1] > 0:
            return gammas
        fresh = likelihood_ratio.tolist()
        # W looks ahead and V, C look back: a few rounds settle them.
        for _ in range(50):
            weights = [1.0] * (self.num_steps + 1)
            for k in range(self.num_steps - 1, 0, -1):
                weights[k] = 1 + gammas[k + 1] * weights[k + 1]
            carried = covariance = pathwise[1].item()
            for k in range(2, self.num_steps + 1):
                if fresh[k] == fresh[k]:
                    gammas[k] = min(max((fresh[k] - covariance / weights[k]) / (fresh[k] + carried), 0.0), 1.0)
                else:
                    # A step without a likelihood ratio has no noise; of one that has overflowed nothing is known.
                    gammas[k] = 1.0 if pathwise[k] == pathwise[k] else unknown
                carried *= gammas[k] ** 2
                if gammas[k] < 1 and fresh[k] == fresh[k]:
                    carried += (1 - gammas[k]) ** 2 * fresh[k]
                covariance = gammas[k] * covariance + carried
        return gammas

    def update(self, statistics):
        """Take in the `SweepStatistics` of a batch."""
        # Where all scores of a batch are the same there is no likelihood ratio to see, rather than one without noise.
        likelihood_ratio = torch.where(statistics.likelihood_ratio > 0, statistics.likelihood_ratio, float("nan"))
        squares = torch.stack([statistics.pathwise, likelihood_ratio]).cpu().double()
        if self.squares is None:
            self.squares = torch.full_like(squares, float("nan"))
        # What a batch did not see, or saw overflow, leaves the mean as it is; what is seen first starts it.
        old = torch.where(self.squares.isfinite(), self.squares, squares)
        self.squares = torch.where(squares.isfinite(), self.decay * old + (1 - self.decay) * squares, self.squares)

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


class Transport:
    r"""lambda_k, how a step passes a cotangent on in the mean: what the sweep takes where it does not compute that.

        lambda_k = running mean of  <c_{k-1}, c^P_k> / <c_{k-1}, c_{k-1}>

    from earlier batches only, see `backward_sweep`; 1 before the first.

    Args:
        num_steps: T.
        decay: weight of the past in the running means.
    """

    def __init__(self, num_steps, decay=0.7):
        self.decay = decay
        self.gains = [1.0] * (num_steps + 1)

    def update(self, statistics):
        """Take in the `SweepStatistics` of a batch."""
        for k, gain in enumerate(statistics.gain.tolist()):
            if math.isfinite(gain):
                self.gains[k] = self.decay * self.gains[k] + (1 - self.decay) * gain

    def state_dict(self):
        return {"gains": self.gains}

    def load_state_dict(self, state):
        self.gains = state["gains"]
