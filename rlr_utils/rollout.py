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

from diffusers.utils.torch_utils import randn_tensor


@dataclass
class Trajectory:
    """One run of a chain for a batch.

    Attributes:
        latents: `latents[k]` is x_k (B, ...) for k = 0..T; `latents[T]` is where the run started.
        noises: `noises[k]` is z_k (B, ...) for k = 1..T with unit variance; `noises[0]` is `None`.
        predictions: {k: the predicted x_0 (B, ...) at x_k} of the steps for which it was asked.
        kept: {k: (x_k, mu_k(x_k))} of the steps whose graph was kept, (B, ...) each, for the first sweep that follows; it
            uses them up.
    """

    latents: list
    noises: list
    predictions: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)


@torch.no_grad()
def rollout(chain, x_T, generator=None, predict=(), keep=()):
    """Run x_{k-1} = mu_k(x_k) + sigma_k z_k for k = T..1, without a graph but those of the steps to keep.

    Args:
        chain: see `rlr_utils.chain`.
        x_T: (B, ...), the latents to start from.
        generator: a `torch.Generator`, a list of B of them, or `None` for the global one. A generator that drew x_T
            before goes on to draw what a diffusers pipeline draws, so the run ends in the pipeline's own picture.
        predict: steps k whose predicted x_0 is returned too; the chain then also needs
            `predict(k, x) -> (mu_k(x), x0_hat(x))`.
        keep: steps k whose graphs are kept, which the sweep then need not compute again: memory for time.
    """
    num_steps = chain.num_steps
    latents, noises = [None] * num_steps + [x_T], [None] * (num_steps + 1)
    trajectory = Trajectory(latents, noises)
    # All of them first: noise of a generator on the CPU has to be carried over, for which a GPU would be waited for.
    for k in range(num_steps, 0, -1):
        noises[k] = randn_tensor(x_T.shape, generator=generator, device=x_T.device, dtype=x_T.dtype)

    for k in range(num_steps, 0, -1):
        x = latents[k].detach().requires_grad_(k in keep)
        with torch.set_grad_enabled(k in keep):
            mean, *prediction = chain.predict(k, x) if k in predict else (chain.mean(k, x),)
        if k in keep:
            trajectory.kept[k] = x, mean
        if k in predict:
            trajectory.predictions[k] = prediction[0].detach()
        latents[k - 1] = mean.detach() + chain.sigma(k) * noises[k]
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
