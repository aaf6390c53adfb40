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
from rlr_testing import LinearGaussianChain, Mix, NonlinearChain, gradients
from rlr_utils import (
    AdaptiveMixing,
    ClippedRatio,
    GaussianKL,
    PerturbedChain,
    PredictedReward,
    RunningReward,
    Schedule,
    SubchainSampler,
    Trajectory,
    WeightPerturbation,
    alignprop,
    backward_sweep,
    branch,
    ddpo,
    full_bp,
    leave_one_out,
    likelihood_ratio,
    renoise,
    rlr,
    rlr_paper,
    rollout,
    truncated_bp,
)


EXACT = {"rtol": 1e-9, "atol": 1e-12}


def reward_of(x_0):
    return torch.sin(3 * x_0).sum(1) - x_0.square().sum(1) / 2


def setup(batch=6):
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(batch, 3, dtype=torch.float64))
    x_0 = trajectory.latents[0].clone().requires_grad_()
    rewards = reward_of(x_0)
    (reward_grad,) = torch.autograd.grad(rewards.sum(), x_0)
    return chain, trajectory, rewards.detach(), reward_grad


def replay(chain, trajectory, detach_before=None):
    """x_0 by running the chain again on the stored noises with a graph, cut in front of step `detach_before`."""
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        if k == detach_before:
            x = x.detach()
        x = chain.mean(k, x) + chain.sigma(k) * trajectory.noises[k]
    return x


def test_rollout_is_the_chain():
    chain, trajectory, _, _ = setup()
    assert len(trajectory.latents) == len(trajectory.noises) == chain.num_steps + 1
    for k in range(1, chain.num_steps + 1):
        step = chain.mean(k, trajectory.latents[k]) + chain.sigma(k) * trajectory.noises[k]
        torch.testing.assert_close(trajectory.latents[k - 1], step, **EXACT)
        assert not trajectory.latents[k - 1].requires_grad


def test_rollout_keeps_x_T_and_follows_its_generator():
    chain = NonlinearChain()
    x_T = torch.randn(4, 3, dtype=torch.float64)
    first = rollout(chain, x_T, torch.Generator().manual_seed(1))
    again = rollout(chain, x_T, torch.Generator().manual_seed(1))
    other = rollout(chain, x_T, torch.Generator().manual_seed(2))
    assert first.latents[chain.num_steps] is x_T
    assert torch.equal(first.latents[0], again.latents[0])
    assert not torch.equal(first.latents[0], other.latents[0])


def test_gamma_one_is_autograd_through_the_chain():
    chain, trajectory, _, reward_grad = setup()
    backward_sweep(chain, trajectory, full_bp(chain.num_steps).mixing, reward_grad=reward_grad)
    swept = gradients(chain)
    (-reward_of(replay(chain, trajectory)).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


@pytest.mark.parametrize("truncation_steps", [1, 2, 4])
def test_truncation_is_detaching(truncation_steps):
    chain, trajectory, _, reward_grad = setup()
    schedule = truncated_bp(chain.num_steps, truncation_steps)
    backward_sweep(chain, trajectory, schedule.mixing, reward_grad=reward_grad, stop_after=schedule.stop_after)
    swept = gradients(chain)
    (-reward_of(replay(chain, trajectory, detach_before=truncation_steps)).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


@pytest.mark.parametrize("per_step", [False, True])
def test_gamma_zero_is_the_reinforce_surrogate(per_step):
    chain, trajectory, rewards, _ = setup()
    advantages = rewards - rewards.mean()
    if per_step:
        advantages = advantages + torch.arange(chain.num_steps + 1, dtype=torch.float64)[:, None]
    backward_sweep(chain, trajectory, ddpo(chain.num_steps).mixing, advantages=advantages)
    swept = gradients(chain)
    log_prob = torch.zeros((), dtype=torch.float64)
    for k in range(1, chain.num_steps + 1):
        normal = torch.distributions.Normal(chain.mean(k, trajectory.latents[k]), chain.sigma(k))
        advantage = advantages[k] if per_step else advantages
        log_prob = log_prob + (advantage * normal.log_prob(trajectory.latents[k - 1]).sum(1)).mean()
    (-log_prob).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


def test_any_gamma_is_a_surrogate_that_autograd_can_follow():
    chain, trajectory, rewards, reward_grad = setup()
    mixing = [None, 1.0, 0.3, 0.0, 0.9, 0.5]
    statistics = backward_sweep(
        chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards - rewards.mean()
    )
    swept = gradients(chain)
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        # The surrogate is -mean R, so a likelihood-ratio cotangent enters with the factor -1 / B.
        score = -likelihood_ratio(chain, trajectory, k, rewards - rewards.mean()) / len(rewards)
        x = Mix.apply(chain.mean(k, x), mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-reward_of(x).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
    expected = likelihood_ratio(chain, trajectory, 2, rewards - rewards.mean()).var(0).sum()
    torch.testing.assert_close(statistics.likelihood_ratio[2], expected, **EXACT)
    torch.testing.assert_close(statistics.pathwise[1], reward_grad.var(0).sum(), **EXACT)


def test_the_statistics_of_a_single_picture_are_its_squares():
    chain, trajectory, rewards, reward_grad = setup(batch=1)
    statistics = backward_sweep(chain, trajectory, full_bp(chain.num_steps).mixing, reward_grad=reward_grad)
    torch.testing.assert_close(statistics.pathwise[1], reward_grad.square().sum(), **EXACT)


def test_the_sweep_adds_to_gradients_and_is_linear():
    chain, trajectory, rewards, reward_grad = setup()
    mixing = [0.5] * (chain.num_steps + 1)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
    once = gradients(chain)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
    backward_sweep(chain, trajectory, mixing, reward_grad=2 * reward_grad, advantages=2 * rewards)
    torch.testing.assert_close(gradients(chain), 3 * once, **EXACT)


def test_a_cotangent_replaces_the_likelihood_ratio():
    chain, trajectory, rewards, _ = setup()
    mixing = ddpo(chain.num_steps).mixing

    def same(k, mean):
        return likelihood_ratio(chain, trajectory, k, rewards)

    backward_sweep(chain, trajectory, mixing, advantages=rewards)
    plain = gradients(chain)
    backward_sweep(chain, trajectory, mixing, cotangent=same)
    torch.testing.assert_close(gradients(chain), plain, **EXACT)
    with pytest.raises(ValueError, match="give one of them"):
        backward_sweep(chain, trajectory, mixing, advantages=rewards, cotangent=same)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_divergence_from_the_base_model_reaches_the_parameters_alone(gamma):
    """Against autograd of the sum of KL_k with every state held fixed, beside the sweep of the reward."""
    chain, trajectory, rewards, reward_grad = setup()
    base = NonlinearChain(num_steps=chain.num_steps, seed=7)
    mixing = [gamma] * (chain.num_steps + 1)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
    plain = gradients(chain)

    def base_mean(k, x):
        with torch.no_grad():
            return base.mean(k, x)

    penalty = GaussianKL(chain, base_mean, trajectory, weight=0.3)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards, penalty=penalty)
    together = gradients(chain)
    divergences = []
    for k in range(1, chain.num_steps + 1):
        x, scale = trajectory.latents[k], torch.tensor(chain.sigma(k), dtype=torch.float64)
        step, other = (torch.distributions.Normal(mean, scale) for mean in (chain.mean(k, x), base_mean(k, x)))
        divergences.append(torch.distributions.kl_divergence(step, other).flatten(1).sum(1).mean())
    (0.3 * torch.stack(divergences).sum()).backward()
    torch.testing.assert_close(together - plain, gradients(chain), **EXACT)
    torch.testing.assert_close(
        torch.stack(list(penalty.divergences.values())), torch.stack(divergences).detach(), **EXACT
    )


def test_a_cotangent_in_place_of_the_likelihood_ratio_is_weighted_like_it():
    chain, trajectory, rewards, reward_grad = setup()
    half = [0.5] * (chain.num_steps + 1)

    def same(k, mean):
        return likelihood_ratio(chain, trajectory, k, rewards)

    backward_sweep(chain, trajectory, half, reward_grad=reward_grad, advantages=rewards)
    mixed = gradients(chain)
    backward_sweep(chain, trajectory, half, reward_grad=reward_grad, cotangent=same)
    torch.testing.assert_close(gradients(chain), mixed, **EXACT)


def test_steps_that_are_left_out_add_nothing_and_let_nothing_pass():
    chain, trajectory, rewards, reward_grad = setup()
    alone = []
    for mixing in ([None, 1.0, None, None, None, None], [None, None, 0.0, 1.0, None, None]):
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
        alone.append(gradients(chain))
    rows = backward_sweep(
        chain,
        trajectory,
        [None, 1.0, 0.0, 1.0, None, None],
        reward_grad=reward_grad,
        advantages=rewards,
        parameters=list(chain.parameters()),
    )
    torch.testing.assert_close(gradients(chain), sum(alone), **EXACT)
    torch.testing.assert_close(rows.gradient_norm[1], alone[0].norm(), **EXACT)
    assert rows.gradient_norm.isnan().tolist() == [True, False, False, False, True, True]


def test_the_weights_of_a_draw_have_a_mean_of_one():
    random.seed(0)
    schedule = rlr(6, 0.5, differentiable=True)._replace(fraction=0.3, stop_after=5)
    assert schedule.probabilities == {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.3, 5: 0.3}
    draws = torch.tensor([schedule.draw_weights() for _ in range(4000)])
    assert (draws[:, [0, 1, 2, 3, 6]] == 1).all()
    assert draws[:, 4:6].unique().tolist() == [0.0, pytest.approx(1 / 0.3)]
    # Each step on its own: with a product whose mean is one, too.
    for found in (draws[:, 4], draws[:, 5], draws[:, 4] * draws[:, 5]):
        assert (found.mean() - 1).abs() < 4 * found.std() / 4000**0.5
    assert schedule._replace(fraction=1.0).draw_weights() == [1.0] * 7


@pytest.mark.parametrize("keep", [[], [2, 3], [1, 2, 3, 5]])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_a_sweep_that_leaves_steps_out_is_a_surrogate_that_autograd_can_follow(gamma, keep):
    """Of a chain whose step has the same value, but w times the derivatives of the mean and 1 - w times that of lambda x."""
    chain, lambdas, weights = NonlinearChain(), [None, 0.9, 0.8, 0.7, 1.1, 0.6], [None, 1.0, 2.0, 1 / 0.3, 0.0, 1.4]
    trajectory = rollout(chain, torch.randn(6, 3, dtype=torch.float64), keep=keep)
    x_0 = trajectory.latents[0].clone().requires_grad_()
    rewards = reward_of(x_0)
    (reward_grad,) = torch.autograd.grad(rewards.sum(), x_0)
    advantages = rewards.detach() - rewards.mean().item()
    mixing = [None, 1.0] + [gamma] * 4
    statistics = backward_sweep(
        chain,
        trajectory,
        mixing,
        reward_grad=reward_grad,
        advantages=advantages,
        weights=weights,
        transport=lambdas,
    )
    swept = gradients(chain)
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        mean, w = chain.mean(k, x), weights[k]
        mean = mean.detach() + w * (mean - mean.detach()) + (1 - w) * lambdas[k] * (x - x.detach())
        score = -likelihood_ratio(chain, trajectory, k, advantages) / 6
        x = Mix.apply(mean, mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-reward_of(x).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
    assert statistics.gain.isnan().tolist() == [True, False, False, False, True, True]  # step 5 hands nothing on
    x = trajectory.latents[1].detach().requires_grad_()
    (handed_on,) = torch.autograd.grad(chain.mean(1, x), x, reward_grad)
    gain = (handed_on * reward_grad).sum() / reward_grad.square().sum()
    torch.testing.assert_close(statistics.gain[1], gain, **EXACT)


@pytest.mark.parametrize("hands_on", [False, True])
def test_a_step_taken_twice_and_left_out_is_in_the_mean_the_whole(hands_on):
    """With PPO's cotangent, or backpropagation where one is handed on, and with the divergence from a base model."""
    chain, trajectory, rewards, reward_grad = setup()
    base = NonlinearChain(num_steps=chain.num_steps, seed=7)
    mixing = [1.0] * (chain.num_steps + 1) if hands_on else ddpo(chain.num_steps).mixing

    def sweep(weight):
        weights = [1.0, 1.0, 1.0, weight, 1.0, 1.0]
        penalty = GaussianKL(chain, lambda k, x: base.mean(k, x).detach(), trajectory, weight=0.3)
        worth = {"reward_grad": reward_grad} if hands_on else {"cotangent": ClippedRatio(chain, trajectory, rewards)}
        parameters = list(chain.parameters())
        rows = backward_sweep(
            chain, trajectory, mixing, penalty=penalty, weights=weights, parameters=parameters, **worth
        )
        norms.append(rows.gradient_norm[3])
        assert set(penalty.divergences) == {k for k in range(1, 6) if weights[k] > 0}
        return gradients(chain)

    norms = []
    whole, twice, left_out = (sweep(weight) for weight in (1.0, 2.0, 0.0))
    torch.testing.assert_close(norms[0], norms[1], **EXACT)  # the step's own, whatever its weight
    torch.testing.assert_close((twice + left_out) / 2, whole, **EXACT)
    assert not torch.allclose(twice, whole)


def test_a_cotangent_that_looks_at_means_is_not_handed_on_past_a_step_left_out():
    chain, trajectory, rewards, reward_grad = setup()
    ratio, weights = ClippedRatio(chain, trajectory, rewards), [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="looks at the means"):
        backward_sweep(chain, trajectory, [0.5] * 6, reward_grad=reward_grad, cotangent=ratio, weights=weights)


class Counting(NonlinearChain):
    """Counts its calls; predicts its mean, so that a rollout with predictions has graphs to keep, too."""

    calls = 0

    def mean(self, k, x):
        self.calls += 1
        return super().mean(k, x)

    def predict(self, k, x):
        mean = self.mean(k, x)
        return mean, 2 * mean

    def renoise(self, x_0, noise):
        return x_0 + 0.1 * noise


@pytest.mark.parametrize("predict", [(), (2, 3)])
def test_steps_whose_graph_was_kept_are_not_computed_again(predict):
    chain = Counting()
    x_T, generator = torch.randn(6, 3, dtype=torch.float64), torch.Generator()
    plain = rollout(chain, x_T, generator.manual_seed(1), predict)
    kept = rollout(chain, x_T, generator.manual_seed(1), predict, keep=[1, 2, 4])
    for k in range(chain.num_steps + 1):
        assert torch.equal(plain.latents[k], kept.latents[k]) and not kept.latents[k].requires_grad
    for k in predict:
        assert torch.equal(plain.predictions[k], kept.predictions[k]) and not kept.predictions[k].requires_grad
    x_0 = plain.latents[0].clone().requires_grad_()
    rewards = reward_of(x_0)
    (reward_grad,) = torch.autograd.grad(rewards.sum(), x_0)
    found = []
    for trajectory, calls in ((plain, 5), (kept, 2), (kept, 5)):  # a second sweep finds no graph left
        chain.calls = 0
        rows = backward_sweep(
            chain, trajectory, [None] + [1.0] + [0.6] * 4, reward_grad=reward_grad, advantages=rewards.detach()
        )
        assert chain.calls == calls
        found.append((gradients(chain), rows))
    for gradient, rows in found[1:]:
        assert torch.equal(gradient, found[0][0])
        for row, expected in zip(rows, found[0][1]):
            torch.testing.assert_close(row, expected, rtol=0, atol=0, equal_nan=True)


def test_a_last_step_with_its_graph_is_not_computed_again():
    chain = Counting()
    trajectory = renoise(chain, torch.randn(6, 3, dtype=torch.float64))
    assert chain.calls == 1 and not trajectory.latents[0].requires_grad
    x_0 = trajectory.latents[0].clone().requires_grad_()
    (reward_grad,) = torch.autograd.grad(reward_of(x_0).sum(), x_0)
    backward_sweep(chain, trajectory, [1.0] * 6, reward_grad=reward_grad, stop_after=1)
    swept = gradients(chain)
    assert chain.calls == 1
    again = Trajectory(trajectory.latents, trajectory.noises)
    backward_sweep(chain, again, [1.0] * 6, reward_grad=reward_grad, stop_after=1)
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


def test_a_mean_that_ignores_its_input_passes_on_a_zero():
    class Forgetful(NonlinearChain):
        def mean(self, k, x):
            return super().mean(k, torch.zeros_like(x.detach()) if k == 2 else x)

    chain = Forgetful()
    trajectory = rollout(chain, torch.randn(6, 3, dtype=torch.float64))
    x_0 = trajectory.latents[0].clone().requires_grad_()
    (reward_grad,) = torch.autograd.grad(reward_of(x_0).sum(), x_0)
    backward_sweep(chain, trajectory, full_bp(chain.num_steps).mixing, reward_grad=reward_grad)
    swept = gradients(chain)
    (-reward_of(replay(chain, trajectory)).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


def most_saved(run):
    """The most bytes that autograd kept for backward at any one time during `run()`."""
    held, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor = tensor
            held += tensor.nbytes
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return most


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_memory_of_all_steps_is_that_of_one(gamma):
    chain, trajectory, rewards, reward_grad = setup()

    def run(stop_after):
        mixing = [gamma] * (chain.num_steps + 1)
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards, stop_after=stop_after)

    # Two steps against five: the first also asks for the gradient of x_k, as all do that a pathwise cotangent passes.
    assert 0 < most_saved(lambda: run(5)) == most_saved(lambda: run(2))
    with_graph = most_saved(lambda: reward_of(replay(chain, trajectory)).mean().backward())
    assert with_graph > 4 * most_saved(lambda: run(5))


def test_bad_schedules_are_refused_before_any_work():
    chain, trajectory, rewards, reward_grad = setup()
    half = [0.5] * (chain.num_steps + 1)
    with pytest.raises(ValueError, match="mixing has 3 entries"):
        backward_sweep(chain, trajectory, [0.5] * 3, reward_grad=reward_grad, advantages=rewards)
    with pytest.raises(ValueError, match="needs reward_grad"):
        backward_sweep(chain, trajectory, half, advantages=rewards)
    with pytest.raises(ValueError, match="needs advantages"):
        backward_sweep(chain, trajectory, half, reward_grad=reward_grad)
    with pytest.raises(ValueError, match="stop_after=9"):
        backward_sweep(chain, trajectory, half, reward_grad=reward_grad, advantages=rewards, stop_after=9)
    with pytest.raises(ValueError, match="not in"):
        backward_sweep(chain, trajectory, [2.0] * (chain.num_steps + 1), reward_grad=reward_grad, advantages=rewards)
    with pytest.raises(ValueError, match="left out"):
        backward_sweep(chain, trajectory, [0, 1.0, None, 1.0, None, None], reward_grad=reward_grad)
    for wrong in (rewards[:1], rewards.expand(3, -1)):
        with pytest.raises(ValueError, match="advantages have shape"):
            backward_sweep(chain, trajectory, half, reward_grad=reward_grad, advantages=wrong)
    with pytest.raises(ValueError, match="reward_grad has shape"):
        backward_sweep(chain, trajectory, half, reward_grad=reward_grad[:1], advantages=rewards)
    chain.sigma = lambda k: 0.0 if k == 2 else 1.0
    with pytest.raises(ValueError, match=r"sigma\(2\) is 0"):
        likelihood_ratio(chain, trajectory, 2, rewards)
    with pytest.raises(ValueError, match=r"sigma\(2\) is 0"):
        backward_sweep(chain, trajectory, half, reward_grad=reward_grad, advantages=rewards)
    assert all(p.grad is None for p in chain.parameters())


def z_scores(estimate, batches=128, batch_size=256, seed=0):
    """Largest |z| over the coordinates of the mean of `estimate(chain, trajectory)` against the closed form."""
    torch.manual_seed(seed)
    chain = LinearGaussianChain()
    (-chain.expected_reward()).backward()
    truth = gradients(chain)
    draws = []
    for _ in range(batches):
        trajectory = rollout(chain, torch.randn(batch_size, 4, dtype=torch.float64))
        estimate(chain, trajectory)
        draws.append(gradients(chain))
    draws = torch.stack(draws)
    return ((draws.mean(0) - truth) / (draws.std(0) / batches**0.5)).abs().max().item()


def sweep_with(schedule_of, fraction=1.0):
    def estimate(chain, trajectory):
        schedule = schedule_of(chain.num_steps)._replace(fraction=fraction)
        x_0 = trajectory.latents[0]
        return backward_sweep(
            chain,
            trajectory,
            schedule.mixing,
            reward_grad=chain.reward_grad(x_0),
            advantages=leave_one_out(chain.reward(x_0)),
            stop_after=schedule.stop_after,
            weights=schedule.draw_weights(),
            transport=[0.7] * (chain.num_steps + 1),
        )

    return estimate


def adaptive_rlr():
    adaptive = AdaptiveMixing(LinearGaussianChain().num_steps)

    sweep = sweep_with(lambda num_steps: rlr(num_steps, adaptive, differentiable=True))
    return lambda chain, trajectory: adaptive.update(sweep(chain, trajectory))


def paper_rlr(rest, length=2, scale=0.02):
    """Equation 6 with a new start at every batch; the zeroth-order term is compared with a running mean."""
    running = RunningReward()

    def estimate(chain, trajectory):
        start = SubchainSampler(chain.num_steps, length).draw()
        schedule = rlr_paper(chain.num_steps, start, length, rest)
        perturbation = WeightPerturbation(chain.parameters(), scale, random.getrandbits(62), schedule.perturbed)
        if schedule.perturbed:
            trajectory = rollout(PerturbedChain(chain, perturbation), trajectory.latents[chain.num_steps])
        x_0 = trajectory.latents[0]
        rewards = chain.reward(x_0)
        backward_sweep(
            chain,
            trajectory,
            schedule.mixing,
            reward_grad=chain.reward_grad(x_0),
            advantages=leave_one_out(rewards),
            stop_after=schedule.stop_after,
        )
        perturbation.add_gradient(leave_one_out(rewards.mean()[None], running.mean).item())
        running.update(rewards)

    return estimate


def predicted_x0(schedule_of):
    baseline = PredictedReward(LinearGaussianChain().num_steps)

    def estimate(chain, trajectory):
        trajectory = rollout(chain, trajectory.latents[chain.num_steps], predict=range(1, chain.num_steps + 1))
        x_0 = trajectory.latents[0]
        rewards = chain.reward(x_0)
        with torch.no_grad():
            predicted = torch.stack(
                [torch.full_like(rewards, torch.nan)]
                + [chain.reward(trajectory.predictions[k]) for k in range(1, chain.num_steps + 1)]
            )
        backward_sweep(
            chain,
            trajectory,
            schedule_of(chain.num_steps).mixing,
            reward_grad=chain.reward_grad(x_0),
            advantages=baseline.advantages(rewards, predicted),
        )
        baseline.update(rewards, predicted)

    return estimate


def branching(pairs):
    def estimate(chain, trajectory):
        """The average over a few pictures, each with its own step."""
        pictures = 4
        for i in range(pictures):
            single = Trajectory([x[i : i + 1] for x in trajectory.latents], None)
            k = random.randint(1, chain.num_steps)
            branch(chain, chain, single, k, chain.reward, pairs, weight=chain.num_steps / pictures)

    return estimate


UNBIASED = {
    "full_bp": sweep_with(full_bp),
    "likelihood_ratio": sweep_with(ddpo),
    "rlr_half": sweep_with(lambda num_steps: rlr(num_steps, 0.5, differentiable=True)),
    "rlr_adaptive": adaptive_rlr(),
    "rlr_paper_likelihood_ratio": paper_rlr("likelihood_ratio"),
    "rlr_paper_long_subchain": paper_rlr("likelihood_ratio", length=5),
    "rlr_paper_no_subchain": paper_rlr("likelihood_ratio", length=0),
    "rlr_paper_zeroth_order": paper_rlr("zeroth_order"),
    "likelihood_ratio_predicted_x0": predicted_x0(ddpo),
    "rlr_predicted_x0": predicted_x0(lambda num_steps: rlr(num_steps, 0.5, differentiable=True)),
    "branching": branching(pairs=3),
    "full_bp_of_some_steps": sweep_with(full_bp, fraction=0.5),
    "likelihood_ratio_of_some_steps": sweep_with(ddpo, fraction=0.3),
    "rlr_of_some_steps": sweep_with(lambda num_steps: rlr(num_steps, 0.5, differentiable=True), fraction=0.4),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_on_the_linear_gaussian_chain(name):
    random.seed(0)
    assert z_scores(UNBIASED[name]) < 5


@pytest.mark.parametrize("schedule_of", [lambda num_steps: truncated_bp(num_steps, 1), alignprop])
def test_truncation_fails_the_same_test(schedule_of):
    random.seed(0)
    # Many small batches, since alignprop draws one K a batch.
    assert z_scores(sweep_with(schedule_of), batches=512, batch_size=64) > 20


def test_some_steps_without_their_weight_fail_it_too(monkeypatch):
    plain = Schedule.draw_weights
    random.seed(0)
    monkeypatch.setattr(Schedule, "draw_weights", lambda schedule: [min(w, 1.0) for w in plain(schedule)])
    assert z_scores(sweep_with(full_bp, fraction=0.5), batches=512, batch_size=64) > 20


@pytest.mark.parametrize("length", [0, 2])
def test_the_paper_without_its_rest_fails_it_too(length):
    """The ablations of the paper's table 5 that drop the zeroth-order term."""
    random.seed(0)
    assert z_scores(paper_rlr("none", length), batches=512, batch_size=64) > 20


@pytest.mark.parametrize("gamma_1", [0.0, 0.4, 1.0])
def test_a_sum_with_a_black_box_part_is_unbiased(gamma_1):
    """R = R_d + R_b with R_d the first half of the coordinates, R_b the rest without its gradient."""

    def estimate(chain, trajectory):
        error = chain.target - trajectory.latents[0]
        parts = -error.square() / 2
        differentiable, black_box = parts[:, :2].sum(1), parts[:, 2:].sum(1)
        reward_grad = torch.cat([error[:, :2], torch.zeros_like(error[:, 2:])], dim=1)
        reward_grad = reward_grad + likelihood_ratio(chain, trajectory, 1, leave_one_out(black_box))
        mixing = [0.6] * (chain.num_steps + 1)
        mixing[1] = gamma_1
        advantages = leave_one_out(differentiable + black_box)
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=advantages)

    assert z_scores(estimate) < 5


def test_mixing_only_the_whole_reward_at_the_last_step_would_be_biased():
    """What the test above guards against: leaving R_b out of c^P_0 shrinks the black box by 1 - gamma_1."""

    def estimate(chain, trajectory):
        error = chain.target - trajectory.latents[0]
        reward_grad = torch.cat([error[:, :2], torch.zeros_like(error[:, 2:])], dim=1)
        mixing = [0.9] * (chain.num_steps + 1)
        advantages = leave_one_out(-error.square().sum(1) / 2)
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=advantages)

    assert z_scores(estimate) > 20
