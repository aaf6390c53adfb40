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
"""The KL divergence of the chain's steps from the base model's, a penalty against reward hacking."""


class GaussianKL:
    r"""A `penalty` for `backward_sweep`: the divergence of every step from the base model's, at the states of the run.

        KL_k = ||mu_k - mu^base_k||^2 / (2 sigma_k^2),        -w dKL_k / dmu_k = -w (mu_k - mu^base_k) / sigma_k^2

    Both steps are Gaussians of the same variance, so this is their exact divergence, as in DPOK
    (huggingface.co/papers/2305.16381). It is the local term: the states x_k are held fixed, so the effect of one step's
    parameters on the divergence of later steps is left out.

    Args:
        chain: see `rlr_utils.chain`.
        base_mean: `base_mean(k, x) -> mu^base_k(x)`, without a graph.
        trajectory: from `rollout`.
        weight: w, reward per nat of divergence.

    Attributes:
        divergences: {k: KL_k} of the steps swept so far in nats, the mean over the batch.

    Raises:
        ValueError: when a step without noise is swept, whose divergence from any other is infinite.
    """

    def __init__(self, chain, base_mean, trajectory, weight):
        self.chain = chain
        self.base_mean = base_mean
        self.trajectory = trajectory
        self.weight = weight
        self.divergences = {}

    def __call__(self, k, mean):
        sigma = self.chain.sigma(k)
        if sigma == 0:
            raise ValueError(f"the divergence from the base model needs noise, but sigma({k}) is 0")
        offset = mean - self.base_mean(k, self.trajectory.latents[k])
        self.divergences[k] = offset.square().sum() / (2 * sigma**2 * len(offset))
        return -self.weight * offset / sigma**2
