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
"""A chain whose gradient is known in closed form, for the benchmark of gradient quality and for tests."""

import torch


class LinearGaussianChain(torch.nn.Module):
    """x_{k-1} = a x_k + b + sigma_k z_k per coordinate, from x_T ~ N(0, I): moments, hence gradients, in closed form.

    The reward is R = -|x_0 - target|^2 / 2. `expected_reward` is E[R], by the recursion of mean and variance.
    """

    def __init__(self, num_steps=10, dim=4):
        super().__init__()
        self.num_steps = num_steps
        self.a = torch.nn.Parameter(torch.linspace(0.7, 0.95, dim, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.linspace(-0.1, 0.1, dim, dtype=torch.float64))
        self.target = torch.full((dim,), 3.0, dtype=torch.float64)

    def sigma(self, k):
        return 0.14 + 0.035 * k

    def mean(self, k, x):
        return self.a * x + self.b

    def predict(self, k, x):
        """The mean and E[x_0 | x_k], which is what a denoiser predicts."""
        prediction = x
        for _ in range(k):
            prediction = self.a * prediction + self.b
        return self.mean(k, x), prediction

    def repeat(self, i, copies):
        """The chain is the same for all images."""
        return self

    def parts(self, x_0):
        """(B, dim), the parts of the reward that belong to the coordinates."""
        return -(x_0 - self.target).square() / 2

    def reward(self, x_0):
        return self.parts(x_0).sum(1)

    def reward_grad(self, x_0):
        return self.target - x_0

    def expected_reward(self):
        mean, variance = torch.zeros_like(self.target), torch.ones_like(self.target)
        for k in range(self.num_steps, 0, -1):
            mean, variance = self.a * mean + self.b, self.a**2 * variance + self.sigma(k) ** 2
        return -(variance + (mean - self.target).square()).sum() / 2


def gradients(module):
    """All gradients of a module as one vector; they are then cleared."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return gradient
