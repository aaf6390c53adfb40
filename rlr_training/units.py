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
"""The units of rewards: the running standard deviations of their scores."""

import math

from accelerate.logging import get_logger

from diffusers.training_utils import offload_models

from .display import shown
from .services import agreeing_on_services
from .shares import Share


logger = get_logger(__name__, log_level="INFO")

DECAY = 0.95  # a memory of twenty steps
UNIT_SEED = 3_000_000  # of the images that the units begin with
NUM_IMAGES = 16


class RewardUnits:
    """Sets the units of a `WeightedSum` for a step, from the scores of earlier steps only.

    m <- b m + (1 - b) mean, v <- b v + (1 - b) (variance + (mean - m)^2), unit = sqrt(v), of the scores of the images of a step.
    Given the units, each step's gradient is that of the sum, without bias. A reward whose scores have all been alike has
    the unit 1.

    Args:
        rewards: `WeightedSum`.
        prompts: of the images that the units begin with.
    """

    def __init__(self, rewards, prompts):
        self.rewards, self.prompts = rewards, prompts
        self.mean, self.variance = {}, {}

    def update(self, line):
        """Take in a step, by its line in metrics.jsonl."""
        images = line["num_images"]
        for name in self.rewards.members:
            mean, variance = line[f"{name}_mean"], line[f"{name}_std"] ** 2 * (images - 1) / images
            if name not in self.mean:
                self.mean[name], self.variance[name] = mean, variance
            else:
                difference = mean - self.mean[name]
                self.mean[name] += (1 - DECAY) * difference
                self.variance[name] += (1 - DECAY) * (variance + difference**2 - self.variance[name])
        self._set()

    def _set(self):
        deviations = {name: math.sqrt(value) for name, value in self.variance.items()}
        # Below a millionth of the mean it is the rounding of the scores.
        least = {name: 1e-6 * max(1.0, abs(mean)) for name, mean in self.mean.items()}
        self.rewards.units = {name: one if one > least[name] else 1.0 for name, one in deviations.items()}

    def state_dict(self):
        return {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state):
        self.mean, self.variance = dict(state["mean"]), dict(state["variance"])
        self._set()


def make_units(args, rewards, prompts):
    """`RewardUnits` with some of the prompts of the run, if a flag needs them, or `None`."""
    if not (args.reward_normalize or args.reward_floor):
        return None
    return RewardUnits(rewards, [prompts[i * len(prompts) // NUM_IMAGES] for i in range(NUM_IMAGES)])


def measure_units(args, run):
    """Begin with the units of images of fixed seeds, on all processes, before the first step."""
    accelerator, prompts, number = run.accelerator, run.units.prompts, len(run.units.prompts)
    share = Share(accelerator, number)
    images = run.draw(share.of(prompts), args.train_batch_size, first_seed=UNIT_SEED + share.first)
    judges = offload_models(*run.rewards.modules, device=accelerator.device, offload=args.reward_offload)
    with agreeing_on_services(args, run.rewards), judges:
        members = run.rewards(images, share.of(prompts), device=accelerator.device).members
    scores = {name: share.gathered(values.cpu()) for name, values in members.items()}
    line = {"num_images": number}
    for name, values in scores.items():
        line[f"{name}_mean"], line[f"{name}_std"] = values.mean().item(), values.double().std().item()
    run.units.update(line)
    listed = ", ".join(f"{name} {shown(unit)}" for name, unit in run.rewards.units.items())
    logger.info(f"units of the rewards, from {number} images: {listed}")
