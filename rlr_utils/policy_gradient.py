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
"""The likelihood ratio under parameters that have moved on since the rollout (PPO)."""

import torch


class ClippedRatio:
    r"""A `cotangent` for `backward_sweep`: the gradient of PPO's clipped objective with respect to mu_k.

        r_k = exp( sum over dimensions of  (||sigma_k z_k||^2 - ||x_{k-1} - mu_k||^2) / (2 sigma_k^2) )
        L_k = min( r_k A, clip(r_k, 1 - c, 1 + c) A ),      dL_k/dmu_k = r_k A (x_{k-1} - mu_k) / sigma_k^2  or 0

    PPO (huggingface.co/papers/1707.06347) as DDPO uses it (huggingface.co/papers/2305.13301). The log-ratio is summed over
    the dimensions of the latent, so c bounds the probability of a whole step, not of one of its entries. While the
    parameters are those of the rollout, r_k = 1, and this is the plain likelihood ratio A z_k / sigma_k.

    Args:
        chain: see `rlr_utils.chain`.
        trajectory: from `rollout`, under the older parameters.
        advantages: (B,), or (T + 1, B) where the baseline differs by step.
        clip_range: c.

    Attributes:
        clipped: for every step swept so far, the fraction of the batch whose gradient was clipped to 0.
    """

    def __init__(self, chain, trajectory, advantages, clip_range=0.2):
        self.chain = chain
        self.trajectory = trajectory
        self.advantages = advantages
        self.clip_range = clip_range
        self.clipped = []

    def __call__(self, k, mean):
        sigma = self.chain.sigma(k)
        drawn = sigma * self.trajectory.noises[k]
        offset = self.trajectory.latents[k - 1] - mean
        log_ratio = ((drawn - offset) * (drawn + offset) / (2 * sigma**2)).flatten(1).sum(1)
        ratio = log_ratio.exp()
        advantages = self.advantages if self.advantages.ndim == 1 else self.advantages[k]
        bound = 1 + self.clip_range * advantages.sign()
        # min() takes the clipped branch, which has no gradient, where the ratio is beyond its bound on the side to which
        # the advantage pushes it.
        kept = (ratio - bound) * advantages.sign() <= 0
        self.clipped.append(1 - kept.to(mean.dtype).mean())
        weight = torch.where(kept, ratio * advantages, torch.zeros_like(ratio))
        return weight.view(-1, *[1] * (mean.ndim - 1)) * offset / sigma**2
