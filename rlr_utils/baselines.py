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
"""What an image's reward is compared with. No baseline here depends on the image's own noise, so none adds bias."""

from collections import defaultdict

import torch

from .mixing import check_steps


class RunningReward:
    """Running mean of the batch means of a reward, and the largest batch standard deviation so far."""

    def __init__(self, decay=0.9):
        self.decay = decay
        self.mean = None
        self.largest_std = 0.0

    def update(self, rewards):
        """Take in the rewards (N,) of a batch, after they have been used."""
        mean = rewards.mean().item()
        self.mean = mean if self.mean is None else self.decay * self.mean + (1 - self.decay) * mean
        if len(rewards) > 1:
            self.largest_std = max(self.largest_std, rewards.std().item())

    def state_dict(self):
        return {"mean": self.mean, "largest_std": self.largest_std}

    def load_state_dict(self, state):
        self.mean, self.largest_std = state["mean"], state["largest_std"]


def leave_one_out(rewards, running_mean=None):
    """A_i = R_i - mean of R_j over j != i (huggingface.co/papers/2402.14740), for rewards (N,).

    A single image has no others: it is compared with `running_mean`, the mean of earlier batches, or with 0 before there
    is one.
    """
    count = len(rewards)
    if count == 1:
        return rewards - (running_mean or 0.0)
    return (rewards - rewards.mean()) * count / (count - 1)


def per_prompt(rewards, prompts, running_mean=None):
    """Leave-one-out among the images of the same prompt; an image that is alone in its prompt is compared with all others.

    Args:
        rewards: (N,).
        prompts: N strings, or anything else that is the same for images of one prompt.
        running_mean: as in `leave_one_out`.
    """
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    advantages = leave_one_out(rewards, running_mean)
    for members in groups.values():
        if len(members) > 1:
            advantages[members] = leave_one_out(rewards[members])
    return advantages


class PredictedReward:
    r"""b_k as the regression of R on the reward of the predicted image, P_k = R(decode(x0_hat(x_k))), step by step.

        A_k = (R - s_k P_k) - mean of (R - s_k P_k) over the other images,     s_k = cov(R, P_k) / var(P_k)

    x0_hat(x_k) is known before z_k is drawn, and s_k comes from earlier batches only, so this adds no bias. Before the
    first batch s_k = 0, which is plain leave-one-out. A single image has no others and is compared with earlier batches.

    Args:
        num_steps: T.
        decay: weight of the past in the running moments.
    """

    def __init__(self, num_steps, decay=0.9):
        self.decay = decay
        # Over the batches in which step k was predicted: cov(R, P_k), var(P_k), and the sum of P_k with its weight.
        self.moments = torch.zeros(4, num_steps + 1, dtype=torch.float64)

    def slopes(self):
        """s_k for k = 0..T, (T + 1,) in float64; 0 where nothing has been predicted."""
        covariance, variance = self.moments[:2]
        return torch.where(variance > 0, covariance / variance, torch.zeros_like(variance))

    def _centred(self, predicted):
        """P_k minus its mean over the images, or over earlier batches for a single image; 0 where there is neither."""
        _, _, total, weight = self.moments
        means = predicted.mean(1) if predicted.shape[1] > 1 else (total / weight).to(predicted)
        return (predicted - means[:, None]).nan_to_num()

    def advantages(self, rewards, predicted, running_mean=None):
        """A_k for k = 0..T, (T + 1, N).

        Args:
            rewards: R, (N,).
            predicted: P_k, (T + 1, N); a row of NaN for a step without predictions, which gets leave-one-out.
            running_mean: as in `leave_one_out`.
        """
        count = len(rewards)
        known = self.slopes().to(rewards)[:, None] * self._centred(predicted)
        return leave_one_out(rewards, running_mean) - known * count / max(count - 1, 1)

    def update(self, rewards, predicted, running_mean=None):
        """Take in a batch, after it has been used."""
        rewards, predicted = rewards.cpu().double(), predicted.cpu().double()
        centred = self._centred(predicted)
        deviations = rewards - (rewards.mean() if len(rewards) > 1 else running_mean or 0.0)
        new = [(centred * deviations).mean(1), centred.square().mean(1), predicted.mean(1), torch.ones(len(predicted))]
        new, seen = torch.stack(new), predicted.isfinite().all(1)
        self.moments[:, seen] = (self.decay * self.moments + (1 - self.decay) * new)[:, seen]

    def state_dict(self):
        return {"moments": self.moments.tolist()}

    def load_state_dict(self, state):
        """Raises ValueError for statistics of another number of steps."""
        moments = torch.tensor(state["moments"], dtype=torch.float64)
        check_steps("baseline", moments.shape[1], self.moments.shape[1])
        self.moments = moments


def normalize(advantages, rewards, largest_std, floor=0.1):
    """Advantages (N,) or (T + 1, N) over the standard deviation of the rewards (N,).

    The divisor is at least `floor` times the largest one seen. Without the floor the noise of a saturated reward, where
    all images score alike, would be scaled up to size 1.
    """
    std = rewards.std().item() if len(rewards) > 1 else 0.0
    scale = max(std, floor * max(largest_std, std))
    return advantages / scale if scale > 0 else advantages
