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
"""From rewards to advantages, over the images of all batches and ranks of an optimizer step."""

import random

import torch

from .baselines import PredictedReward, RunningReward, leave_one_out, normalize, per_prompt


PARTS = {"total": "rewards", "black_box": "black_box"}


class Advantages:
    """What the settings' baseline makes of rewards, with what it remembers of earlier batches.

    Attributes:
        running, predictors: {"total", "black_box"} -> `RunningReward` and `PredictedReward` of the whole reward and of its
            part without a gradient.
    """

    def __init__(self, settings, num_steps):
        self.settings = settings
        # Tells this process from the others in what `gather` returns; the global generators are left alone.
        self.mark = random.SystemRandom().getrandbits(62)
        self.running = {part: RunningReward() for part in PARTS}
        self.predictors = {part: PredictedReward(num_steps) for part in PARTS}

    def compare(self, batches):
        """Set `advantages`, `mean_advantage` and `kl_weight` of the batches, then update the baselines."""
        settings, sizes = self.settings, [len(batch.rewards) for batch in batches]
        marks = settings.gather(torch.tensor([self.mark], device=batches[0].rewards.device)).tolist()
        rank = marks.index(self.mark)
        mine = slice(rank * sum(sizes), (rank + 1) * sum(sizes))
        rewards = {
            part: settings.gather(torch.cat([getattr(batch, name) for batch in batches]))
            for part, name in PARTS.items()
        }
        # The images of a batch share its weight perturbation, so the batch is compared with other batches.
        means = settings.gather(torch.stack([batch.rewards.mean() for batch in batches]))
        means = leave_one_out(means, self.running["total"].mean)[rank * len(batches) :].tolist()
        advantages, kl_weight = {part: self._of(part, rewards[part], batches) for part in PARTS}, settings.kl_weight
        if settings.estimator == "ddpo":
            # In units of the rewards' standard deviation, as is then the price of the divergence.
            advantages["total"], kl_weight = (
                normalize(value, rewards["total"], self.running["total"].largest_std)
                for value in (advantages["total"], kl_weight)
            )
        by_batch = {part: values[..., mine].split(sizes, -1) for part, values in advantages.items()}
        for i, batch in enumerate(batches):
            batch.advantages = {part: values[i] for part, values in by_batch.items()}
            batch.mean_advantage, batch.kl_weight = means[i], kl_weight

    def _of(self, part, rewards, batches):
        """(N,) or (T + 1, N) from the rewards (N,) of a part over all ranks; the baseline of the part is then updated."""
        gather, baseline = self.settings.gather, self.settings.baseline
        running, predictor = self.running[part], self.predictors[part]
        if baseline == "none":
            advantages = rewards
        elif baseline == "per_prompt":
            prompts = gather(torch.cat([batch.prompts for batch in batches])).tolist()
            advantages = per_prompt(rewards, prompts, running.mean)
        elif batches[0].predicted is not None:
            predicted = gather(torch.cat([batch.predicted[part] for batch in batches])).T
            advantages = predictor.advantages(rewards, predicted, running.mean)
            predictor.update(rewards, predicted, running.mean)
        else:
            advantages = leave_one_out(rewards, running.mean)
        running.update(rewards)
        return advantages
