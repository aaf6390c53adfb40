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
import random

import pytest
import torch
from rlr_chains import LinearGaussianChain, gradients, z_scores
from rlr_utils import (
    AdaptiveMixing,
    PerturbedChain,
    PredictedReward,
    RunningReward,
    Schedule,
    SubchainSampler,
    SweepStatistics,
    WeightPerturbation,
    alignprop,
    backward_sweep,
    branch,
    ddpo,
    draft_lv,
    full_bp,
    leave_one_out,
    likelihood_ratio,
    rlr,
    rlr_paper,
    rollout,
    subchain_length,
    truncated_bp,
)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)


def rlr_half(num_steps):
    return rlr(num_steps, 0.5, differentiable=True)


def test_schedules():
    assert full_bp(3) == Schedule([1.0] * 4, 3)
    assert truncated_bp(3, 2) == Schedule([1.0] * 4, 2)
    assert draft_lv(3) == truncated_bp(3, 1)
    assert ddpo(3) == Schedule([0.0] * 4, 3)
    assert {alignprop(4).stop_after for _ in range(200)} == {1, 2, 3, 4}
    assert rlr(3, 0.4, differentiable=True).mixing[1:] == [1.0, 0.4, 0.4]
    assert rlr(3, 0.4, differentiable=False).mixing[1:] == [0.0, 0.4, 0.4]


def test_the_schedule_of_equation_6():
    """The last step, a sub-chain that ends in the noise of its last executed step, and the other steps."""
    assert rlr_paper(6, start=3, length=2, rest="none").mixing == [None, 1.0, None, 0.0, 1.0, None, None]
    assert rlr_paper(6, 3, 2, "likelihood_ratio").mixing[1:] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    zeroth = rlr_paper(6, 3, 2, "zeroth_order")
    assert zeroth.mixing == [None, 1.0, None, 0.0, 1.0, None, None] and zeroth.perturbed == (2, 5, 6)
    assert rlr_paper(4, 2, 0, "zeroth_order").perturbed == (2, 3, 4)
    assert rlr_paper(4, 2, 1, "none", differentiable=False).mixing == [None, 0.0, 0.0, None, None]


def test_drawn_weights_are_independent_with_mean_one():
    schedule = rlr(6, 0.5, differentiable=True)._replace(fraction=0.3, stop_after=5)
    assert schedule.probabilities == {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.3, 5: 0.3}
    assert schedule.expected_steps == pytest.approx(3.6)
    drawn = schedule.draw()
    assert drawn._replace(weights=None) == schedule and schedule.weights is None
    draws = torch.tensor([schedule.draw().weights for _ in range(4000)])
    assert (draws[:, [0, 1, 2, 3, 6]] == 1).all()
    assert draws[:, 4:6].unique().tolist() == [0.0, pytest.approx(1 / 0.3)]
    for found in (draws[:, 4], draws[:, 5], draws[:, 4] * draws[:, 5]):
        assert (found.mean() - 1).abs() < 4 * found.std() / 4000**0.5
    assert schedule._replace(fraction=1.0).draw().weights == [1.0] * 7


def test_excluded_steps_are_neither_swept_nor_drawn():
    schedule = rlr_paper(6, 4, 2, "none")._replace(fraction=0.5)
    assert schedule.swept == [1, 4, 5] and schedule.expected_steps == 2.0
    draws = torch.tensor([schedule.draw().weights for _ in range(100)])
    assert (draws[:, [1, 2, 3, 6]] == 1).all() and draws[:, 4:6].unique().tolist() == [0.0, 2.0]


def test_the_length_of_equation_8():
    # By hand, SD 1.4 in 50 steps: (24 - .24 * 49) / (8 - .24) = 1.58; a variance ratio of .5 allows 50 / 1 - 1.
    assert subchain_length(50, 24, 8, 0.24) == 1
    assert subchain_length(50, 40, 8, 0.24) == 3
    assert subchain_length(50, 1000, 8, 0.24) == 24
    assert subchain_length(50, 1000, 8, 0.24, variance_ratio=0.5) == 49
    with pytest.raises(ValueError, match="19.52 GB would"):
        subchain_length(50, 12, 8, 0.24)


def test_the_start_of_the_sub_chain():
    uniform = SubchainSampler(6, 2)
    assert {uniform.draw() for _ in range(300)} == {2, 3, 4, 5}
    assert {SubchainSampler(6, 2, 3, 4).draw() for _ in range(100)} == {3, 4}
    by_norm = SubchainSampler(6, 2, by_gradient_norm=True, decay=0.5)
    assert by_norm.probabilities() == [0.25] * 4
    nan = float("nan")
    rows = torch.tensor([[nan] * 7, [nan] * 7, [nan, 9.0, 1.0, nan, 3.0, nan, float("inf")], [nan] * 7, [nan] * 7])
    by_norm.update(SweepStatistics(*rows))
    expected = torch.tensor([0.5, 1.0, 1.5, 1.0]).softmax(0).tolist()
    assert by_norm.probabilities() == pytest.approx(expected)
    restored = SubchainSampler(6, 2, by_gradient_norm=True)
    restored.load_state_dict(by_norm.state_dict())
    assert restored.probabilities() == by_norm.probabilities()
    with pytest.raises(ValueError, match="sub-chain statistics are for 6 inference steps, not 7"):
        SubchainSampler(7, 2).load_state_dict(by_norm.state_dict())
    for length, *limits in ((7, None, None), (2, 1, 4), (2, 2, 6), (2, 5, 3)):
        with pytest.raises(ValueError, match="may start at"):
            SubchainSampler(6, length, *limits)


# Unbiasedness, against the closed form of the linear-Gaussian chain


def sweep_with(schedule_of, fraction=1.0):
    def estimate(chain, x_T):
        trajectory = rollout(chain, x_T)
        schedule = schedule_of(chain.num_steps)._replace(fraction=fraction, transport=[0.7] * (chain.num_steps + 1))
        x_0 = trajectory.latents[0]
        return backward_sweep(
            chain,
            trajectory,
            schedule.draw(),
            reward_grad=chain.reward_grad(x_0),
            advantages=leave_one_out(chain.reward(x_0)),
        )

    return estimate


def adaptive_rlr():
    adaptive = AdaptiveMixing(LinearGaussianChain().num_steps)
    sweep = sweep_with(lambda num_steps: rlr(num_steps, adaptive, differentiable=True))
    return lambda chain, x_T: adaptive.update(sweep(chain, x_T))


def paper_rlr(rest, length=2, scale=0.02):
    """Equation 6 with a new start for every batch. The zeroth-order term is compared with a running mean."""
    running = RunningReward()

    def estimate(chain, x_T):
        start = SubchainSampler(chain.num_steps, length).draw()
        schedule = rlr_paper(chain.num_steps, start, length, rest)
        perturbation = WeightPerturbation(chain.parameters(), scale, random.getrandbits(62), schedule.perturbed)
        trajectory = rollout(PerturbedChain(chain, perturbation), x_T)
        x_0 = trajectory.latents[0]
        rewards = chain.reward(x_0)
        advantages = leave_one_out(rewards)
        backward_sweep(chain, trajectory, schedule, reward_grad=chain.reward_grad(x_0), advantages=advantages)
        perturbation.add_gradient(leave_one_out(rewards.mean()[None], running.mean).item())
        running.update(rewards)

    return estimate


def predicted_x0(schedule_of):
    baseline = PredictedReward(LinearGaussianChain().num_steps)

    def estimate(chain, x_T):
        steps = range(1, chain.num_steps + 1)
        trajectory = rollout(chain, x_T, predict=steps)
        x_0 = trajectory.latents[0]
        rewards = chain.reward(x_0)
        predicted = [torch.full_like(rewards, torch.nan), *(chain.reward(trajectory.predictions[k]) for k in steps)]
        predicted = torch.stack(predicted).detach()
        advantages = baseline.advantages(rewards, predicted)
        schedule = schedule_of(chain.num_steps)
        backward_sweep(chain, trajectory, schedule, reward_grad=chain.reward_grad(x_0), advantages=advantages)
        baseline.update(rewards, predicted)

    return estimate


def branching(pairs):
    def estimate(chain, x_T):
        branch(chain, rollout(chain, x_T[:4]), chain.reward, pairs)

    return estimate


UNBIASED = {
    "full_bp": sweep_with(full_bp),
    "likelihood_ratio": sweep_with(ddpo),
    "rlr_half": sweep_with(rlr_half),
    "rlr_adaptive": adaptive_rlr(),
    "rlr_paper_likelihood_ratio": paper_rlr("likelihood_ratio"),
    "rlr_paper_long_subchain": paper_rlr("likelihood_ratio", length=5),
    "rlr_paper_no_subchain": paper_rlr("likelihood_ratio", length=0),
    "rlr_paper_zeroth_order": paper_rlr("zeroth_order"),
    "likelihood_ratio_predicted_x0": predicted_x0(ddpo),
    "rlr_predicted_x0": predicted_x0(rlr_half),
    "branching": branching(pairs=3),
    "full_bp_with_drawn_steps": sweep_with(full_bp, fraction=0.5),
    "likelihood_ratio_with_drawn_steps": sweep_with(ddpo, fraction=0.3),
    "rlr_with_drawn_steps": sweep_with(rlr_half, fraction=0.4),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_on_the_linear_gaussian_chain(name):
    assert z_scores(UNBIASED[name]) < 5


@pytest.mark.parametrize("schedule_of", [lambda num_steps: truncated_bp(num_steps, 1), alignprop])
def test_truncation_is_biased(schedule_of):
    # Many small batches, since alignprop draws one K a batch.
    assert z_scores(sweep_with(schedule_of), batches=512, batch_size=64) > 20


def test_drawn_steps_without_their_weights_are_biased(monkeypatch):
    plain = Schedule.draw

    def unweighted(schedule):
        drawn = plain(schedule)
        return drawn._replace(weights=[min(w, 1.0) for w in drawn.weights])

    monkeypatch.setattr(Schedule, "draw", unweighted)
    assert z_scores(sweep_with(full_bp, fraction=0.5), batches=512, batch_size=64) > 20


@pytest.mark.parametrize("length", [0, 2])
def test_the_paper_without_its_other_steps_is_biased(length):
    """The ablations of the paper's table 5 that drop the zeroth-order term."""
    assert z_scores(paper_rlr("none", length), batches=512, batch_size=64) > 20


@pytest.mark.parametrize("gamma_1", [0.0, 0.4, 1.0])
def test_a_sum_with_a_black_box_part_is_unbiased(gamma_1):
    """R = R_d + R_b: R_d is the part of the first half of the coordinates, R_b the rest without its gradient."""

    def estimate(chain, x_T):
        trajectory = rollout(chain, x_T)
        parts, reward_grad = chain.parts(trajectory.latents[0]), chain.reward_grad(trajectory.latents[0])
        reward_grad[:, 2:] = 0
        black_box = leave_one_out(parts[:, 2:].sum(1))
        reward_grad = reward_grad + likelihood_ratio(chain, trajectory, 1, black_box)
        mixing = [0.6] * (chain.num_steps + 1)
        mixing[1] = gamma_1
        advantages = leave_one_out(parts.sum(1))
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=advantages)

    assert z_scores(estimate) < 5


def test_a_black_box_part_that_enters_by_the_advantages_only_is_biased():
    """Leaving R_b out of c^P_0 shrinks the black box by 1 - gamma_1."""

    def estimate(chain, x_T):
        trajectory = rollout(chain, x_T)
        reward_grad = chain.reward_grad(trajectory.latents[0])
        reward_grad[:, 2:] = 0
        mixing = [0.9] * (chain.num_steps + 1)
        advantages = leave_one_out(chain.reward(trajectory.latents[0]))
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=advantages)

    assert z_scores(estimate) > 20


def variance(schedule_of, baseline, batches=96, batch_size=64):
    torch.manual_seed(0)
    chain, draws = LinearGaussianChain(), []
    for _ in range(batches):
        trajectory = rollout(chain, torch.randn(batch_size, 4, dtype=torch.float64))
        x_0 = trajectory.latents[0]
        advantages = baseline(chain.reward(x_0))
        schedule = schedule_of(chain.num_steps)
        backward_sweep(chain, trajectory, schedule, reward_grad=chain.reward_grad(x_0), advantages=advantages)
        draws.append(gradients(chain))
    return torch.stack(draws).var(0).sum().item()


def test_variance_falls_with_a_baseline_and_again_with_mixing():
    raw = variance(ddpo, lambda rewards: rewards - 5)
    centred = variance(ddpo, leave_one_out)
    mixed = variance(lambda num_steps: rlr(num_steps, 0.9, differentiable=True), leave_one_out)
    assert raw > 3 * centred
    assert centred > 6 * mixed
