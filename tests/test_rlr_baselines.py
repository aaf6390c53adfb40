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
import json

import pytest
import torch
from rlr_utils import PredictedReward, RunningReward, leave_one_out, normalize, per_prompt


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = torch.randn(5, dtype=torch.float64)
    for i, advantage in enumerate(leave_one_out(rewards)):
        others = torch.cat([rewards[:i], rewards[i + 1 :]])
        torch.testing.assert_close(advantage, rewards[i] - others.mean())


def test_a_single_image_is_compared_with_the_running_mean():
    running = RunningReward(decay=0.5)
    assert leave_one_out(torch.tensor([3.0]), running.mean).item() == 3.0
    running.update(torch.tensor([3.0]))
    running.update(torch.tensor([5.0]))
    assert running.mean == 4.0
    assert leave_one_out(torch.tensor([5.0]), running.mean).item() == 1.0
    restored = RunningReward()
    restored.load_state_dict(running.state_dict())
    assert restored.state_dict() == running.state_dict()


def test_the_largest_standard_deviation_is_remembered():
    running = RunningReward()
    for rewards in ([1.0], [1.0, 3.0], [1.0, 9.0], [4.0, 4.0]):
        running.update(torch.tensor(rewards))
    assert running.largest_std == pytest.approx(32**0.5)


def test_per_prompt_compares_within_a_prompt_and_singles_with_all():
    rewards = torch.tensor([1.0, 2.0, 10.0, 4.0])
    advantages = per_prompt(rewards, ["a", "b", "a", "c"])
    expected = [1 - 10, 2 - (1 + 10 + 4) / 3, 10 - 1, 4 - (1 + 2 + 10) / 3]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    assert per_prompt(torch.tensor([5.0]), ["a"], running_mean=4.0).tolist() == [1.0]


def test_predicted_reward_is_a_regression_on_earlier_batches():
    torch.manual_seed(0)
    baseline = PredictedReward(2)
    predicted = torch.randn(3, 4000, dtype=torch.float64)
    predicted[0] = torch.nan
    rewards = 3 * predicted[1] + 0.1 * torch.randn(4000, dtype=torch.float64) + 7
    torch.testing.assert_close(baseline.advantages(rewards, predicted)[2], leave_one_out(rewards))
    baseline.update(rewards, predicted)
    slopes = baseline.slopes()
    assert slopes[0] == 0 and slopes[1] == pytest.approx(3, abs=0.01) and slopes[2] == pytest.approx(0, abs=0.2)
    advantages = baseline.advantages(rewards, predicted)
    assert advantages[1].std() == pytest.approx(0.1, rel=0.1)
    torch.testing.assert_close(advantages[0], leave_one_out(rewards))
    others = rewards[1:] - slopes[1] * predicted[1, 1:]
    torch.testing.assert_close(advantages[1, 0], rewards[0] - slopes[1] * predicted[1, 0] - others.mean())
    restored = PredictedReward(2)
    restored.load_state_dict(json.loads(json.dumps(baseline.state_dict())))
    assert torch.equal(restored.advantages(rewards, predicted), advantages)
    # A batch without predictions of a step leaves its moments unchanged.
    baseline.update(rewards[:9], torch.full((3, 9), torch.nan))
    assert torch.equal(baseline.moments, restored.moments)


def test_a_single_image_is_compared_with_earlier_predictions():
    """In batches of one, the running means of rewards and predictions replace the other images."""
    torch.manual_seed(0)
    baseline, running, advantages = PredictedReward(1, decay=0.99), RunningReward(0.99), []
    for _ in range(2000):
        predicted = torch.randn(1, dtype=torch.float64) + 5
        rewards = 3 * predicted + 0.1 * torch.randn(1, dtype=torch.float64) + 7
        predicted = torch.stack([torch.full_like(predicted, torch.nan), predicted])
        advantages.append(baseline.advantages(rewards, predicted, running.mean)[:, 0])
        baseline.update(rewards, predicted, running.mean)
        running.update(rewards)
    assert advantages[0][1] == advantages[0][0] and advantages[0][0] != 0  # nothing is known yet
    plain, with_predictions = torch.stack(advantages[1000:]).T
    assert plain.std() == pytest.approx(3, rel=0.1) and abs(with_predictions.mean()) < 0.1
    assert with_predictions.std() < 0.2


def test_normalized_advantages_have_a_floor():
    advantages = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(normalize(advantages, advantages + 5, largest_std=1.0), advantages)
    # A saturated reward: a thousandth of the earlier spread must not be scaled up to spread 1.
    torch.testing.assert_close(normalize(1e-3 * advantages, 1e-3 * advantages, largest_std=1.0), 1e-2 * advantages)
    assert normalize(torch.zeros(3), torch.ones(3), largest_std=0.0).tolist() == [0.0, 0.0, 0.0]
    assert normalize(torch.tensor([2.0]), torch.tensor([2.0]), largest_std=0.0).tolist() == [2.0]
