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
"""What `RLRStep` keeps of a batch between its rollout and its sweep."""

import hashlib
from dataclasses import dataclass
from typing import Callable, Optional

import torch

from .rollout import Trajectory
from .sweep import Schedule
from .zeroth_order import WeightPerturbation


@dataclass
class Batch:
    """A batch between its rollout and its sweep.

    Attributes:
        chain, score: as they were given to `RLRStep.rollout`.
        trajectory: what `rollout` returned.
        schedule: of the optimizer step, with this batch's draw of the swept steps.
        rewards: (B,), detached.
        black_box: (B,), the part of the rewards that has no gradient.
        reward_grad: (B, ...), the gradient of the other part at x_0, or `None`.
        predicted: {"total", "black_box"} -> (B, T + 1), rewards of the images predicted at each step, NaN where none was
            predicted; or `None`.
        prompts: (B,), see `prompt_numbers`, or `None`.
        perturbation: of the weights in the rollout.
        advantages: {"total", "black_box"} -> (B,) or (T + 1, B), set by the first `RLRStep.backward`.
        mean_advantage: of the batch against other batches, for the weight perturbation that its images share.
        kl_weight: reward per nat of divergence, in the unit of the advantages.
    """

    chain: object
    score: Callable
    trajectory: Trajectory
    schedule: Schedule
    rewards: torch.Tensor
    black_box: torch.Tensor
    reward_grad: Optional[torch.Tensor]
    predicted: Optional[dict]
    prompts: Optional[torch.Tensor]
    perturbation: WeightPerturbation
    advantages: Optional[dict] = None
    mean_advantage: float = 0.0
    kl_weight: float = 0.0

    @property
    def x_0(self):
        """(B, ...), where the rollout ended."""
        return self.trajectory.latents[0]


def check_batches(batches, num_inner_epochs):
    """Refuse what is no list of batches, and batches that an earlier optimizer step has swept.

    Raises:
        ValueError: one line that says what `RLRStep.backward` takes.
    """
    if isinstance(batches, Batch) or not batches:
        raise ValueError("backward takes the list of all batches of an optimizer step, as in backward([batch])")
    if len({id(batch) for batch in batches}) < len(batches):
        raise ValueError("the same batch is in the list twice")
    swept = sum(batch.advantages is not None for batch in batches)
    if swept and (num_inner_epochs == 1 or swept < len(batches)):
        raise ValueError(f"{swept} of {len(batches)} batches were swept by an earlier backward: roll out new ones")


def prompt_numbers(prompts, device):
    """B strings -> (B,) int64 that are equal for equal strings, on every rank."""
    digests = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
    return torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests], device=device)
