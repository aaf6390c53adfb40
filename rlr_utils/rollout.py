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

from dataclasses import dataclass

import torch

from diffusers.utils.torch_utils import randn_tensor


@dataclass
class Trajectory:
    """One run of a chain for a batch.

    Attributes:
        latents: `latents[k]` is x_k (B, ...) for k = 0..T; `latents[T]` is where the run started.
        noises: `noises[k]` is z_k (B, ...) for k = 1..T with unit variance; `noises[0]` is `None`.
    """

    latents: list
    noises: list


@torch.no_grad()
def rollout(chain, x_T, generator=None):
    """Run x_{k-1} = mu_k(x_k) + sigma_k z_k for k = T..1, without a graph.

    Args:
        chain: see `rlr_utils.chain`.
        x_T: (B, ...), the latents to start from.
        generator: a `torch.Generator`, a list of B of them, or `None` for the global one. A generator that drew x_T
            before goes on to draw what a diffusers pipeline draws, so the run ends in the pipeline's own picture.
    """
    num_steps = chain.num_steps
    latents, noises = [None] * num_steps + [x_T], [None] * (num_steps + 1)
    for k in range(num_steps, 0, -1):
        noises[k] = randn_tensor(x_T.shape, generator=generator, device=x_T.device, dtype=x_T.dtype)
        latents[k - 1] = chain.mean(k, latents[k]) + chain.sigma(k) * noises[k]
    return Trajectory(latents, noises)
