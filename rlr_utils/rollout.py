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

from dataclasses import dataclass, field

import torch


@dataclass
class Trajectory:
    """One run of a chain for a batch.

    Attributes:
        latents: `latents[k]` is x_k (B, ...) for k = 0..T; `latents[T]` is where the run started.
        noises: `noises[k]` is z_k (B, ...) for k = 1..T with unit variance; `noises[0]` is `None`.
        predictions: {k: the predicted x_0 (B, ...) at x_k} of the steps for which it was asked.
        kept: {k: (x_k, mu_k(x_k))}, (B, ...) each, of the steps whose graph was kept for the next sweep, which uses it up.
    """

    latents: list
    noises: list
    predictions: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)


def draw_noise(shape, generator=None, *, like):
    """Standard normal noise with dtype and device of the tensor `like`.

    It is drawn as diffusers' `randn_tensor` draws it: on the device of the generator, then moved.

    Args:
        generator: a `torch.Generator`, a list of one per image, or `None` for the global generator.

    Raises:
        ValueError: for a list of another length than the batch.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one per image")
        return torch.cat([draw_noise((1, *shape[1:]), one, like=like) for one in generator])
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


@torch.no_grad()
def rollout(chain, x_T, generator=None, predict=(), keep=()):
    """Run x_{k-1} = mu_k(x_k) + sigma_k z_k for k = T..1, without a graph except at the steps to keep.

    Args:
        chain: see `rlr_utils.chain`.
        x_T: (B, ...), the latents to start from.
        generator: a `torch.Generator`, a list of B of them, or `None` for the global one. A generator that has drawn x_T
            goes on to draw what a diffusers pipeline draws, so that the run ends in the pipeline's own image.
        predict: steps k whose predicted x_0 is returned too; they need `chain.predict`.
        keep: steps k whose graphs are kept, so that the sweep need not compute them again: memory for time.

    Returns:
        Trajectory

    Raises:
        ValueError: for a list of generators that are not B, and for a mean of another shape than the latents.
    """
    num_steps = chain.num_steps
    latents, noises = [None] * num_steps + [x_T], [None] * (num_steps + 1)
    trajectory = Trajectory(latents, noises)
    # All noise is drawn first: copying it from a generator on the CPU would make a GPU wait at every step.
    for k in range(num_steps, 0, -1):
        noises[k] = draw_noise(x_T.shape, generator, like=x_T)

    for k in range(num_steps, 0, -1):
        x = latents[k].detach().requires_grad_(k in keep)
        with torch.set_grad_enabled(k in keep):
            mean, *prediction = chain.predict(k, x) if k in predict else (chain.mean(k, x),)
        if mean.shape != x.shape:
            raise ValueError(f"the mean of step {k} has the shape {tuple(mean.shape)} for latents of {tuple(x.shape)}")
        if k in keep:
            trajectory.kept[k] = x, mean
        if k in predict:
            trajectory.predictions[k] = prediction[0].detach()
        latents[k - 1] = mean.detach() + chain.sigma(k) * noises[k]
    return trajectory


@torch.no_grad()
def renoise(chain, x_0):
    """A new last step for images x_0 (B, ...): x_1 from the chain's `renoise(x_0, noise)`, then the step itself.

    Returns:
        Trajectory of the last step alone, `latents[0]`, `latents[1]` and `noises[1]`, with its graph kept for a sweep that
        stops after step 1.
    """
    x_1 = chain.renoise(x_0, torch.randn_like(x_0))
    noise = torch.randn_like(x_0)
    with torch.enable_grad():
        mean = chain.mean(1, x_1)
    return Trajectory([mean.detach() + chain.sigma(1) * noise, x_1], [None, noise], kept={1: (x_1, mean)})
