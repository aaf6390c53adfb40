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
"""Branching: for rewards without a gradient, compare both sides of a step instead of many pictures."""

import torch


def branch(chain, wide_chain, trajectory, k, reward, pairs, weight):
    r"""Add a picture's gradient of -R to `.grad`, estimated at the one step k.

    From the shared x_k the step is taken with K pairs of noises +-z_i, and each of the 2K branches run to its end with
    common later noises, so that the difference of a pair is due to z_i:

        c_{k-1} = w / (2 K) sum_i (R_i^+ - R_i^-) z_i / sigma_k,        grad -= J_theta(mu_k)^T c_{k-1}

    With k drawn with probability p_k and w = 1 / p_k this is unbiased for the sum over all steps; it is the likelihood
    ratio with its antithetic partner as a baseline, and one vector-Jacobian product serves all pairs.

    Args:
        chain: of this picture, batch size 1.
        wide_chain: the same for a batch of 2K.
        trajectory: from `rollout` on `chain`.
        k: the drawn step.
        reward: `reward(x_0) -> (2K,)` for latents (2K, ...).
        pairs: K.
        weight: w; 1 / (B p_k) makes B such calls the gradient of -(mean of R).

    Returns:
        The rewards of the branches, (2K,).
    """
    x_k = trajectory.latents[k]
    noises = torch.randn(pairs, *x_k.shape[1:], dtype=x_k.dtype, device=x_k.device)
    with torch.enable_grad():
        mean = chain.mean(k, x_k)
    with torch.no_grad():
        x = mean + chain.sigma(k) * torch.cat([noises, -noises])
        for j in range(k - 1, 0, -1):
            x = wide_chain.mean(j, x) + chain.sigma(j) * torch.randn_like(x_k)
        rewards = reward(x)
        plus, minus = rewards.chunk(2)
        scores = weight * (plus - minus) / (2 * pairs * chain.sigma(k))
        cotangent = (scores.view(-1, *[1] * (x.ndim - 1)) * noises).sum(0, keepdim=True)
    torch.autograd.backward(mean, -cotangent)
    return rewards
