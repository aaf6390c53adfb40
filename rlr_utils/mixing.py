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
"""What earlier batches tell about the next one's schedule: gamma_k of least variance, and how steps pass cotangents on."""

import math

import torch


def check_steps(kind, found, expected):
    """Raise ValueError where the statistics of a checkpoint, lists of T + 1, are of another number of steps."""
    if found != expected:
        raise ValueError(f"the checkpoint's {kind} statistics are for {found - 1} inference steps, not {expected - 1}")


class AdaptiveMixing:
    r"""gamma_k of least variance, from the variances that earlier batches have shown of the two cotangents.

    v^P_k and v^L_k are running means of the variance of each cotangent, see `SweepStatistics`. They come from earlier
    batches only: a gamma that depends on the sample that it weighs would bias the estimate.

    A black box's cotangents are fresh noise at every step, and each step is weighed by itself, by inverse variance
    (total propagation, huggingface.co/papers/1902.01240):

        gamma_k = v^L_k / (v^L_k + v^P_k)

    With a gradient all pathwise cotangents descend from the one dR/dx_0, so its error adds up along the sweep, T-fold in
    the sum over the steps, where fresh noise adds up sqrt(T)-fold. The gamma_k minimise the variance of that sum,
    sum_k c_{k-1}, as if the Jacobians passed cotangents on unchanged. With V_k the variance of the cotangent that reaches
    step k, C_k its covariance with the sum so far, and W_k the weight of c_{k-1} in the whole sum,

        gamma_k = (v^L_k - C_k / W_k) / (v^L_k + V_k),        W_k = 1 + gamma_{k+1} W_{k+1}

    clipped to [0, 1]; V_2 = C_2 = v^P_1. Inverse variance is the case C = 0, and trusts a rough gradient too long.

    Where nothing is known yet, such as before the first batch, the gradient is preferred if there is one: noise in the
    first step would stay in Adam's second moments for a thousand more. A black box starts with each step's own noise. Both
    cotangents keep a share of at least .001, or the unused one would stay unknown.

    Args:
        num_steps: T.
        decay: weight of the past in the running means.
    """

    smallest_share = 1e-3

    def __init__(self, num_steps, decay=0.7):
        self.num_steps = num_steps
        self.decay = decay
        self.squares = None

    def gammas(self, differentiable):
        """gamma_k for k = 0..T as a list; indices 0 and 1 mean nothing, the schedule sets the latter."""
        unknown = 1 - self.smallest_share if differentiable else self.smallest_share
        if self.squares is None:
            return [unknown] * (self.num_steps + 1)
        pathwise, likelihood_ratio = self.squares
        # One is missing where every score was the same, or where no schedule has asked for it.
        gammas = torch.nan_to_num(likelihood_ratio / (likelihood_ratio + pathwise), nan=unknown).tolist()
        if not differentiable or not pathwise[1] > 0:
            return gammas
        # W depends on later gammas, V and C on earlier ones: a few rounds settle them.
        for _ in range(50):
            self._round(gammas, unknown)
        return gammas

    def _round(self, gammas, unknown):
        """One pass over the steps that updates the gammas in place."""
        pathwise, fresh = self.squares[0], self.squares[1].tolist()
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

    def update(self, statistics):
        """Take in the `SweepStatistics` of a batch."""
        # Where all scores of a batch are the same there is no likelihood ratio to see, rather than one without noise.
        likelihood_ratio = torch.where(statistics.likelihood_ratio > 0, statistics.likelihood_ratio, float("nan"))
        squares = torch.stack([statistics.pathwise, likelihood_ratio]).cpu().double()
        if self.squares is None:
            self.squares = torch.full_like(squares, float("nan"))
        # A batch that has not seen a step, or has seen it overflow, leaves its mean unchanged.
        old = torch.where(self.squares.isfinite(), self.squares, squares)
        self.squares = torch.where(squares.isfinite(), self.decay * old + (1 - self.decay) * squares, self.squares)

    def state_dict(self):
        """JSON-ready; `None` stands for a cotangent that was not there."""
        if self.squares is None:
            return {"squares": None}
        return {"squares": [[None if v != v else v for v in row] for row in self.squares.tolist()]}

    def load_state_dict(self, state):
        """Raises ValueError for statistics of another number of steps."""
        rows = state["squares"]
        if rows is not None:
            rows = torch.tensor([[float("nan") if v is None else v for v in row] for row in rows], dtype=torch.float64)
            check_steps("mixing", rows.shape[1], self.num_steps + 1)
        self.squares = rows


class Transport:
    r"""lambda_k, how a step passes a cotangent on in the mean: what the sweep uses where it does not compute the step.

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
        return {"gains": list(self.gains)}

    def load_state_dict(self, state):
        """Raises ValueError for statistics of another number of steps."""
        check_steps("transport", len(state["gains"]), len(self.gains))
        self.gains = list(state["gains"])
