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
import math
import random

import pytest
import torch
from rlr_testing import LinearGaussianChain, NonlinearChain, gradients
from rlr_utils import (
    AdaptiveMixing,
    ClippedRatio,
    PerturbedChain,
    PredictedReward,
    RunningReward,
    Schedule,
    SubchainSampler,
    SweepStatistics,
    Transport,
    WeightPerturbation,
    alignprop,
    backward_sweep,
    ddpo,
    draft_lv,
    full_bp,
    leave_one_out,
    normalize,
    per_prompt,
    rlr,
    rlr_paper,
    rollout,
    subchain_length,
    truncated_bp,
)


def test_schedules():
    assert full_bp(3) == Schedule([1.0] * 4, 3)
    assert truncated_bp(3, 2) == Schedule([1.0] * 4, 2)
    assert draft_lv(3) == truncated_bp(3, 1)
    assert ddpo(3) == Schedule([0.0] * 4, 3)
    assert {alignprop(4).stop_after for _ in range(200)} == {1, 2, 3, 4}
    assert rlr(3, 0.4, differentiable=True).mixing[1:] == [1.0, 0.4, 0.4]
    assert rlr(3, 0.4, differentiable=False).mixing[1:] == [0.0, 0.4, 0.4]


def statistics(pathwise, likelihood_ratio):
    nan = float("nan")
    unseen = [nan] * (len(pathwise) + 1)
    rows = torch.tensor([[nan, *pathwise], [nan, *likelihood_ratio], unseen, unseen])
    return SweepStatistics(*rows)


def test_a_step_not_seen_so_far_is_not_taken_for_one_without_noise():
    """Of a batch that overflowed at some steps the adaptive mixing knows the others only."""
    adaptive, nan = AdaptiveMixing(6), float("nan")
    adaptive.update(statistics([1.0, 1.0, nan, nan, nan, 2.0], [nan, 5.0, nan, nan, 5.0, nan]))
    gammas = adaptive.gammas(differentiable=True)
    assert gammas[3] == gammas[4] == 0.999 and gammas[6] == 1.0  # the last one was swept, and had no likelihood ratio


def test_adaptive_mixing_is_inverse_variance_of_earlier_batches():
    adaptive = AdaptiveMixing(2, decay=0.75)
    assert rlr(2, adaptive, differentiable=True).mixing[1:] == [1.0, 0.999]
    assert rlr(2, adaptive, differentiable=False).mixing[1:] == [0.0, 0.001]
    adaptive.update(statistics([1.0, 1.0], [1.0, 3.0]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([0.5, 0.75])
    adaptive.update(statistics([1.0, 5.0], [1.0, 3.0]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([0.5, 3 / (3 + 2)])
    assert rlr(2, adaptive, differentiable=False).mixing[1:] == pytest.approx([0.0, 3 / (3 + 2)])


def variance_of_the_sum(gammas, first, fresh):
    """Var(sum_k c_{k-1}) for unit Jacobians, from the coefficient of every noise source in every cotangent."""
    num_steps = len(gammas) - 1
    cotangent = torch.zeros(num_steps + 1, dtype=torch.float64)
    cotangent[1] = 1.0
    total = cotangent.clone()
    for k in range(2, num_steps + 1):
        cotangent = gammas[k] * cotangent
        cotangent[k] = 1 - gammas[k]
        total = total + cotangent
    return (total.square() * torch.tensor([0.0, first, *fresh[1:]], dtype=torch.float64)).sum().item()


@pytest.mark.parametrize("first", [0.05, 1.0, 30.0])
def test_adaptive_mixing_with_a_gradient_has_the_least_variance_of_all(first):
    torch.manual_seed(0)
    num_steps, fresh = 8, torch.rand(8, dtype=torch.float64) * 20 + 1
    adaptive = AdaptiveMixing(num_steps)
    adaptive.update(statistics([first] * num_steps, fresh.tolist()))
    gammas = rlr(num_steps, adaptive, differentiable=True).mixing
    # As they went in: `statistics` is in float32.
    first, fresh = adaptive.squares[0, 1].item(), adaptive.squares[1, 1:].tolist()
    least = variance_of_the_sum(gammas, first, fresh)
    greedy = [None, 1.0, *adaptive.gammas(differentiable=False)[2:]]
    for other in (greedy, full_bp(num_steps).mixing, [None, 1.0] + [0.0] * (num_steps - 1)):
        assert least <= variance_of_the_sum(other, first, fresh)
    for _ in range(500):
        moved = [min(max(g + 0.05 * random.gauss(0, 1), 0), 1) if k > 1 else g for k, g in enumerate(gammas)]
        assert least <= variance_of_the_sum(moved, first, fresh) * (1 + 1e-9)


def test_adaptive_mixing_without_a_preference_keeps_its_start():
    adaptive = AdaptiveMixing(2)
    adaptive.update(statistics([0.0, 1.0], [0.0, float("nan")]))
    assert adaptive.gammas(differentiable=True)[1:] == [0.999, 0.999]
    assert adaptive.gammas(differentiable=False)[1:] == [0.001, 0.001]


def test_adaptive_mixing_finds_out_what_a_pathwise_cotangent_is_worth_to_a_black_box():
    """It starts with next to nothing of it: not with nothing, or it would never be seen."""
    torch.manual_seed(0)
    chain = LinearGaussianChain(num_steps=4)
    adaptive = AdaptiveMixing(4)
    trajectory = rollout(chain, torch.randn(64, 4, dtype=torch.float64))
    rewards = leave_one_out(chain.reward(trajectory.latents[0]))
    mixing = rlr(4, adaptive, differentiable=False).mixing
    adaptive.update(backward_sweep(chain, trajectory, mixing, advantages=rewards))
    assert all(0.05 < gamma < 0.95 for gamma in rlr(4, adaptive, differentiable=False).mixing[2:])


def test_adaptive_mixing_leaves_a_step_without_noise_to_the_gradient():
    adaptive = AdaptiveMixing(3)
    adaptive.update(statistics([1.0, 1.0, 1.0], [2.0, float("nan"), 3.0]))
    gammas = adaptive.gammas(differentiable=True)
    assert gammas[2] == 1.0 and 0 < gammas[3] < 1


def test_adaptive_mixing_recovers_from_what_a_batch_did_not_see():
    """Equal scores make the likelihood ratio zero: not a cotangent without noise, but one that was not seen."""
    nan, adaptive = float("nan"), AdaptiveMixing(2, decay=0.5)
    adaptive.update(statistics([1.0, 2.0], [0.0, 2.0]))
    assert adaptive.gammas(differentiable=False)[1:] == [0.001, 0.5]
    adaptive.update(statistics([nan, 2.0], [6.0, float("inf")]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([6 / (6 + 1), 0.5])
    adaptive.update(statistics([1.0, 2.0], [0.0, 0.0]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([6 / (6 + 1), 0.5])


def test_adaptive_mixing_begins_with_a_batch_of_equal_scores():
    """Such as a reward that saturates: there is a gradient, and no likelihood ratio to compare it with."""
    adaptive = AdaptiveMixing(4)
    adaptive.update(statistics([1.0] * 4, [0.0] * 4))
    assert adaptive.gammas(differentiable=True)[2:] == [1.0] * 3
    adaptive.update(statistics([1.0] * 4, [3.0] * 4))
    same = AdaptiveMixing(4)
    same.update(statistics([1.0] * 4, [3.0] * 4))
    assert adaptive.gammas(differentiable=True) == same.gammas(differentiable=True)


def test_the_papers_schedule():
    """Equation 6: the last step, a sub-chain that ends in the noise of its last executed step, the rest."""
    assert rlr_paper(6, start=3, length=2, rest="none").mixing == [None, 1.0, None, 0.0, 1.0, None, None]
    assert rlr_paper(6, 3, 2, "likelihood_ratio").mixing[1:] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    zeroth = rlr_paper(6, 3, 2, "zeroth_order")
    assert zeroth.mixing == [None, 1.0, None, 0.0, 1.0, None, None] and zeroth.perturbed == (2, 5, 6)
    assert rlr_paper(4, 2, 0, "zeroth_order").perturbed == (2, 3, 4)
    assert rlr_paper(4, 2, 1, "none", differentiable=False).mixing == [None, 0.0, 0.0, None, None]


def test_the_length_of_equation_8():
    # By hand, SD 1.4 in 50 steps: (24 - .24 * 49) / (8 - .24) = 1.58; a variance ratio of .5 allows 50 / 1 - 1.
    assert subchain_length(50, 24, 8, 0.24) == 1
    assert subchain_length(50, 40, 8, 0.24) == 3
    assert subchain_length(50, 1000, 8, 0.24) == 24
    assert subchain_length(50, 1000, 8, 0.24, variance_ratio=0.5) == 49
    with pytest.raises(ValueError, match="19.52 GB would"):
        subchain_length(50, 12, 8, 0.24)


def test_where_the_sub_chain_starts():
    uniform = SubchainSampler(6, 2)
    assert {uniform.draw() for _ in range(300)} == {2, 3, 4, 5}
    assert {SubchainSampler(6, 2, 3, 4).draw() for _ in range(100)} == {3, 4}
    by_norm = SubchainSampler(6, 2, by_gradient_norm=True, decay=0.5)
    assert by_norm.probabilities() == [0.25] * 4
    nan = float("nan")
    rows = torch.tensor([[nan] * 7, [nan] * 7, [nan, 9.0, 1.0, nan, 3.0, nan, nan], [nan] * 7])
    by_norm.update(SweepStatistics(*rows))
    expected = torch.tensor([0.5, 1.0, 1.5, 1.0]).softmax(0).tolist()
    assert by_norm.probabilities() == pytest.approx(expected)
    restored = SubchainSampler(6, 2, by_gradient_norm=True)
    restored.load_state_dict(by_norm.state_dict())
    assert restored.probabilities() == by_norm.probabilities()
    for bad in ((7, None, None), (2, 1, 4), (2, 2, 6), (2, 5, 3)):
        with pytest.raises(ValueError, match="may start at"):
            SubchainSampler(6, bad[0], *bad[1:])


def test_a_perturbation_comes_back_from_its_seed_and_leaves_no_trace():
    chain = NonlinearChain()
    before = [p.clone() for p in chain.parameters()]
    perturbation = WeightPerturbation(chain.parameters(), 0.1, seed=5, steps=(2, 4))
    x = torch.randn(4, 3, dtype=torch.float64)
    perturbed = PerturbedChain(chain, perturbation)
    plain = [chain.mean(k, x) for k in range(1, 6)]
    moved = [perturbed.mean(k, x) for k in range(1, 6)]
    again = [PerturbedChain(chain, WeightPerturbation(chain.parameters(), 0.1, 5, (2, 4))).mean(k, x) for k in (2, 4)]
    assert [torch.equal(a, b) for a, b in zip(plain, moved)] == [True, False, True, False, True]
    assert torch.equal(again[0], moved[1]) and torch.equal(again[1], moved[3])
    assert all(torch.equal(a, b) for a, b in zip(before, chain.parameters()))
    with pytest.raises(RuntimeError):
        with perturbation.applied(2):
            raise RuntimeError("in the middle of a step")
    assert all(torch.equal(a, b) for a, b in zip(before, chain.parameters()))


def test_the_zeroth_order_term_is_the_gradient_in_the_mean():
    """Without other noise and with a reward linear in the shift, E[A eps / s] has a variance of the gradient's own
    size, so that a wrong factor shows."""
    chain = LinearGaussianChain()
    chain.a.requires_grad_(False)
    chain.sigma = lambda k: 0.0
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    x_T = torch.randn(1, 4, dtype=torch.float64)
    value = (rollout(chain, x_T).latents[0] * weight).sum().item()
    draws = []
    for seed in range(3000):
        perturbation = WeightPerturbation([chain.b], 0.05, seed, steps=(1, 4, 9))
        x_0 = rollout(PerturbedChain(chain, perturbation), x_T).latents[0]
        perturbation.add_gradient((x_0 * weight).sum().item() - value)
        draws.append(-gradients(chain))
    draws = torch.stack(draws)
    # d x_0 / d b through step k alone is a^{k-1}.
    truth = weight * sum(chain.a.detach() ** (k - 1) for k in (1, 4, 9))
    assert ((draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5)).abs().max() < 5
    assert ((draws.mean(0) - truth) / truth).abs().max() < 0.5


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
    # A step that is not predicted for a while is remembered.
    baseline.update(rewards[:9], torch.full((3, 9), torch.nan))
    assert torch.equal(baseline.moments, restored.moments)


def test_a_single_picture_is_compared_with_earlier_ones():
    """Batches of one: the rewards' running mean and the predictions' stand in for the other pictures."""
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
    plain, known = torch.stack(advantages[1000:]).T
    assert plain.std() == pytest.approx(3, rel=0.1) and abs(known.mean()) < 0.1
    assert known.std() < 0.2


def test_adaptive_mixing_survives_a_checkpoint_and_refuses_another_chain():
    adaptive, other = AdaptiveMixing(2), AdaptiveMixing(2)
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    assert other.squares is None
    adaptive.update(statistics([0.1, 1.0], [1 / 3, float("nan")]))
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict(), allow_nan=False)))
    assert other.gammas(differentiable=True) == adaptive.gammas(differentiable=True)
    with pytest.raises(ValueError, match="2 inference steps, not 7"):
        AdaptiveMixing(7).load_state_dict(adaptive.state_dict())


def test_transport_is_a_running_mean_of_the_gains_that_were_seen():
    transport, nan = Transport(3, decay=0.75), float("nan")
    assert transport.gains == [1.0] * 4
    for gains in ([nan, 0.2, nan, math.inf], [nan, 0.2, 2.0, nan]):
        transport.update(SweepStatistics(*torch.tensor([[nan] * 4] * 3 + [gains])))
    assert transport.gains == pytest.approx([1.0, 0.2 + 0.8 * 0.75**2, 1.25, 1.0])
    again = Transport(3)
    again.load_state_dict(json.loads(json.dumps(transport.state_dict())))
    assert again.gains == transport.gains


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
    torch.testing.assert_close(normalize(advantages, advantages + 5, largest_std=1.0), advantages)
    # A saturated reward: a thousandth of the spread there once was must not be blown up to spread 1.
    torch.testing.assert_close(normalize(1e-3 * advantages, 1e-3 * advantages, largest_std=1.0), 1e-2 * advantages)
    assert normalize(torch.zeros(3), torch.ones(3), largest_std=0.0).tolist() == [0.0, 0.0, 0.0]
    assert normalize(torch.tensor([2.0]), torch.tensor([2.0]), largest_std=0.0).tolist() == [2.0]


def clipped_objective(chain, trajectory, advantages, clip_range):
    """PPO's objective of the whole chain as one graph, from log-probabilities: the independent reference."""
    objective = torch.zeros((), dtype=torch.float64)
    for k in range(1, chain.num_steps + 1):
        drawn = trajectory.latents[k - 1]
        old = torch.distributions.Normal(drawn - chain.sigma(k) * trajectory.noises[k], chain.sigma(k))
        new = torch.distributions.Normal(chain.mean(k, trajectory.latents[k]), chain.sigma(k))
        ratio = (new.log_prob(drawn).sum(1) - old.log_prob(drawn).sum(1)).exp()
        clamped = ratio.clamp(1 - clip_range, 1 + clip_range)
        advantage = advantages if advantages.ndim == 1 else advantages[k]
        objective = objective + torch.minimum(ratio * advantage, clamped * advantage).mean()
    return objective


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("moved", [0.0, 0.02, 0.1])
def test_the_clipped_ratio_is_the_gradient_of_ppos_objective(moved, per_step):
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(64, 3, dtype=torch.float64))
    advantages = torch.randn(*([chain.num_steps + 1] if per_step else []), 64, dtype=torch.float64)
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
    assert centred > 6 * mixed
