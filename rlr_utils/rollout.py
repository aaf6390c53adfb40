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
"""Running a chain forward."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from diffusers.utils.torch_utils import randn_tensor


class Part(NamedTuple):
    """Some pictures of a batch, for which a step is swept.

    Attributes:
        pictures: their indices, (B',).
        others: those of the other pictures.
        weight: the inverse of the probability with which a picture is among them.
    """

    pictures: object
    others: object
    weight: float


WHOLE = Part(slice(None), None, 1.0)


def draw_parts(share, batch, device=None):
    """{k: `Part`} of the steps with a share p_k < 1: p_k B of the B pictures, drawn anew by Python's global generator.

    Where that is no whole number, it is the one below or above, drawn so that p_k is each picture's probability; of a
    single picture it is all or nothing.

    Args:
        share: {k: p_k in (0, 1]}.
    """
    parts = {}
    for k, probability in share.items():
        if probability < 1:
            drawn = set(random.sample(range(batch), int(probability * batch + random.random())))
            groups = sorted(drawn), sorted(set(range(batch)) - drawn)
            parts[k] = Part(
                *(torch.tensor(group, dtype=torch.long, device=device) for group in groups), 1 / probability
            )
    return parts


@dataclass
class Trajectory:
    """One run of a chain for a batch.

    Attributes:
        latents: `latents[k]` is x_k (B, ...) for k = 0..T; `latents[T]` is where the run started.
        noises: `noises[k]` is z_k (B, ...) for k = 1..T with unit variance; `noises[0]` is `None`.
        predictions: {k: the predicted x_0 (B, ...) at x_k} of the steps for which it was asked.
        kept: {k: (x_k, mu_k(x_k))} of the steps whose graph was kept, (B, ...) each or of the pictures to be swept, for the
            first sweep that follows; it uses them up.
        parts: {k: `Part`} of the steps that are to be swept for some of the pictures only.
    """

    latents: list
    noises: list
    predictions: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)

    def part(self, k):
        """The `Part` of the pictures that is swept at step k."""
        return self.parts.get(k, WHOLE)


@torch.no_grad()
def rollout(chain, x_T, generator=None, predict=(), keep=(), parts=None):
    """Run x_{k-1} = mu_k(x_k) + sigma_k z_k for k = T..1, without a graph but those of the steps to keep.

    Args:
        chain: see `rlr_utils.chain`.
        x_T: (B, ...), the latents to start from.
        generator: a `torch.Generator`, a list of B of them, or `None` for the global one. A generator that drew x_T
            before goes on to draw what a diffusers pipeline draws, so the run ends in the pipeline's own picture.
        predict: steps k whose predicted x_0 is returned too; the chain then also needs
            `predict(k, x) -> (mu_k(x), x0_hat(x))`.
        keep: steps k whose graphs are kept, which the sweep then need not compute again: memory for time.
        parts: see `draw_parts`; the steps for which only some of the pictures will be swept, and keep a graph. The chain
            then also needs `part(pictures)`, itself for these pictures alone.
    """
    num_steps = chain.num_steps
    latents, noises = [None] * num_steps + [x_T], [None] * (num_steps + 1)
    trajectory = Trajectory(latents, noises, parts={} if parts is None else parts)
    # All of them first: noise of a generator on the CPU has to be carried over, for which a GPU would be waited for.
    for k in range(num_steps, 0, -1):
        noises[k] = randn_tensor(x_T.shape, generator=generator, device=x_T.device, dtype=x_T.dtype)

    for k in range(num_steps, 0, -1):
        part = trajectory.part(k) if k in keep else WHOLE
        groups = [(part.pictures, k in keep)] + ([] if part is WHOLE else [(part.others, False)])
        results = [torch.empty_like(x_T) for _ in range(1 + (k in predict))]
        for pictures, with_graph in groups:
            x = latents[k][pictures].detach().requires_grad_(with_graph)
            if len(x) == 0:
                continue
            some = chain if part is WHOLE else chain.part(pictures)
            with torch.set_grad_enabled(with_graph):
                found = some.predict(k, x) if k in predict else (some.mean(k, x),)
            if with_graph:
                trajectory.kept[k] = x, found[0]
            for result, of_these in zip(results, found):
                result[pictures] = of_these.detach()
        if k in predict:
            trajectory.predictions[k] = results[1]
        latents[k - 1] = results[0] + chain.sigma(k) * noises[k]
    return trajectory


@torch.no_grad()
def renoise(chain, x_0):
    """A new last step for pictures x_0 (B, ...): x_1 from the chain's `renoise(x_0, noise)`, then the step itself.

    Returns:
        Trajectory with `latents[0]`, `latents[1]`, `noises[1]` and the kept graph of step 1 alone: enough for a sweep with
        `stop_after=1`, which has nothing to compute again.
    """
    x_1 = chain.renoise(x_0, torch.randn_like(x_0))
    noise = torch.randn_like(x_0)
    with torch.enable_grad():
        mean = chain.mean(1, x_1)
    return Trajectory([mean.detach() + chain.sigma(1) * noise, x_1], [None, noise], kept={1: (x_1, mean)})
