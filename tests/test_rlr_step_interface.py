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
"""`RLRStep` as a training loop uses it: randomness, schedules, what "auto" stands for, metrics and checkpoints."""

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from rlr_chains import (
    EXACT,
    AdaptedChain,
    ImageChain,
    ImageReward,
    LinearGaussianChain,
    NonlinearChain,
    gradients,
    reward_and_gradient,
)
from rlr_utils import Batch, RLRStep, Trajectory, leave_one_out


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)


def smooth(x_0, with_gradient):
    rewards, gradient = reward_and_gradient(x_0)
    return rewards, gradient if with_gradient else None


def black_box(x_0, with_gradient):
    assert not with_gradient
    return (x_0 > 0.2).double().sum(1), None


def noise(batch, dim=3):
    return torch.randn(batch, dim, dtype=torch.float64)


def image_batch(network, size, kind="smooth"):
    """The arguments of `RLRStep.rollout` for an `ImageChain`."""
    chain = ImageChain(network, noise(size, 6))
    return (
        chain,
        torch.randn(size, *ImageChain.shape, dtype=torch.float64),
        ImageReward(kind, torch.ones(size).double()),
    )


def test_importing_rlr_utils_imports_torch_only():
    heavy = ("diffusers", "accelerate", "peft", "transformers", "datasets", "huggingface_hub")
    code = f"import sys, rlr_utils; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_training_loop_in_a_few_lines():
    chain = NonlinearChain()
    rlr = RLRStep(chain.num_steps, differentiable=True)
    optimizer = torch.optim.SGD(chain.parameters(), lr=1e-2)
    means = []
    for _ in range(40):
        batches = [rlr.rollout(chain, noise(size), smooth) for size in (10, 6)]
        rlr.backward(batches)
        optimizer.step()
        optimizer.zero_grad()
        means.append(torch.cat([batch.rewards for batch in batches]).mean().item())
    batch = batches[0]
    assert isinstance(batch, Batch) and isinstance(batch.trajectory, Trajectory)
    assert batch.x_0 is batch.trajectory.latents[0] and batch.x_0.shape == (10, 3)
    assert torch.equal(batch.rewards, smooth(batch.x_0, False)[0]) and batch.rewards.shape == (10,)
    assert sum(means[-10:]) / 10 > sum(means[:5]) / 5 + 1


def test_a_black_box_is_trained_too():
    chain = LinearGaussianChain(num_steps=5)
    rlr = RLRStep(5, differentiable=False)
    optimizer = torch.optim.SGD(chain.parameters(), lr=1e-2)
    means = []
    for _ in range(40):
        batch = rlr.rollout(chain, noise(32, 4), lambda x_0, with_gradient: (chain.reward(x_0), None))
        rlr.backward([batch])
        optimizer.step()
        optimizer.zero_grad()
        means.append(batch.rewards.mean().item())
    assert sum(means[-5:]) > 0.5 * sum(means[:5])  # the reward is negative


def test_score_is_called_with_autograd_on_and_its_results_are_detached():
    chain, seen = NonlinearChain(), []

    def score(x_0, with_gradient):
        seen.append((torch.is_grad_enabled(), with_gradient, x_0.requires_grad))
        x_0 = x_0.requires_grad_()
        rewards = x_0.square().sum(1)
        (gradient,) = torch.autograd.grad(rewards.sum(), x_0, create_graph=True)
        return rewards, gradient

    with torch.no_grad():
        batch = RLRStep(chain.num_steps).rollout(chain, noise(4), score)
        RLRStep(chain.num_steps, estimator="ddpo").rollout(chain, noise(4), score)
    assert seen == [(True, True, False), (True, False, False)]
    assert not batch.rewards.requires_grad and not batch.reward_grad.requires_grad
    torch.testing.assert_close(batch.reward_grad, 2 * batch.x_0, **EXACT)


def test_the_noises_of_the_trajectory_have_unit_variance():
    chain = NonlinearChain()
    trajectory = RLRStep(chain.num_steps).rollout(chain, noise(4000), smooth).trajectory
    for k in range(1, chain.num_steps + 1):
        assert trajectory.noises[k].std() == pytest.approx(1, abs=0.03)
        step = chain.mean(k, trajectory.latents[k]) + chain.sigma(k) * trajectory.noises[k]
        torch.testing.assert_close(trajectory.latents[k - 1], step, **EXACT)


def test_the_same_seeds_give_the_same_batches():
    """Of torch's and Python's global generators; with a generator of its own, a rollout leaves torch's alone."""

    def batches(seed, own=None):
        torch.manual_seed(seed)
        random.seed(seed)
        network = NonlinearChain(num_steps=8, dim=6)
        torch.manual_seed(seed)
        rlr = RLRStep(8, mixing=1.0, sweep_fraction=0.5)
        found = []
        for _ in range(2):
            chain, x_T, score = image_batch(network, 3)
            generator = None if own is None else torch.Generator().manual_seed(own)
            before = torch.get_rng_state()
            found.append(rlr.rollout(chain, x_T, score, generator))
            assert torch.equal(before, torch.get_rng_state()) == (own is not None)
        return found

    first, again, other = batches(1), batches(1), batches(2)
    assert all(torch.equal(a.x_0, b.x_0) and a.schedule == b.schedule for a, b in zip(first, again))
    assert not torch.equal(first[0].x_0, other[0].x_0) and first[0].schedule != other[0].schedule
    assert not torch.equal(first[0].trajectory.noises[1], first[1].trajectory.noises[1])
    own = batches(1, own=7)
    assert torch.equal(own[0].trajectory.noises[1], own[1].trajectory.noises[1])
    expected = torch.randn(3, *ImageChain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(own[0].trajectory.noises[8], expected)


def test_the_batches_of_an_optimizer_step_share_a_schedule():
    """The truncation of alignprop and the start of a sub-chain; each batch draws the steps that are swept by itself."""
    network = NonlinearChain(num_steps=8, dim=6)
    for settings in ({"estimator": "alignprop"}, {"estimator": "rlr_paper", "rest": "none"}):
        rlr, found = RLRStep(8, sweep_fraction=0.5, **settings), []
        for _ in range(12):
            batches = [rlr.rollout(*image_batch(network, 2)) for _ in range(4)]
            rlr.backward(batches)
            (shared,) = {str(batch.schedule._replace(weights=None)) for batch in batches}
            found.append((shared, len({str(batch.schedule.weights) for batch in batches})))
        assert len({shared for shared, _ in found}) > 3 and max(draws for _, draws in found) > 1


# What "auto" stands for


@pytest.mark.parametrize(
    "fraction, reward, settings",
    [
        (0.5, {}, {}),
        (0.5, {}, {"mixing": 0.96}),
        (1.0, {}, {"mixing": 0.94}),
        (1.0, {}, {"mixing": 0.6}),
        (0.5, {}, {"mixing": 0.6, "sweep_fraction": 0.5}),
        (0.25, {"differentiable": False}, {"sweep_fraction": 0.25}),
        (1.0, {"differentiable": False}, {}),
        (1.0, {"differentiable": False}, {"mixing": 1.0}),
        (1.0, {"black_box": True}, {"mixing": 1.0}),
        (1.0, {}, {"estimator": "full_bp"}),
        (1.0, {}, {"estimator": "ddpo"}),
        (0.25, {}, {"estimator": "full_bp", "sweep_fraction": 0.25}),
    ],
)
def test_half_of_the_steps_are_swept_where_the_gradient_has_a_share_of_95_percent(fraction, reward, settings):
    rlr = RLRStep(9, **reward, **settings)
    schedule = rlr.draw_schedule()
    assert schedule.fraction == fraction
    assert rlr.swept_steps(schedule) == 3 + 6 * fraction


def test_the_share_of_the_gradient_is_the_mean_over_the_steps():
    """As the adaptive mixing finds it. The last step, whose share is 1, does not count."""
    rlr = RLRStep(3)
    for gammas, fraction in (([0.0, 1.0, 1.0, 0.92], 0.5), ([0.0, 1.0, 1.0, 0.88], 1.0), ([0, 1.0, 0.92, 0.92], 1.0)):
        rlr.adaptive.gammas = lambda differentiable, gammas=gammas: list(gammas)
        assert rlr.draw_schedule().fraction == fraction


@pytest.mark.parametrize(
    "steps, reward, settings",
    [
        ([], {}, {}),
        ([2, 3, 4], {}, {"mixing": 0.9}),
        ([2, 3], {}, {"mixing": 0.9, "baseline_steps": 3}),
        ([], {}, {"mixing": 0.96}),
        ([], {}, {"mixing": 0.9, "baseline": "leave_one_out"}),
        ([1, 2, 3], {}, {"mixing": 0.96, "baseline": "predicted_x0", "baseline_steps": 3}),
        ([1, 2, 3, 4, 5, 6, 7, 8], {"differentiable": False}, {}),
        ([1, 2], {"differentiable": False}, {"baseline_steps": 2}),
        ([1, 2, 3, 4, 5, 6, 7, 8], {"black_box": True}, {}),
        ([], {"differentiable": False}, {"branches": 2}),
        ([], {"differentiable": False}, {"estimator": "ddpo"}),
        ([1, 2, 3, 4, 5, 6, 7, 8], {"differentiable": False}, {"estimator": "ddpo", "baseline": "predicted_x0"}),
    ],
)
def test_the_default_baseline_predicts_where_that_pays(steps, reward, settings):
    """All steps of a black box. With a gradient the last half of the chain, where the likelihood ratio has a share."""
    rlr = RLRStep(8, **reward, **settings)
    assert rlr.predicted_steps(rlr.draw_schedule()) == steps


def test_a_chain_without_predictions_gets_leave_one_out():
    chain = NonlinearChain()
    rlr = RLRStep(chain.num_steps, differentiable=False)
    for _ in range(2):
        batches = [rlr.rollout(chain, noise(size), black_box) for size in (4, 3)]
        metrics = rlr.backward(batches)
        assert metrics["predicted_steps"] == 0 and batches[0].predicted is None
        advantages = torch.cat([batch.advantages["total"] for batch in batches])
        torch.testing.assert_close(advantages, leave_one_out(torch.cat([batch.rewards for batch in batches])))


def test_predictions_are_scored_without_a_gradient_and_released():
    network = NonlinearChain(num_steps=4, dim=6)
    rlr = RLRStep(4, mixing=0.5, baseline="predicted_x0", baseline_steps=2)
    chain, x_T, score = image_batch(network, 3)
    batch = rlr.rollout(chain, x_T, score)
    assert score.calls == 3 and network.calls == 4 and not batch.trajectory.predictions
    assert batch.predicted["total"].isnan().all(0).tolist() == [True, False, False, True, True]
    for k in (1, 2):
        expected = score.total(chain.predict(k, batch.trajectory.latents[k])[1])
        torch.testing.assert_close(batch.predicted["total"][:, k], expected.detach(), **EXACT)
    assert rlr.backward([batch])["predicted_steps"] == 2


# Costs and metrics


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("smooth", {}),
        ("smooth", {"mixing": 1.0, "sweep_fraction": 0.3, "keep_graphs": 5}),
        ("smooth", {"estimator": "full_bp", "kl_weight": 0.1}),
        ("smooth", {"estimator": "truncated_bp", "truncation_steps": 2, "keep_graphs": 1}),
        ("smooth", {"estimator": "alignprop", "keep_graphs": 2}),
        ("smooth", {"estimator": "draft_lv", "lv_samples": 3}),
        ("smooth", {"estimator": "rlr_paper"}),
        ("smooth", {"estimator": "ddpo", "kl_weight": 0.1, "keep_graphs": 2}),
        ("black box", {}),
        ("black box", {"branches": 2}),
    ],
    ids=str,
)
def test_the_expected_calls_are_those_that_are_counted(kind, settings, monkeypatch):
    """Forward passes without a graph, and steps that are computed with one. The truncation of alignprop and the step of
    the branches take all values equally often."""
    monkeypatch.setattr(random, "randint", lambda low, high, values=itertools.cycle(range(1, 7)): next(values))
    network = AdaptedChain(num_steps=6, dim=6)
    settings = {"parameters": network.adapter.parameters(), **settings}
    if "kl_weight" in settings:
        settings["base_model"] = network.base_model
    rlr = RLRStep(6, kind == "smooth", **settings)
    rlr._learn = lambda seen: None  # so that all schedules are alike
    calls = rlr.expected_calls(rlr.draw_schedule())
    schedules = [rlr.draw_schedule() for _ in range(5)]  # 6 with the one above
    assert len({schedule.stop_after for schedule in schedules}) == (5 if "alignprop" in settings.values() else 1)
    for _ in range(180):
        rlr.backward([rlr.rollout(*image_batch(network, 1, kind))])
    assert network.images[False] / 180 == pytest.approx(calls.forward, rel=0.03)
    assert network.images[True] / 180 == pytest.approx(calls.swept, rel=0.03)


def test_the_metrics_are_means_over_images():
    network = AdaptedChain(num_steps=4, dim=6)
    settings = {"kl_weight": 0.1, "base_model": network.base_model, "num_inner_epochs": 2, "ppo_clip_range": 0.05}
    rlr = RLRStep(4, estimator="ddpo", baseline="predicted_x0", **settings)
    batches = [rlr.rollout(*image_batch(network, size)) for size in (1, 5)]
    first = rlr.backward(batches)
    assert first["gamma_mean"] == 0.0 and first["swept_steps"] == 4 and first["clip_fraction"] == 0.0
    with torch.no_grad():
        for p in network.adapter.parameters():
            p += 0.1 * torch.randn_like(p)
    state = rlr.state_dict()
    metrics, divergences, clipped = rlr.backward(batches), [], []
    assert rlr.state_dict() == state  # the rewards are compared once
    for batch in batches:
        for k in range(1, 5):
            x, sigma = batch.trajectory.latents[k], batch.chain.sigma(k)
            with torch.no_grad():
                mean = batch.chain.mean(k, x)
                with network.base_model():
                    base = batch.chain.mean(k, x)
            normal, old = (torch.distributions.Normal(m, sigma) for m in (mean, base))
            divergences.append(torch.distributions.kl_divergence(normal, old).flatten(1).sum(1))
            drawn = batch.trajectory.latents[k - 1]
            old = torch.distributions.Normal(drawn - sigma * batch.trajectory.noises[k], sigma)
            ratio = (normal.log_prob(drawn) - old.log_prob(drawn)).flatten(1).sum(1).exp()
            advantages = batch.advantages["total"][k]
            clipped.append((ratio > 1.05) & (advantages > 0) | (ratio < 0.95) & (advantages < 0))
    assert metrics["kl"] == pytest.approx(torch.cat(divergences).sum().item() / 6)
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["clip_fraction"] == pytest.approx(torch.cat(clipped).double().mean().item())


def test_a_divergence_counts_by_the_weight_of_its_step():
    network = AdaptedChain(num_steps=6, dim=6)
    rlr = RLRStep(6, estimator="full_bp", kl_weight=0.1, base_model=network.base_model)
    arguments, kl = image_batch(network, 4), {}
    for weight in (0.0, 1.0, 2.0):
        batch = rlr.rollout(*arguments, torch.Generator().manual_seed(0))
        batch.schedule = batch.schedule._replace(weights=[*[1.0] * 5, weight, 1.0])
        kl[weight] = rlr.backward([batch])["kl"]
    assert 0 < kl[0.0] < kl[1.0] and (kl[0.0] + kl[2.0]) / 2 == pytest.approx(kl[1.0])


# Checkpoints


@pytest.mark.parametrize(
    "kind, sizes, settings",
    [
        ("smooth", (3, 1), {}),
        ("sum", (3, 1), {}),
        ("black box", (3, 1), {"baseline": "predicted_x0"}),
        ("smooth", (3, 1), {"estimator": "rlr_paper", "subchain_sampling": "grad_norm"}),
        ("smooth", (1,), {"estimator": "ddpo"}),
    ],
    ids=str,
)
def test_a_new_step_continues_from_the_state_of_another(kind, sizes, settings):
    network = NonlinearChain(num_steps=6, dim=6)
    parameters = list(network.parameters())

    def new():
        return RLRStep(6, kind != "black box", black_box=kind == "sum", parameters=parameters, **settings)

    def step(rlr, seed):
        torch.manual_seed(seed)
        random.seed(seed)
        batches = [rlr.rollout(*image_batch(network, size, kind)) for size in sizes]
        rlr.backward(batches)
        return batches[0].schedule, gradients(network)

    original, restored, fresh = new(), new(), new()
    for seed in range(3):
        step(original, seed)
    state = original.state_dict()
    saved = json.dumps(state, allow_nan=False)
    step(restored, 3)  # whatever it has seen is replaced, as is a schedule that it has drawn
    restored.rollout(*image_batch(network, 2, kind))
    restored.load_state_dict(json.loads(saved))
    for seed in (4, 5):
        (schedule, gradient), (same_schedule, same_gradient) = (step(rlr, seed) for rlr in (original, restored))
        assert schedule == same_schedule and torch.equal(gradient, same_gradient)
    assert original.state_dict() == restored.state_dict()
    assert not torch.allclose(gradient, step(fresh, 5)[1])
    # A state that was kept in memory does not change with the step that it came from or was loaded into.
    assert json.dumps(state, allow_nan=False) == saved
    restored.load_state_dict(state)
    step(restored, 6)
    assert json.dumps(state, allow_nan=False) == saved and restored.state_dict() != state
