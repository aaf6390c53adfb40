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
from rlr_chains import EXACT, Mix, NonlinearChain, gradients, replay, reward_and_gradient, reward_of
from rlr_utils import (
    ClippedRatio,
    GaussianKL,
    Schedule,
    backward_sweep,
    ddpo,
    full_bp,
    likelihood_ratio,
    rollout,
    truncated_bp,
)


def setup(batch=6, keep=()):
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(batch, 3, dtype=torch.float64), keep=keep)
    return chain, trajectory, *reward_and_gradient(trajectory.latents[0])


def test_gamma_one_is_autograd_through_the_chain():
    chain, trajectory, _, reward_grad = setup()
    backward_sweep(chain, trajectory, full_bp(chain.num_steps).mixing, reward_grad=reward_grad)
    swept = gradients(chain)
    (-reward_of(replay(chain, trajectory)).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


@pytest.mark.parametrize("truncation_steps", [1, 2, 4])
def test_truncation_is_a_detached_chain(truncation_steps):
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
    advantages = rewards - rewards.mean()
    statistics = backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=advantages)
    swept = gradients(chain)
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        # The surrogate is -mean R, so a likelihood-ratio cotangent enters with the factor -1 / B.
        score = -likelihood_ratio(chain, trajectory, k, advantages) / len(rewards)
        x = Mix.apply(chain.mean(k, x), mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-reward_of(x).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
    expected = likelihood_ratio(chain, trajectory, 2, advantages).var(0).sum()
    torch.testing.assert_close(statistics.likelihood_ratio[2], expected, **EXACT)
    torch.testing.assert_close(statistics.pathwise[1], reward_grad.var(0).sum(), **EXACT)


def test_the_statistics_of_a_single_image_are_squares():
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


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_cotangent_replaces_the_likelihood_ratio(gamma):
    chain, trajectory, rewards, reward_grad = setup()
    mixing = [gamma] * (chain.num_steps + 1)

    def same(k, mean):
        assert not mean.requires_grad
        return likelihood_ratio(chain, trajectory, k, rewards)

    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
    plain = gradients(chain)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, cotangent=same)
    torch.testing.assert_close(gradients(chain), plain, **EXACT)
    with pytest.raises(ValueError, match="give one of them"):
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards, cotangent=same)


def test_excluded_steps_add_nothing_and_pass_nothing_on():
    chain, trajectory, rewards, reward_grad = setup()
    alone = []
    for mixing in ([None, 1.0, None, None, None, None], [None, None, 0.0, 1.0, None, None]):
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
        alone.append(gradients(chain))
    statistics = backward_sweep(
        chain,
        trajectory,
        [None, 1.0, 0.0, 1.0, None, None],
        reward_grad=reward_grad,
        advantages=rewards,
        parameters=list(chain.parameters()),
    )
    torch.testing.assert_close(gradients(chain), sum(alone), **EXACT)
    torch.testing.assert_close(statistics.gradient_norm[1], alone[0].norm(), **EXACT)
    assert statistics.gradient_norm.isnan().tolist() == [True, False, False, False, True, True]


def same_statistics(first, second):
    for row, other in zip(first, second):
        torch.testing.assert_close(row, other, rtol=0, atol=0, equal_nan=True)


def test_a_schedule_without_weights_is_its_mixing_alone():
    chain, trajectory, rewards, reward_grad = setup()
    options = {"reward_grad": reward_grad, "advantages": rewards}
    mixing = [None, 1.0, 0.3, 0.0, 0.9, 0.5]
    for stop_after in (5, 3):
        from_list = backward_sweep(chain, trajectory, mixing, stop_after=stop_after, **options)
        expected = gradients(chain)
        for schedule in (
            Schedule(mixing, stop_after),
            Schedule(mixing, stop_after, transport=[0.2] * 6),  # without weights no step needs it
            Schedule(mixing, stop_after, fraction=0.5),  # only `draw` uses it
            Schedule(mixing, stop_after, weights=[1.0] * 6),
        ):
            statistics = backward_sweep(chain, trajectory, schedule, **options)
            assert torch.equal(gradients(chain), expected)
            same_statistics(statistics, from_list)
        backward_sweep(chain, trajectory, Schedule(mixing, 4), stop_after=stop_after, **options)
        assert torch.equal(gradients(chain), expected)
    backward_sweep(chain, trajectory, tuple(mixing), stop_after=3, **options)
    assert torch.equal(gradients(chain), expected)
    backward_sweep(chain, trajectory, mixing=mixing, stop_after=3, **options)
    assert torch.equal(gradients(chain), expected)


@pytest.mark.parametrize("keep", [[], [2, 3], [1, 2, 3, 5]])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_weights_and_transport_are_a_surrogate_that_autograd_can_follow(gamma, keep):
    """The surrogate's step has the same value, but its derivative is w times that of the mean plus (1 - w) lambda."""
    chain, trajectory, rewards, reward_grad = setup(keep=keep)
    lambdas, weights = [None, 0.9, 0.8, 0.7, 1.1, 0.6], [None, 1.0, 2.0, 1 / 0.3, 0.0, 1.4]
    schedule = Schedule([None, 1.0] + [gamma] * 4, 5, transport=lambdas, weights=weights)
    advantages = rewards - rewards.mean()
    statistics = backward_sweep(chain, trajectory, schedule, reward_grad=reward_grad, advantages=advantages)
    swept = gradients(chain)
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        mean, w = chain.mean(k, x), weights[k]
        mean = mean.detach() + w * (mean - mean.detach()) + (1 - w) * lambdas[k] * (x - x.detach())
        score = -likelihood_ratio(chain, trajectory, k, advantages) / 6
        x = Mix.apply(mean, schedule.mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-reward_of(x).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
    assert not trajectory.kept
    # Step 4 is not computed, and step 5 is the last one.
    assert statistics.gain.isnan().tolist() == [True, False, False, False, True, True]
    x = trajectory.latents[1].detach().requires_grad_()
    (passed_on,) = torch.autograd.grad(chain.mean(1, x), x, reward_grad)
    gain = (passed_on * reward_grad).sum() / reward_grad.square().sum()
    torch.testing.assert_close(statistics.gain[1], gain, **EXACT)


@pytest.mark.parametrize("pathwise", [False, True])
def test_a_step_of_weight_two_and_one_of_weight_zero_average_to_the_whole(pathwise):
    """With a penalty, and with PPO's cotangent or backpropagation."""
    chain, trajectory, rewards, reward_grad = setup()
    base = NonlinearChain(num_steps=chain.num_steps, seed=7)
    mixing = [float(pathwise)] * (chain.num_steps + 1)

    def sweep(weight):
        weights = [1.0, 1.0, 1.0, weight, 1.0, 1.0]
        penalty = GaussianKL(chain, lambda k, x: base.mean(k, x).detach(), trajectory, weight=0.3)
        ratio = ClippedRatio(chain, trajectory, rewards)
        statistics = backward_sweep(
            chain,
            trajectory,
            Schedule(mixing, 5, weights=weights),
            penalty=penalty,
            parameters=list(chain.parameters()),
            **({"reward_grad": reward_grad} if pathwise else {"cotangent": ratio}),
        )
        assert set(penalty.divergences) == {k for k in range(1, 6) if weights[k] > 0}
        return gradients(chain), statistics.gradient_norm[3]

    (whole, norm), (twice, same_norm), (without, _) = (sweep(weight) for weight in (1.0, 2.0, 0.0))
    torch.testing.assert_close(norm, same_norm, **EXACT)  # the weight is not part of the norm
    torch.testing.assert_close((twice + without) / 2, whole, **EXACT)
    assert not torch.allclose(twice, whole)


def test_a_mean_that_ignores_its_input_passes_on_a_zero():
    class ForgetfulChain(NonlinearChain):
        def mean(self, k, x):
            return super().mean(k, torch.zeros_like(x.detach()) if k == 2 else x)

    chain = ForgetfulChain()
    trajectory = rollout(chain, torch.randn(6, 3, dtype=torch.float64))
    _, reward_grad = reward_and_gradient(trajectory.latents[0])
    backward_sweep(chain, trajectory, full_bp(chain.num_steps).mixing, reward_grad=reward_grad)
    swept = gradients(chain)
    (-reward_of(replay(chain, trajectory)).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)


def peak_saved_bytes(run):
    """The most bytes that autograd saved for backward at any one time during `run()`."""
    held, most = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor = tensor
            held += tensor.nbytes
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return most


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_memory_of_the_sweep_does_not_grow_with_the_steps(gamma):
    chain, trajectory, rewards, reward_grad = setup()

    def run(stop_after):
        mixing = [gamma] * (chain.num_steps + 1)
        backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards, stop_after=stop_after)

    # Two steps against five. A single step would not ask for the gradient of x_k.
    assert 0 < peak_saved_bytes(lambda: run(5)) == peak_saved_bytes(lambda: run(2))
    with_graph = peak_saved_bytes(lambda: reward_of(replay(chain, trajectory)).mean().backward())
    assert with_graph > 4 * peak_saved_bytes(lambda: run(5))


def test_invalid_input_is_refused_before_any_work():
    chain, trajectory, rewards, reward_grad = setup()
    chain.calls = 0
    half = [0.5] * (chain.num_steps + 1)
    both = {"reward_grad": reward_grad, "advantages": rewards}

    def refused(match, mixing=half, **options):
        with pytest.raises(ValueError, match=match):
            backward_sweep(chain, trajectory, mixing, **options)

    refused("mixing has 3 entries", [0.5] * 3, **both)
    refused("weights has 2 entries", Schedule(half, 5, weights=[1.0] * 2), **both)
    refused("transport has 7 entries", Schedule(half, 5, transport=[1.0] * 7), **both)
    refused("needs reward_grad", advantages=rewards)
    refused("needs advantages", reward_grad=reward_grad)
    refused("stop_after=9", stop_after=9, **both)
    refused("stop_after=0", stop_after=0, **both)
    refused("stop_after=6", Schedule(half, 6), **both)
    refused(r"mixing\[1\]=2.0 is not in", [2.0] * (chain.num_steps + 1), **both)
    refused("step 2, which is left out", [0, 1.0, None, 1.0, None, None], reward_grad=reward_grad)
    for wrong in (rewards[:1], rewards.expand(3, -1)):
        refused("advantages have shape", reward_grad=reward_grad, advantages=wrong)
    refused("reward_grad has shape", reward_grad=reward_grad[:1], advantages=rewards)
    ratio = ClippedRatio(chain, trajectory, rewards)
    drawn = Schedule(half, 5, weights=[1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    refused("depends on the means", drawn, reward_grad=reward_grad, cotangent=ratio)
    chain.sigma = lambda k: 0.0 if k == 2 else 1.0
    with pytest.raises(ValueError, match=r"sigma\(2\) is 0"):
        likelihood_ratio(chain, trajectory, 2, rewards)
    refused(r"sigma\(2\) is 0", **both)
    assert chain.calls == 0 and all(p.grad is None for p in chain.parameters())


def test_a_step_without_noise_can_be_swept_pathwise():
    chain, trajectory, rewards, reward_grad = setup()
    chain.sigma = lambda k: 0.0 if k == 2 else 0.2
    trajectory = rollout(chain, trajectory.latents[-1])
    rewards, reward_grad = reward_and_gradient(trajectory.latents[0])
    mixing = [None, 1.0, 1.0, 0.4, 0.4, 0.4]
    statistics = backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
    swept = gradients(chain)
    assert statistics.likelihood_ratio.isnan().tolist() == [True, False, True, False, False, False]
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        x = chain.mean(k, x)
        if mixing[k] < 1:
            x = Mix.apply(x, mixing[k], -likelihood_ratio(chain, trajectory, k, rewards) / len(rewards))
        x = x + chain.sigma(k) * trajectory.noises[k]
    (-reward_of(x).mean()).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
