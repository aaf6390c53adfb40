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
"""The zeroth-order term of the paper: perturb the weights of a step and weigh the perturbation with the reward."""

from contextlib import contextmanager

import torch


class WeightPerturbation:
    r"""theta + s eps_k at chosen steps k of a rollout, and the gradient estimate A eps_k / s that belongs to it.

    This is the ZO part of RLR (huggingface.co/papers/2502.00639). The eps_k are never kept but drawn again from their
    seeds. One copy of the weights is kept and copied back after each step, so that they are restored to the bit. All
    images of a batch share eps_k: their rewards are averaged, and the baseline must come from other batches.

    Args:
        parameters: the trainable parameters.
        scale: s.
        seed: of this rollout; each step draws from its own stream.
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
        first, sizes = self.parameters[0], [p.numel() for p in self.parameters]
        generator = torch.Generator(first.device).manual_seed(hash((self.seed, k)) % 2**63)
        noise = torch.randn(sum(sizes), generator=generator, dtype=first.dtype, device=first.device)
        return [part.view_as(p) for part, p in zip(noise.split(sizes), self.parameters)]

    @contextmanager
    def applied(self, k):
        """The weights perturbed inside, restored after, if k is one of the steps."""
        if k not in self.steps:
            yield
            return
        with torch.no_grad():
            torch._foreach_add_(self.parameters, self._noises(k), alpha=self.scale)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, self.kept)

    def add_gradient(self, advantage):
        """Add the gradient of -(mean over the batch of R), given the batch's mean advantage (a number)."""
        for p in self.parameters if self.steps else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for k in self.steps:
            torch._foreach_add_([p.grad for p in self.parameters], self._noises(k), alpha=-advantage / self.scale)


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
