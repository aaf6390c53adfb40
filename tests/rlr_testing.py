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
"""Chains with known answers, and the embedded bundle, for the tests."""

import os

import torch
from gradient_quality import LinearGaussianChain, flat_gradient  # noqa: F401

from diffusers import StableDiffusionPipeline


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ASSETS = os.path.join(ROOT, "assets")
TINY_SD = os.path.join(ASSETS, "tiny-sd")
TINY_AESTHETIC = os.path.join(ASSETS, "tiny-aesthetic")
PARITY = os.path.join(os.path.dirname(ROOT), "shared", "data", "parity")


class NonlinearChain(torch.nn.Module):
    """A small network for every mean, so that nothing is linear: for comparisons with autograd."""

    def __init__(self, num_steps=5, dim=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.num_steps = num_steps
        self.net = torch.nn.Sequential(torch.nn.Linear(dim + 1, 8), torch.nn.Tanh(), torch.nn.Linear(8, dim)).double()

    def sigma(self, k):
        return 0.1 + 0.05 * k

    def mean(self, k, x):
        step = torch.full_like(x[:, :1], k / self.num_steps)
        return 0.8 * x + self.net(torch.cat([x, step], dim=1))


class Mix(torch.autograd.Function):
    """c_{k-1} = gamma c^P + (1 - gamma) c^L in one graph of the chain: a node that mixes what comes back through it."""

    @staticmethod
    def forward(ctx, x, gamma, score):
        ctx.gamma, ctx.score = gamma, score
        return x.clone()

    @staticmethod
    def backward(ctx, pathwise):
        return ctx.gamma * pathwise + (1 - ctx.gamma) * ctx.score, None, None


def gradients(module):
    """All gradients of a module as one vector, which are cleared."""
    return flat_gradient([p for p in module.parameters() if p.requires_grad])


def tiny_pipeline(dtype=torch.float32):
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
