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
import pytest
import torch
from rlr_testing import LinearGaussianChain, NonlinearChain, gradients
from rlr_utils import (
    AdaptiveMixing,
    ClippedRatio,
    RunningReward,
    SweepStatistics,
    alignprop,
    backward_sweep,
    ddpo,
    full_bp,
    leave_one_out,
    normalize,
    per_prompt,
    rlr,
    rollout,
    truncated_bp,
)


def test_schedules():
    assert full_bp(3) == ([1.0] * 4, 3)
    assert truncated_bp(3, 2) == ([1.0] * 4, 2)
    assert truncated_bp(3, 50).stop_after == 3
    assert ddpo(3) == ([0.0] * 4, 3)
    assert {alignprop(4).stop_after for _ in range(200)} == {1, 2, 3, 4}
    assert rlr(3, 0.4, differentiable=True).mixing[1:] == [1.0, 0.4, 0.4]
    assert rlr(3, 0.4, differentiable=False).mixing[1:] == [0.0, 0.4, 0.4]


def statistics(pathwise, likelihood_ratio):
    nan = float("nan")
    return SweepStatistics(torch.tensor([nan, *pathwise]), torch.tensor([nan, *likelihood_ratio]))


def test_adaptive_mixing_is_inverse_variance_of_earlier_batches():
    adaptive = AdaptiveMixing(2, decay=0.75)
    assert rlr(2, adaptive, differentiable=True).mixing[1:] == [1.0, 0.9]
    adaptive.update(statistics([1.0, 1.0], [1.0, 3.0]))
    assert adaptive.gammas()[1:] == pytest.approx([0.5, 0.75])
    adaptive.update(statistics([1.0, 5.0], [1.0, 3.0]))
    assert adaptive.gammas()[1:] == pytest.approx([0.5, 3 / (3 + 2)])


def test_adaptive_mixing_without_a_preference_keeps_its_start():
    adaptive = AdaptiveMixing(2)
    adaptive.update(statistics([0.0, 1.0], [0.0, float("nan")]))
    assert adaptive.gammas()[1:] == [0.9, 0.9]


def test_adaptive_mixing_survives_a_checkpoint_and_refuses_another_chain():
    import json

    adaptive, other = AdaptiveMixing(2), AdaptiveMixing(2)
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    assert other.squares is None
    adaptive.update(statistics([0.1, 1.0], [1 / 3, float("nan")]))
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict(), allow_nan=False)))
    assert other.gammas() == adaptive.gammas()
    with pytest.raises(ValueError, match="2 inference steps, not 7"):
        AdaptiveMixing(7).load_state_dict(adaptive.state_dict())


def test_leave_one_out_is_what_its_name_says():
    rewards = torch.randn(5, dtype=torch.float64)
    for i, advantage in enumerate(leave_one_out(rewards)):
        others = torch.cat([rewards[:i], rewards[i + 1 :]])
        torch.testing.assert_close(advantage, rewards[i] - others.mean())


def test_a_single_picture_is_compared_with_the_running_mean():
    running = RunningReward(decay=0.5)
    assert leave_one_out(torch.tensor([3.0]), running.mean).item() == 3.0
    running.update(torch.tensor([3.0]))
    running.update(torch.tensor([5.0]))
    assert running.mean == 4.0
    assert leave_one_out(torch.tensor([5.0]), running.mean).item() == 1.0
    restored = RunningReward()
    restored.load_state_dict(running.state_dict())
    assert restored.state_dict() == running.state_dict()


def test_per_prompt_compares_within_a_prompt_and_singles_with_all():
    rewards = torch.tensor([1.0, 2.0, 10.0, 4.0])
    advantages = per_prompt(rewards, ["a", "b", "a", "c"])
    expected = [1 - 10, 2 - (1 + 10 + 4) / 3, 10 - 1, 4 - (1 + 2 + 10) / 3]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_normalised_advantages_have_a_floor():
    advantages = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(normalize(advantages, largest_std=1.0), advantages)
    # A saturated reward: a thousandth of the spread there once was must not be blown up to spread 1.
    torch.testing.assert_close(normalize(1e-3 * advantages, largest_std=1.0), 1e-2 * advantages)
    assert normalize(torch.zeros(3), largest_std=0.0).tolist() == [0.0, 0.0, 0.0]
    assert normalize(torch.tensor([2.0]), largest_std=0.0).tolist() == [2.0]


def clipped_objective(chain, trajectory, advantages, clip_range):
    """PPO's objective of the whole chain as one graph, from log-probabilities: the independent reference."""
    objective = torch.zeros((), dtype=torch.float64)
    for k in range(1, chain.num_steps + 1):
        drawn = trajectory.latents[k - 1]
        old = torch.distributions.Normal(drawn - chain.sigma(k) * trajectory.noises[k], chain.sigma(k))
        new = torch.distributions.Normal(chain.mean(k, trajectory.latents[k]), chain.sigma(k))
        ratio = (new.log_prob(drawn).sum(1) - old.log_prob(drawn).sum(1)).exp()
        clamped = ratio.clamp(1 - clip_range, 1 + clip_range)
        objective = objective + torch.minimum(ratio * advantages, clamped * advantages).mean()
    return objective


@pytest.mark.parametrize("moved", [0.0, 0.02, 0.1])
def test_the_clipped_ratio_is_the_gradient_of_ppos_objective(moved):
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(64, 3, dtype=torch.float64))
    advantages = torch.randn(64, dtype=torch.float64)
    with torch.no_grad():
        for p in chain.parameters():
            p += moved * torch.randn_like(p)
    ratio = ClippedRatio(chain, trajectory, advantages, clip_range=0.2)
    backward_sweep(chain, trajectory, ddpo(chain.num_steps).mixing, cotangent=ratio)
    swept = gradients(chain)
    (-clipped_objective(chain, trajectory, advantages, 0.2)).backward()
    torch.testing.assert_close(swept, gradients(chain), rtol=1e-9, atol=1e-12)
    fraction = torch.stack(ratio.clipped).mean().item()
    assert (fraction == 0) if moved == 0 else (0 < fraction < 1)


def variance(schedule_of, baseline, batches=96, batch_size=64):
    torch.manual_seed(0)
    chain, draws = LinearGaussianChain(), []
    for _ in range(batches):
        trajectory = rollout(chain, torch.randn(batch_size, 4, dtype=torch.float64))
        x_0 = trajectory.latents[0]
        backward_sweep(
            chain,
            trajectory,
            schedule_of(chain.num_steps).mixing,
            reward_grad=chain.reward_grad(x_0),
            advantages=baseline(chain.reward(x_0)),
        )
        draws.append(gradients(chain))
    return torch.stack(draws).var(0).sum().item()


def test_variance_falls_from_raw_to_leave_one_out_to_mixed():
    raw = variance(ddpo, lambda rewards: rewards - 5)
    centred = variance(ddpo, leave_one_out)
    mixed = variance(lambda num_steps: rlr(num_steps, 0.9, differentiable=True), leave_one_out)
    assert raw > 3 * centred
    assert centred > 3 * mixed
