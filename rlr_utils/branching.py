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
"""Branching: for rewards without a gradient, compare both sides of one step instead of many images."""

import random

import torch


def branch(chain, trajectory, score, pairs, scale=1.0, rng=random):
    r"""Add the gradient of -(mean over the batch of R) to `.grad`, estimated at one random step of each image.

    From the x_k of an image the step k is taken with K pairs of noises +-z_i, and each of the 2K branches runs to its end
    with the same later noises, so that the difference of a pair is due to z_i alone:

        c_{k-1} = T / (2 K) sum_i (R_i^+ - R_i^-) z_i / sigma_k,        grad -= J_theta(mu_k)^T c_{k-1} / B

    k is uniform in 1..T, which makes this unbiased for the sum over all steps. It is the likelihood ratio with its
    antithetic partner as a baseline, and one vector-Jacobian product serves all pairs.

    Args:
        chain: with `repeat`, see `rlr_utils.chain`.
        trajectory: from `rollout` on `chain`.
        score: `score(x_0) -> (B,)`, the rewards of latents (B, ...), image i scored as image i of the batch.
        pairs: K.
        scale: a factor of the gradient.
        rng: draws k, a `random.Random` or Python's global generator. Noise comes from torch's global generator.
    """
    num_images = len(trajectory.latents[0])
    drawn = [rng.randint(1, chain.num_steps) for _ in range(num_images)]
    runs = [_run_branches(chain, trajectory, i, k, pairs) for i, k in enumerate(drawn)]
    ends = torch.stack([x_0 for _, x_0 in runs], dim=1)
    with torch.no_grad():
        rewards = torch.stack([score(x_0) for x_0 in ends])  # (2K, B)
    for i, (k, (noises, _)) in enumerate(zip(drawn, runs)):
        plus, minus = rewards[:, i].chunk(2)
        weight = scale * chain.num_steps / num_images
        factors = weight * (plus - minus) / (2 * pairs * chain.sigma(k))
        cotangent = (factors.view(-1, *[1] * (noises.ndim - 1)) * noises).sum(0, keepdim=True)
        with torch.enable_grad():
            mean = chain.repeat(i, 1).mean(k, trajectory.latents[k][i : i + 1])
        torch.autograd.backward(mean, -cotangent)


@torch.no_grad()
def _run_branches(chain, trajectory, i, k, pairs):
    """(the noises (K, ...) of step k of image i, x_0 (2K, ...) of its branches)."""
    x_k = trajectory.latents[k][i : i + 1]
    noises = torch.randn(pairs, *x_k.shape[1:], dtype=x_k.dtype, device=x_k.device)
    x = chain.repeat(i, 1).mean(k, x_k) + chain.sigma(k) * torch.cat([noises, -noises])
    branches = chain.repeat(i, 2 * pairs)
    for j in range(k - 1, 0, -1):
        x = branches.mean(j, x) + chain.sigma(j) * torch.randn_like(x_k)
    return noises, x
