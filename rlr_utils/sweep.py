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
"""THE backward sweep: every gradient estimator of this project is this one function under another schedule."""

from typing import NamedTuple

import torch


class SweepStatistics(NamedTuple):
    """What a sweep saw at each step, (T + 1,) each; NaN where there was nothing to see.

    Attributes:
        pathwise, likelihood_ratio: variance of the two cotangents, ||c - mean of c||^2 summed over the batch and divided
            by B - 1: what all pictures share is signal, not noise. Of a single picture ||c||^2.
        gradient_norm: norm of what the step added to the gradients of `parameters`, if they were given; without its weight.
        gain: <c_{k-1}, c^P_k> / <c_{k-1}, c_{k-1}>, the share of a cotangent that the step hands on as it is.
    """

    pathwise: torch.Tensor
    likelihood_ratio: torch.Tensor
    gradient_norm: torch.Tensor
    gain: torch.Tensor


def likelihood_ratio(chain, trajectory, k, advantages):
    """The likelihood-ratio cotangent of x_{k-1}: c^L = A z_k / sigma_k, (B, ...) from A, (B,) or (T + 1, B) by step.

    It is the score of the step's Gaussian at its mean, summed over dimensions, times what the picture was worth. Where
    a reward R_d + R_b has a part R_b without a gradient, `dR_d/dx_0 + likelihood_ratio(chain, trajectory, 1, A_b)` is
    an unbiased stand-in for dR/dx_0.

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
    weights=None,
    transport=None,
    parameters=None,
):
    r"""Add the gradient of -(mean over the batch of R) to `.grad` of the chain's parameters, in one pass k = 1..T.

    The sweep carries a cotangent for x_{k-1}. At each step mu_k is computed again at the stored x_k and one
    vector-Jacobian product gives the step's share of the parameter gradient and the pathwise cotangent of the next:

        c_{k-1}   = gamma_k c^P_{k-1} + (1 - gamma_k) A z_k / sigma_k
        grad     -= J_theta(mu_k)^T c_{k-1} / B
        c^P_k     = (d mu_k / d x_k)^T c_{k-1},        c^P_0 = dR/dx_0

    Both cotangents are unbiased for the gradient with respect to mu_k, so any gamma_k that does not depend on this
    sample is too: gamma = 1 is backpropagation through the chain, gamma = 0 is REINFORCE, and everything between is
    total propagation (huggingface.co/papers/1902.01240) along the chain of RLR (huggingface.co/papers/2502.00639).
    One graph of one step is alive at a time, whatever T is, but for those that the rollout was asked to keep, and nothing
    waits for the device.

    With weights, 1 / p_k of a step that has been drawn with probability p_k and 0 of one that has not, the latter is not
    computed:

        grad     -= w_k J_theta(mu_k)^T c_{k-1} / B
        c^P_k     = lambda_k c_{k-1} + w_k ((d mu_k / d x_k)^T c_{k-1} - lambda_k c_{k-1})

    Since E[w_k] = 1, whatever has been drawn at the other steps, that has the same mean with any number lambda_k, and the
    less noise the more nearly a step hands a cotangent on as it is.

    Args:
        chain: see `rlr_utils.chain`.
        trajectory: from `rollout`, under the parameters of now (PPO's cotangent corrects for older ones).
        mixing: gamma_k in [0, 1] for k = 1..T, a sequence of T + 1 whose index 0 is ignored. `None` leaves step k out:
            it adds nothing to the gradient, is not computed again, and no pathwise cotangent passes it.
        reward_grad: (B, ...), dR_i/dx_0 of each picture; needed where gamma_1 > 0.
        advantages: (B,), or (T + 1, B) where the baseline differs by step; needed where gamma_k < 1.
        stop_after: the last step k that is swept (default T); a smaller one truncates, which is biased.
        cotangent: `cotangent(k, mean) -> (B, ...)`, given the recomputed mean without a graph, in the place of
            A z_k / sigma_k, and weighted with 1 - gamma_k like it.
        penalty: `penalty(k, mean) -> (B, ...)`, likewise, a cotangent of mu_k that reaches the parameters at this step
            and nothing else: the states are held fixed, so no earlier step hears of it. Where a pathwise cotangent
            passes, that takes a second product with the same graph.
        weights: w_k for k = 1..T, a sequence of T + 1, drawn apart from all else; 1 by default.
        transport: lambda_k for k = 1..T, a sequence of T + 1; 1 by default.
        parameters: tensors whose gradient is to be measured step by step, for `SweepStatistics.gradient_norm`.

    Returns:
        SweepStatistics, for estimators that choose their schedule by them.

    Raises:
        ValueError: if a schedule asks for a cotangent that is not there, or for the likelihood ratio of a step
            without noise; if `cotangent`, which looks at means, is to be handed on where steps are drawn.
    """
    num_steps = chain.num_steps
    stop_after = num_steps if stop_after is None else stop_after
    weights = [1.0] * (num_steps + 1) if weights is None else weights
    transport = [1.0] * (num_steps + 1) if transport is None else transport
    _check(chain, trajectory, mixing, reward_grad, advantages, stop_after, cotangent, weights, transport)
    latents, batch = trajectory.latents, len(trajectory.latents[0])
    # x_k is given a gradient at every step or at none, though not every step hands one on: a compiled U-Net then has one
    # graph for the sweep. Of SD 1.4's U-Net the part before its first trained layer takes 2 % of a step's memory.
    with_input_grad = bool(trajectory.kept) or any(mixing[k] for k in range(2, stop_after + 1))
    seen = torch.full((4, num_steps + 1), float("nan"), dtype=latents[0].dtype, device=latents[0].device)
    pathwise = reward_grad
    for k in range(1, stop_after + 1):
        if mixing[k] is None:
            pathwise = None
            continue
        score = None
        if advantages is not None and chain.sigma(k) > 0:
            score = likelihood_ratio(chain, trajectory, k, advantages)
        for row, term in enumerate((pathwise, score)):
            if term is not None:
                centre = term.mean(0) if batch > 1 else 0.0
                seen[row, k] = (term - centre).square().sum() / max(batch - 1, 1)

        hands_on = k < stop_after and bool(mixing[k + 1])
        mixed = torch.zeros_like(latents[k])
        if mixing[k] > 0:
            mixed += mixing[k] * pathwise
        if mixing[k] < 1 and score is not None:
            mixed += (1 - mixing[k]) * score
        if weights[k] == 0:
            trajectory.kept.pop(k, None)
            pathwise = transport[k] * mixed if hands_on else None
            continue
        if k in trajectory.kept:
            x, mean = trajectory.kept.pop(k)  # its graph is gone after this
        else:
            x = latents[k].detach().requires_grad_(with_input_grad)
            with torch.enable_grad():
                mean = chain.mean(k, x)
        if cotangent is not None:
            mixed += (1 - mixing[k]) * cotangent(k, mean.detach())
        before, scale = _gradient_of(parameters), -weights[k] / batch
        if penalty is not None and hands_on:
            torch.autograd.backward(mean, scale * penalty(k, mean.detach()), retain_graph=True)
            x.grad = None
        elif penalty is not None:
            mixed += penalty(k, mean.detach())
        torch.autograd.backward(mean, scale * mixed)
        if parameters is not None:
            seen[2, k] = (_gradient_of(parameters) - before).norm() / weights[k]
        pathwise = None
        if hands_on:
            found = torch.zeros_like(mixed) if x.grad is None else x.grad / scale
            seen[3, k] = (mixed * found).sum() / mixed.square().sum()
            pathwise = weights[k] * found + (1 - weights[k]) * transport[k] * mixed
    return SweepStatistics(*seen)


def _gradient_of(parameters):
    if parameters is None:
        return None
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def _check(chain, trajectory, mixing, reward_grad, advantages, stop_after, cotangent, weights, transport):
    num_steps = chain.num_steps
    for name, values in (("mixing", mixing), ("weights", weights), ("transport", transport)):
        if len(values) != num_steps + 1:
            raise ValueError(f"{name} has {len(values)} entries, a chain of {num_steps} steps needs {num_steps + 1}")
    if not 1 <= stop_after <= num_steps:
        raise ValueError(f"stop_after={stop_after} is not one of the steps 1..{num_steps}")
    shape = tuple(trajectory.latents[0].shape)
    if reward_grad is not None and reward_grad.shape != shape:
        raise ValueError(f"reward_grad has shape {tuple(reward_grad.shape)}, the latents {shape}")
    if advantages is not None and advantages.shape not in ((shape[0],), (num_steps + 1, shape[0])):
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}, a batch of {shape[0]} in {num_steps} steps needs"
            f" ({shape[0]},) or ({num_steps + 1}, {shape[0]})"
        )
    if advantages is not None and cotangent is not None:
        raise ValueError("advantages and cotangent both stand for the likelihood ratio: give one of them")
    drawn = any(weights[k] != 1 for k in range(1, stop_after + 1))
    if cotangent is not None and drawn and any(mixing[k] for k in range(2, stop_after + 1)):
        raise ValueError("a cotangent that looks at the means cannot be handed on where steps are drawn")
    for k in range(1, stop_after + 1):
        if mixing[k] is None:
            continue
        if not 0 <= mixing[k] <= 1:
            raise ValueError(f"mixing[{k}]={mixing[k]} is not in [0, 1]")
        if mixing[k] < 1 and advantages is None and cotangent is None:
            raise ValueError(f"mixing[{k}]={mixing[k]} < 1 needs advantages or a cotangent")
        if mixing[k] < 1 and chain.sigma(k) == 0:
            raise ValueError(f"mixing[{k}]={mixing[k]} < 1 needs noise, but sigma({k}) is 0")
        if mixing[k] > 0 and k > 1 and mixing[k - 1] is None:
            raise ValueError(
                f"mixing[{k}]={mixing[k]} > 0 needs the pathwise cotangent of step {k - 1}, which is left out"
            )
    if mixing[1] and reward_grad is None:
        raise ValueError(f"mixing[1]={mixing[1]} > 0 needs reward_grad")
