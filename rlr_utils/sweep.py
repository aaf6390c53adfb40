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
"""THE backward sweep: every gradient estimator of this project is this one function with another schedule."""

import random
from typing import NamedTuple, Optional

import torch


# The Jacobians of the last steps of a chain are far from multiples of the identity, and all steps inherit their cotangent.
ALWAYS_SWEPT = 3


class Schedule(NamedTuple):
    """What a sweep is to do.

    Attributes:
        mixing: gamma_k for k = 1..T (index 0 is ignored), `None` where a step is left out.
        stop_after: the last step that is swept.
        perturbed: the steps whose weights are perturbed in the rollout, see `zeroth_order.WeightPerturbation`.
        transport: lambda_k for k = 1..T, see `backward_sweep`; `None` for 1 at every step.
        fraction: p in (0, 1], the probability with which `draw` sweeps a step beyond `ALWAYS_SWEPT`.
        weights: w_k for k = 1..T, see `backward_sweep`; `None` for 1 at every step. `draw` sets them.
    """

    mixing: list
    stop_after: int
    perturbed: tuple = ()
    transport: Optional[list] = None
    fraction: float = 1.0
    weights: Optional[list] = None

    @property
    def swept(self):
        """The steps that can be swept, in the sweep's order."""
        return [k for k in range(1, self.stop_after + 1) if self.mixing[k] is not None]

    @property
    def probabilities(self):
        """{k: the probability p_k with which the step is swept}, in the sweep's order."""
        return {k: 1.0 if k <= ALWAYS_SWEPT else self.fraction for k in self.swept}

    @property
    def expected_steps(self):
        """How many steps are swept on average."""
        return sum(self.probabilities.values())

    def reaching(self, steps):
        """This schedule where only the network of some steps has parameters: without the steps whose cotangent reaches none.

        Args:
            steps: numbers of those that have; `None` for all.
        """
        if steps is None:
            return self
        mixing, reaches = list(self.mixing), False
        for k in range(len(mixing) - 1, 0, -1):
            # What a step passes on reaches the next one where that takes a pathwise cotangent.
            reaches = k in steps or reaches and bool(self.mixing[k + 1])
            mixing[k] = self.mixing[k] if reaches else None
        perturbed = tuple(k for k in self.perturbed if k in steps)
        return self._replace(mixing=mixing, stop_after=min(self.stop_after, max(steps)), perturbed=perturbed)

    def draw(self, rng=random):
        """This schedule with weights, each step's drawn independently: 1 / p_k with probability p_k, else 0.

        Args:
            rng: a `random.Random`, or Python's global generator.
        """
        weights = [1.0] * len(self.mixing)
        for k, p in self.probabilities.items():
            if p < 1:
                weights[k] = 1 / p if rng.random() < p else 0.0
        return self._replace(weights=weights)


# Of what a step changes, computed twice. What half precision does to it is smaller, what dropout does is larger.
LARGEST_DEVIATION = 0.05
ANOTHER_NETWORK = (
    "the network computes other means in backward than in rollout, so the gradient is wrong: turn off dropout and train(), and"
    " leave the weights as they are between the two"
)


class SweepStatistics(NamedTuple):
    """What a sweep saw at each step, (T + 1,) each; NaN where there was nothing to see.

    Attributes:
        pathwise, likelihood_ratio: variance of the two cotangents, ||c - mean of c||^2 summed over the batch and divided
            by B - 1, since what all images share is signal and not noise. For a single image ||c||^2.
        gradient_norm: norm of what the step added to the gradients of `parameters`, without the step's weight.
        gain: <c_{k-1}, c^P_k> / <c_{k-1}, c_{k-1}>, the share of a cotangent that the step passes on unchanged.
        deviation: of the mean from that of the rollout, ||mu - mu'|| / ||mu' - x_k||, of steps whose graph was not kept; 0 but
            for rounding, unless the network is another one, as with dropout.
    """

    pathwise: torch.Tensor
    likelihood_ratio: torch.Tensor
    gradient_norm: torch.Tensor
    gain: torch.Tensor
    deviation: torch.Tensor


def is_of_another_network(statistics):
    """Whether a sweep has computed other means than the rollout. Latents in half precision are too coarse to tell."""
    deviation = statistics.deviation
    return deviation.dtype in (torch.float32, torch.float64) and bool((deviation > LARGEST_DEVIATION).any())


def likelihood_ratio(chain, trajectory, k, advantages):
    """The likelihood-ratio cotangent of x_{k-1}: c^L = A z_k / sigma_k, (B, ...) from A, (B,) or (T + 1, B) by step.

    It is the score of the step's Gaussian at its mean, summed over dimensions, times the advantage. Where a reward
    R_d + R_b has a part R_b without a gradient, `dR_d/dx_0 + likelihood_ratio(chain, trajectory, 1, A_b)` is an unbiased
    stand-in for dR/dx_0.

    Raises:
        ValueError: if the step injects no noise.
    """
    if chain.sigma(k) == 0:
        raise ValueError(f"the likelihood ratio needs noise, but sigma({k}) is 0")
    noise = trajectory.noises[k]
    advantages = advantages if advantages.ndim == 1 else advantages[k]
    return advantages.view(-1, *[1] * (noise.ndim - 1)) * noise / chain.sigma(k)


def backward_sweep(
    chain,
    trajectory,
    mixing,
    *,
    reward_grad=None,
    advantages=None,
    stop_after=None,
    cotangent=None,
    penalty=None,
    parameters=None,
):
    r"""Add the gradient of -(mean over the batch of R) to `.grad` of the chain's parameters, in one pass k = 1..T.

    The sweep carries a cotangent for x_{k-1}. At each step mu_k is computed again at the stored x_k, and one
    vector-Jacobian product gives the step's share of the parameter gradient and the pathwise cotangent of the next step:

        c_{k-1}   = gamma_k c^P_{k-1} + (1 - gamma_k) A z_k / sigma_k
        grad     -= w_k J_theta(mu_k)^T c_{k-1} / B
        c^P_k     = lambda_k c_{k-1} + w_k ((d mu_k / d x_k)^T c_{k-1} - lambda_k c_{k-1}),        c^P_0 = dR/dx_0

    gamma = 1 is backpropagation, gamma = 0 is REINFORCE, and both are unbiased, as is every gamma that does not depend on
    this sample: total propagation (huggingface.co/papers/1902.01240) along the chain of RLR
    (huggingface.co/papers/2502.00639). A step with w_k = 0 is not computed; E[w_k] = 1 keeps the mean for any lambda_k.

    Args:
        chain: see `rlr_utils.chain`.
        trajectory: from `rollout`, under the present parameters (PPO's `cotangent` corrects for older ones).
        mixing: a `Schedule`, or gamma_k in [0, 1] for k = 1..T as a sequence of T + 1 whose index 0 is ignored. Step k
            with `None` adds nothing to the gradient and no pathwise cotangent passes it.
        reward_grad: (B, ...), dR_i/dx_0 of each image; needed where gamma_1 > 0.
        advantages: (B,), or (T + 1, B) where the baseline differs by step; needed where gamma_k < 1.
        stop_after: the last step k that is swept; default: the schedule's, or T. A smaller one truncates, which is biased.
        cotangent: `cotangent(k, mean) -> (B, ...)`, given the recomputed mean without a graph, instead of A z_k / sigma_k.
        penalty: `penalty(k, mean) -> (B, ...)`, a further cotangent of mu_k that reaches the parameters at this step only,
            not the earlier steps. Where a pathwise cotangent passes, it costs a second product with the same graph.
        parameters: tensors whose gradient is measured step by step, for `SweepStatistics.gradient_norm`.

    Returns:
        SweepStatistics

    Raises:
        ValueError: if a cotangent is missing, a step with gamma_k < 1 has no noise, or a shape does not fit.
    """
    num_steps = chain.num_steps
    schedule = mixing if isinstance(mixing, Schedule) else Schedule(mixing, num_steps)
    schedule = schedule if stop_after is None else schedule._replace(stop_after=stop_after)
    ones = [1.0] * (num_steps + 1)
    schedule = schedule._replace(transport=schedule.transport or ones, weights=schedule.weights or ones)
    _check_schedule(chain, schedule)
    _check_cotangents(chain, trajectory, schedule, reward_grad, advantages, cotangent)
    return _sweep(chain, trajectory, schedule, reward_grad, advantages, cotangent, penalty, parameters)


def _sweep(chain, trajectory, schedule, reward_grad, advantages, cotangent, penalty, parameters):
    """`backward_sweep` with its schedule complete and its inputs checked."""
    gammas, latents = schedule.mixing, trajectory.latents
    # x_k gets a gradient at every step or at none, though not every step passes one on: a compiled network then has one
    # graph for the sweep.
    with_input_grad = bool(trajectory.kept) or any(gammas[k] for k in range(2, schedule.stop_after + 1))
    seen = torch.full((5, chain.num_steps + 1), float("nan"), dtype=latents[0].dtype, device=latents[0].device)
    pathwise = reward_grad
    for k in range(1, schedule.stop_after + 1):
        if gammas[k] is None:
            pathwise = None
            continue
        weight, gain = schedule.weights[k], schedule.transport[k]
        passes_on = k < schedule.stop_after and bool(gammas[k + 1])
        score = None
        if advantages is not None and chain.sigma(k) > 0:
            score = likelihood_ratio(chain, trajectory, k, advantages)
        _see_variances(seen[:, k], pathwise, score)
        mixed = torch.zeros_like(latents[k])
        if gammas[k] > 0:
            mixed += gammas[k] * pathwise
        if gammas[k] < 1 and score is not None:
            mixed += (1 - gammas[k]) * score
        pathwise = None
        if weight == 0:
            trajectory.kept.pop(k, None)
            pathwise = gain * mixed if passes_on else None
            continue
        was_kept = k in trajectory.kept
        x, mean = _step_with_graph(chain, trajectory, k, with_input_grad)
        if not mean.requires_grad:
            raise ValueError(
                f"the mean of step {k} from the end has no graph: the chain detaches it or computes it under no_grad, or no"
                " parameter requires a gradient"
            )
        if cotangent is None and not was_kept:
            rolled_out = latents[k - 1] - chain.sigma(k) * trajectory.noises[k]
            seen[4, k] = (mean.detach() - rolled_out).norm() / (rolled_out - latents[k]).norm()
        if cotangent is not None:
            mixed += (1 - gammas[k]) * cotangent(k, mean.detach())
        extra = None if penalty is None else penalty(k, mean.detach())
        before = _gradient_of(parameters)
        found = _vector_jacobian_product(x, mean, -weight / len(mixed), mixed, extra, passes_on)
        if parameters is not None:
            seen[2, k] = (_gradient_of(parameters) - before).norm() / weight
        if passes_on:
            seen[3, k] = (mixed * found).sum() / mixed.square().sum()
            pathwise = weight * found + (1 - weight) * gain * mixed
    return SweepStatistics(*seen)


def _see_variances(seen, pathwise, score):
    """Write the variances of the two cotangents of a step, where they are, into `seen`."""
    for row, term in enumerate((pathwise, score)):
        if term is not None:
            batch = len(term)
            centre = term.mean(0) if batch > 1 else 0.0
            seen[row] = (term - centre).square().sum() / max(batch - 1, 1)


def _step_with_graph(chain, trajectory, k, with_input_grad):
    """(x_k, mu_k(x_k)) with the step's graph: the rollout's if it was kept, which is then used up."""
    if k in trajectory.kept:
        return trajectory.kept.pop(k)
    x = trajectory.latents[k].detach().requires_grad_(with_input_grad)
    with torch.enable_grad():
        return x, chain.mean(k, x)


def _vector_jacobian_product(x, mean, scale, mixed, extra, passes_on):
    """Add scale J_theta^T (mixed + extra) to the gradients; returns (d mean / d x)^T mixed, (B, ...), if it passes on."""
    if extra is not None and passes_on:
        torch.autograd.backward(mean, scale * extra, retain_graph=True)
        x.grad = None
    elif extra is not None:
        mixed += extra
    torch.autograd.backward(mean, scale * mixed)
    if not passes_on:
        return None
    return torch.zeros_like(mixed) if x.grad is None else x.grad / scale


def _gradient_of(parameters):
    if parameters is None:
        return None
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def _check_schedule(chain, schedule):
    num_steps, gammas = chain.num_steps, schedule.mixing
    for name in ("mixing", "weights", "transport"):
        count = len(getattr(schedule, name))
        if count != num_steps + 1:
            raise ValueError(f"{name} has {count} entries, a chain of {num_steps} steps needs {num_steps + 1}")
    if not 1 <= schedule.stop_after <= num_steps:
        raise ValueError(f"stop_after={schedule.stop_after} is not one of the steps 1..{num_steps}")
    for k in schedule.swept:
        if not 0 <= gammas[k] <= 1:
            raise ValueError(f"mixing[{k}]={gammas[k]} is not in [0, 1]")
        if gammas[k] < 1 and chain.sigma(k) == 0:
            raise ValueError(f"mixing[{k}]={gammas[k]} < 1 needs noise, but sigma({k}) is 0")
        if gammas[k] > 0 and k > 1 and gammas[k - 1] is None:
            raise ValueError(
                f"mixing[{k}]={gammas[k]} > 0 needs the pathwise cotangent of step {k - 1}, which is left out"
            )


def _check_cotangents(chain, trajectory, schedule, reward_grad, advantages, cotangent):
    num_steps, gammas = chain.num_steps, schedule.mixing
    shape = tuple(trajectory.latents[0].shape)
    if reward_grad is not None and reward_grad.shape != shape:
        raise ValueError(f"reward_grad has shape {tuple(reward_grad.shape)}, the latents {shape}")
    if gammas[1] and reward_grad is None:
        raise ValueError(f"mixing[1]={gammas[1]} > 0 needs reward_grad")
    if advantages is not None and advantages.shape not in ((shape[0],), (num_steps + 1, shape[0])):
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}, a batch of {shape[0]} in {num_steps} steps needs"
            f" ({shape[0]},) or ({num_steps + 1}, {shape[0]})"
        )
    if advantages is not None and cotangent is not None:
        raise ValueError("advantages and cotangent both stand for the likelihood ratio: give one of them")
    for k in schedule.swept:
        if gammas[k] < 1 and advantages is None and cotangent is None:
            raise ValueError(f"mixing[{k}]={gammas[k]} < 1 needs advantages or a cotangent")
    drawn = any(schedule.weights[k] != 1 for k in range(1, schedule.stop_after + 1))
    if cotangent is not None and drawn and any(gammas[k] for k in range(2, schedule.stop_after + 1)):
        raise ValueError("a cotangent that depends on the means cannot be passed on where steps are drawn")
