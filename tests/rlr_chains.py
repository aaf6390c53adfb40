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
"""Chains and rewards with known answers, for the tests of rlr_utils."""

from contextlib import contextmanager

import torch
from toy_chain import LinearGaussianChain, gradients


EXACT = {"rtol": 1e-9, "atol": 1e-12}  # for comparisons in float64


class NonlinearChain(torch.nn.Module):
    """A small network for every mean, so that nothing is linear: for comparisons with autograd.

    Attributes:
        calls: how often `mean` has been called.
        images: {whether autograd was on: for how many images it has been called}.
    """

    def __init__(self, num_steps=5, dim=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.num_steps = num_steps
        self.net = torch.nn.Sequential(torch.nn.Linear(dim + 1, 8), torch.nn.Tanh(), torch.nn.Linear(8, dim)).double()
        self.calls, self.images = 0, {True: 0, False: 0}

    def sigma(self, k):
        return 0.1 + 0.05 * k

    def mean(self, k, x):
        self.calls += 1
        self.images[torch.is_grad_enabled()] += len(x)
        step = torch.full_like(x[:, :1], k / self.num_steps)
        return 0.8 * x + self.net(torch.cat([x, step], dim=1))


class AdaptedChain(NonlinearChain):
    """A `NonlinearChain` whose network is frozen, with an adapter that is trained and can be disabled."""

    def __init__(self, num_steps=5, dim=3, seed=0):
        super().__init__(num_steps, dim, seed)
        self.net.requires_grad_(False)
        self.adapter = torch.nn.Sequential(torch.nn.Linear(dim, 4), torch.nn.Tanh(), torch.nn.Linear(4, dim)).double()
        self.enabled = True

    def mean(self, k, x):
        mean = super().mean(k, x)
        return mean + 0.3 * self.adapter(x) if self.enabled else mean

    @contextmanager
    def base_model(self):
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


class ImageChain:
    """A chain for latents (B, 3, 2, 1) under a condition for each image, with all optional members.

    Args:
        network: a `NonlinearChain` of 6 dimensions.
        conditions: (B, 6).
    """

    shape = (3, 2, 1)

    def __init__(self, network, conditions):
        self.network, self.conditions = network, conditions
        self.num_steps, self.sigma = network.num_steps, network.sigma

    def mean(self, k, x):
        return self.network.mean(k, x.flatten(1) + self.conditions).view(-1, *self.shape)

    def predict(self, k, x):
        mean = self.mean(k, x)
        return mean, mean - 0.1 * mean.square()

    def repeat(self, i, copies):
        return ImageChain(self.network, self.conditions[i : i + 1].expand(copies, -1))

    def renoise(self, x_0, noise):
        return 0.9 * x_0 + 0.3 * noise


class ImageReward:
    """Rewards of latents (B, 3, 2, 1) that differ from image to image, as `score` of `RLRStep.rollout`.

    Args:
        kind: "smooth", "black box" or "sum", which is the smooth part minus twice the black box.
        weights: (B,).
    """

    def __init__(self, kind, weights):
        self.kind, self.weights = kind, weights
        self.calls = 0

    def smooth(self, x_0):
        return self.weights * (torch.sin(3 * x_0) - x_0.square() / 2).flatten(1).sum(1)

    def black_box(self, x_0):
        """The part without a gradient, 0 where there is none."""
        factor = {"smooth": 0.0, "black box": 1.0, "sum": -2.0}[self.kind]
        return factor * self.weights * (x_0 > 0.1).double().flatten(1).sum(1)

    def total(self, x_0):
        return self.black_box(x_0) + (0.0 if self.kind == "black box" else self.smooth(x_0))

    def __call__(self, x_0, with_gradient):
        self.calls += 1
        assert torch.is_grad_enabled() and not x_0.requires_grad
        x_0 = x_0.clone().requires_grad_()
        gradient = torch.autograd.grad(self.smooth(x_0).sum(), x_0)[0] if with_gradient else None
        if self.kind != "sum":
            return self.total(x_0), gradient
        return self.total(x_0), gradient, self.black_box(x_0)


class Mix(torch.autograd.Function):
    """The identity, whose backward pass mixes the incoming gradient with a score: gamma c^P + (1 - gamma) c^L."""

    @staticmethod
    def forward(ctx, x, gamma, score):
        ctx.gamma, ctx.score = gamma, score
        return x.clone()

    @staticmethod
    def backward(ctx, pathwise):
        return ctx.gamma * pathwise + (1 - ctx.gamma) * ctx.score, None, None


def numbers(state):
    """All numbers of a state dictionary as one vector, NaN for `None`."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return torch.cat([numbers(value) for value in state])
    return torch.tensor([torch.nan if state is None else state], dtype=torch.float64)


class GaussianData(torch.nn.Module):
    """Independent Gaussian coordinates, and the network that knows their distribution: all moments of a chain are known.

    x_0 ~ N(center, variance) per coordinate. The network predicts E[w e | x] + b for a prediction type e; at w = 1 and b = 0
    it is the ideal one. A chain starts from N(0, 1), the distribution of a first level (0, 1).

    Args:
        levels: T + 1 pairs (alpha, sigma).
        steps: T `AffineStep`.
        weights: (weight of x_0, weight of epsilon) of the prediction, by level.
    """

    def __init__(self, levels, steps, weights):
        super().__init__()
        self.levels, self.steps, self.weights, self.num_steps = levels, steps, weights, len(steps)
        self.center = torch.tensor([0.5, -1.0, 0.2, 1.5], dtype=torch.float64)
        self.variance = torch.tensor([0.004, 0.25, 1.0, 0.5], dtype=torch.float64)
        self.w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def coefficients(self, k):
        """The mean of step k as (slope, constant), (4,) each, of x."""
        step, (alpha, sigma) = self.steps[self.num_steps - k], self.levels[self.num_steps - k]
        slope = alpha * self.variance / (alpha**2 * self.variance + sigma**2)  # of E[x_0 | x]
        constant = self.center * (1 - slope * alpha)
        of_x_0, of_epsilon = self.weights(alpha, sigma)
        e_slope = of_x_0 * slope + of_epsilon * (1 - alpha * slope) / sigma
        e_constant = (of_x_0 - of_epsilon * alpha / sigma) * constant
        return (
            step.x_from_x + step.x_from_e * self.w * e_slope,
            step.x_from_e * (self.w * e_constant + self.b),
        )

    def sigma(self, k):
        return self.steps[self.num_steps - k].sigma

    def mean(self, k, x):
        slope, constant = self.coefficients(k)
        return slope * x + constant

    def moments(self):
        """Mean and variance (4,) of the samples."""
        mean, variance = torch.zeros_like(self.center), torch.ones_like(self.center)
        for k in range(self.num_steps, 0, -1):
            slope, constant = self.coefficients(k)
            mean, variance = slope * mean + constant, slope**2 * variance + self.sigma(k) ** 2
        return mean, variance

    def parts(self, x_0):
        """(B, 4), the parts of the reward -|x_0 - 1|^2 / 2 that belong to the coordinates."""
        return -(x_0 - 1).square() / 2

    def reward_grad(self, x_0):
        return 1 - x_0

    def expected_reward(self):
        mean, variance = self.moments()
        return -(variance + (mean - 1).square()).sum() / 2


def z_scores(estimate, batches=128, batch_size=256, seed=0, chain=None):
    """Largest |z| over the coordinates of the mean gradient of `estimate(chain, x_T)` against the closed form."""
    torch.manual_seed(seed)
    chain = LinearGaussianChain() if chain is None else chain
    (-chain.expected_reward()).backward()
    truth = gradients(chain)
    draws = []
    for _ in range(batches):
        estimate(chain, torch.randn(batch_size, 4, dtype=torch.float64))
        draws.append(gradients(chain))
    draws = torch.stack(draws)
    return ((draws.mean(0) - truth) / (draws.std(0) / batches**0.5)).abs().max().item()


def reward_of(x_0):
    """A smooth reward of latents (B, dim)."""
    return torch.sin(3 * x_0).sum(1) - x_0.square().sum(1) / 2


def reward_and_gradient(x_0):
    """(B,) and (B, dim)."""
    x_0 = x_0.clone().requires_grad_()
    rewards = reward_of(x_0)
    (gradient,) = torch.autograd.grad(rewards.sum(), x_0)
    return rewards.detach(), gradient


def replay(chain, trajectory, detach_before=None):
    """x_0 by running the chain again on the stored noises with a graph, detached before step `detach_before`."""
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        if k == detach_before:
            x = x.detach()
        x = chain.mean(k, x) + chain.sigma(k) * trajectory.noises[k]
    return x
