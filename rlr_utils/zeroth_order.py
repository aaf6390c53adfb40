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
"""The zeroth-order term of the paper: perturb the weights of a step, and credit the perturbation with the reward."""

from contextlib import contextmanager

import torch


class WeightPerturbation:
    r"""theta + s eps_k at chosen steps k of a rollout, and the gradient estimate A eps_k / s that belongs to it.

    This is the ZO part of RLR (huggingface.co/papers/2502.00639). The eps_k are drawn again from their seeds whenever
    they are needed, never kept; one copy of the weights is kept and copied back after each step, so that they come
    back bit by bit. All pictures of a batch share eps_k: their rewards are averaged, and the baseline must come from
    other batches.

    Args:
        parameters: the trainable parameters.
        scale: s.
        seed: of this rollout; each step and parameter draws from its own stream.
        steps: the perturbed steps.
    """

    def __init__(self, parameters, scale, seed, steps):
        self.parameters = list(parameters)
        self.scale = scale
        self.seed = seed
        self.steps = frozenset(steps)
        self.kept = [p.detach().clone() for p in self.parameters] if self.steps else []

    def _noises(self, k):
        """eps_k, one tensor per parameter."""
        generator = torch.Generator().manual_seed(hash((self.seed, k)) % 2**63)
        for p in self.parameters:
            yield torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)

    @contextmanager
    def applied(self, k):
        """The weights perturbed inside, restored after, if k is one of the steps."""
        with torch.no_grad():
            if k in self.steps:
                for p, noise in zip(self.parameters, self._noises(k)):
                    p.add_(self.scale * noise)
            try:
                yield
            finally:
                if k in self.steps:
                    for p, kept in zip(self.parameters, self.kept):
                        p.copy_(kept)

    def add_gradient(self, advantage):
        """Add the gradient of -(mean over the batch of R), given the batch's mean advantage (a number)."""
        for k in self.steps:
            for p, noise in zip(self.parameters, self._noises(k)):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad -= advantage / self.scale * noise


class PerturbedChain:
    """A chain whose means are those of the perturbed weights: for the rollout, which needs no graph."""

    def __init__(self, chain, perturbation):
        self.chain = chain
        self.perturbation = perturbation
        self.num_steps = chain.num_steps
        self.sigma = chain.sigma

    def mean(self, k, x):
        with self.perturbation.applied(k):
            return self.chain.mean(k, x)

    def predict(self, k, x):
        with self.perturbation.applied(k):
            return self.chain.predict(k, x)
