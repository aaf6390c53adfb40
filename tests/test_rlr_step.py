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
"""The gradient of `RLRStep`, for every estimator, against autograd through the estimator's own loss."""

import random
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from rlr_chains import EXACT, AdaptedChain, ImageChain, ImageReward, Mix, NonlinearChain, gradients, numbers
from rlr_utils import RLRStep


SIZES = (2, 5, 3)
PROMPTS = (["a", "b"], ["a", "c", "a", "b", "d"], ["b", "a", "c"])


def micro_batches(network, kind):
    """The arguments of `RLRStep.rollout` for a batch of each of the sizes."""
    for size in SIZES:
        chain = ImageChain(network, torch.randn(size, 6, dtype=torch.float64))
        reward = ImageReward(kind, 1 + torch.rand(size, dtype=torch.float64))
        yield chain, torch.randn(size, *ImageChain.shape, dtype=torch.float64), reward


def all_rewards(call, part="total"):
    """(N,), the rewards of all images of the optimizer step, or of their part without a gradient."""
    return torch.cat([getattr(batch.score, part)(batch.x_0) for batch in call.batches])


def leave_one_out(call, values):
    """(N,) -> (N,) by definition, with the images of the same prompt if that is the baseline."""
    prompts, found = sum(PROMPTS, []), []
    for i in range(len(values)):
        others = [j for j in range(len(values)) if j != i]
        same = [j for j in others if prompts[j] == prompts[i]]
        if call.rlr.settings.baseline == "per_prompt" and same:
            others = same
        found.append(values[i] - values[others].mean())
    return torch.stack(found)


def by_batch(values):
    """(..., N) -> a tensor (..., B) for each batch."""
    return values.split(SIZES, -1)


def as_images(values):
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def replayed(batch, advantages=None):
    """x_0 in one graph of the whole chain, up to `stop_after`. Step k mixes what comes back with its own score."""
    chain, trajectory, schedule = batch.chain, batch.trajectory, batch.schedule
    x = trajectory.latents[schedule.stop_after]
    for k in range(schedule.stop_after, 0, -1):
        x = chain.mean(k, x)
        if schedule.mixing[k] < 1:
            advantage = advantages if advantages.ndim == 1 else advantages[k]
            score = as_images(advantage) * trajectory.noises[k] / chain.sigma(k)
            x = Mix.apply(x, schedule.mixing[k], -score / sum(SIZES))
        x = x + chain.sigma(k) * trajectory.noises[k]
    return x


def log_probs(batch):
    """The log-probabilities (B,) of the steps that were taken, for k = 1..T, under the present weights."""
    chain, latents = batch.chain, batch.trajectory.latents
    normals = [torch.distributions.Normal(chain.mean(k, x), chain.sigma(k)) for k, x in enumerate(latents) if k > 0]
    return [normal.log_prob(x).flatten(1).sum(1) for normal, x in zip(normals, latents)]


# The losses


def backpropagation(call):
    return -sum(batch.score.smooth(replayed(batch)).sum() for batch in call.batches) / sum(SIZES)


def reinforce(call):
    advantages = by_batch(leave_one_out(call, all_rewards(call)))
    return -sum((a * sum(log_probs(batch))).sum() for a, batch in zip(advantages, call.batches)) / sum(SIZES)


def ddpo(call):
    advantages = by_batch(leave_one_out(call, all_rewards(call)) / all_rewards(call).std())
    return -sum((a * sum(log_probs(batch))).sum() for a, batch in zip(advantages, call.batches)) / sum(SIZES)


def clipped(call):
    """PPO's objective. The first inner epoch has the weights of the rollout."""
    if call.inner_epoch == 0:
        call.memory[:] = [[log_prob.detach() for log_prob in log_probs(batch)] for batch in call.batches]
    advantages = by_batch(leave_one_out(call, all_rewards(call)) / all_rewards(call).std())
    loss = 0.0
    for a, batch, old_log_probs in zip(advantages, call.batches, call.memory):
        for new, old in zip(log_probs(batch), old_log_probs):
            ratio = (new - old).exp()
            loss = loss - torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a).sum()
    return loss / sum(SIZES)


def mixed(call, advantages=None, black_box=None):
    """The gradient of the smooth part at x_0, mixed at every step with the likelihood ratio of the whole reward. A black
    box in a sum adds its likelihood ratio at the last step."""
    advantages = leave_one_out(call, all_rewards(call)) if advantages is None else advantages
    black_box = leave_one_out(call, all_rewards(call, "black_box")) if black_box is None else black_box
    loss = 0.0
    for a, b, batch in zip(by_batch(advantages), by_batch(black_box), call.batches):
        x_0 = replayed(batch, a)
        score = as_images(b) * batch.trajectory.noises[1] / batch.chain.sigma(1)
        loss = loss - batch.score.smooth(x_0).sum() - (score * x_0).sum()
    return loss / sum(SIZES)


def regressed(call):
    """The predicted-x_0 baseline: step k compares R - s_k P_k. The slope s_k = cov(R, P_k) / var(P_k) is from earlier
    optimizer steps, in which a step counts .9 as much as the next one."""
    steps, found = call.rlr.predicted_steps(call.batches[0].schedule), {}
    for part in ("total", "black_box"):
        rewards = all_rewards(call, part)
        found[part] = leave_one_out(call, rewards).repeat(call.rlr.num_steps + 1, 1)
        for k in steps:
            predicted = [batch.chain.predict(k, batch.trajectory.latents[k])[1] for batch in call.batches]
            predicted = [getattr(batch.score, part)(0.5 * x_0) for batch, x_0 in zip(call.batches, predicted)]
            predicted = torch.cat(predicted).detach()
            earlier = [pair.cov() for name, step, pair in call.memory if (name, step) == (part, k)]
            if earlier and earlier[0][1, 1] > 0:
                covariance = sum(0.9 ** (len(earlier) - i) * one for i, one in enumerate(earlier))
                slope = covariance[0, 1] / covariance[1, 1]
                found[part][k] = leave_one_out(call, rewards - slope * predicted)
                assert (found[part][k] - found[part][0]).norm() > 0.01
            call.memory.append((part, k, torch.stack([rewards, predicted])))
    assert len(call.memory) == 2 * len(steps) * (call.step + 1) > 0
    return mixed(call, found["total"], found["black_box"][1])


def other_decoder(score):
    """A score for predicted images that differs from that of the images."""

    def scored(x_0, with_gradient):
        assert not with_gradient
        batches = (0.5 * x_0).split(len(score.weights))  # of all steps at once
        results = [torch.cat(part) for part in zip(*(score(x, False)[::2] for x in batches))]
        return results[0], None, *results[1:]

    return scored


def with_drawn_steps(call):
    """Backpropagation in which a step that was not drawn passes its cotangent on as such steps did in the mean."""
    loss = 0.0
    for batch in call.batches:
        chain, trajectory, gains = batch.chain, batch.trajectory, batch.schedule.transport
        assert (set(gains) != {1.0}) == (call.step > 0)
        assert set(batch.schedule.weights[4:]) <= {0.0, 2.0} and set(batch.schedule.weights[:4]) == {1.0}
        x_0 = batch.x_0.detach().requires_grad_()
        (cotangent,) = torch.autograd.grad(batch.score.smooth(x_0).sum(), x_0)
        for k in range(1, chain.num_steps + 1):
            weight = batch.schedule.weights[k]
            x_k = trajectory.latents[k].detach().requires_grad_()
            mean = chain.mean(k, x_k)
            loss = loss - weight * (cotangent * mean).sum()
            (passed,) = torch.autograd.grad(mean, x_k, cotangent, retain_graph=True)
            cotangent = gains[k] * cotangent + weight * (passed - gains[k] * cotangent)
    return loss / sum(SIZES)


def equation_6(call):
    """The gradient of the last step, a sub-chain of two, and the perturbation of the weights at the other steps, which is
    credited with the mean of the batch above the means of the other batches."""
    means = torch.stack([batch.score.total(batch.x_0).mean() for batch in call.batches])
    parameters, loss = call.rlr.settings.parameters, 0.0
    moved = [perturbations(batch, parameters) for batch in call.batches]
    for i, (a, batch) in enumerate(zip(by_batch(leave_one_out(call, all_rewards(call))), call.batches)):
        chain, latents, noises = batch.chain, batch.trajectory.latents, batch.trajectory.noises
        start = batch.schedule.mixing.index(0.0)
        x_0 = chain.mean(1, latents[1]) + chain.sigma(1) * noises[1]
        x = chain.mean(start + 1, latents[start + 1]) + chain.sigma(start + 1) * noises[start + 1]
        score = as_images(a) * noises[start] / chain.sigma(start)
        loss = loss - batch.score.smooth(x_0).sum() - (score * chain.mean(start, x)).sum()
        ahead = means[i] - means[[j for j in range(len(means)) if j != i]].mean()
        for k in range(1, chain.num_steps + 1):
            size = torch.cat([m.flatten() for m in moved[i][k]]).std().item()
            assert size == (pytest.approx(0.5, rel=0.3) if k not in (1, start, start + 1) else 0)
            loss = loss - len(a) * ahead * sum((p * m).sum() for p, m in zip(parameters, moved[i][k])) / 0.5**2
    return loss / sum(SIZES)


def perturbations(batch, parameters):
    """{k: what was added to each of the parameters in the rollout}."""
    before, moved, trajectory = [p.detach().clone() for p in parameters], {}, batch.trajectory
    for k in range(1, batch.chain.num_steps + 1):
        with batch.perturbation.applied(k), torch.no_grad():
            moved[k] = [p - old for p, old in zip(parameters, before)]
            expected = batch.chain.mean(k, trajectory.latents[k]) + batch.chain.sigma(k) * trajectory.noises[k]
            torch.testing.assert_close(trajectory.latents[k - 1], expected, **EXACT)
    return moved


def low_variance(call):
    """DRaFT-LV: the images under new noise, and the reward through their last step."""
    loss = 0.0
    for batch in call.batches:
        for _ in range(3):
            x_1 = 0.9 * batch.x_0 + 0.3 * torch.randn_like(batch.x_0)
            x_0 = batch.chain.mean(1, x_1) + batch.chain.sigma(1) * torch.randn_like(x_1)
            loss = loss - batch.score.smooth(x_0).sum() / 3
    return loss / sum(SIZES)


def branches(call):
    """Two pairs of branches of each image from a random step, which differ in the sign of that step's noise."""
    loss = 0.0
    for batch in call.batches:
        chain, latents = batch.chain, batch.trajectory.latents
        for i in range(len(batch.x_0)):
            k = random.randint(1, chain.num_steps)
            noises = torch.randn(2, *ImageChain.shape, dtype=torch.float64)
            later = [None] + [torch.randn(ImageChain.shape, dtype=torch.float64) for _ in range(k - 1)][::-1]
            for noise in noises:
                rewards = []
                for sign in (1.0, -1.0):
                    x = latents[k]
                    for j in range(k, 0, -1):
                        x = chain.mean(j, x).detach() + chain.sigma(j) * (sign * noise if j == k else later[j])
                    rewards.append(batch.score.total(x)[i])
                cotangent = (rewards[0] - rewards[1]) * noise / (2 * chain.sigma(k))
                loss = loss - chain.num_steps / 2 * (cotangent * chain.mean(k, latents[k])[i]).sum()
    return loss / sum(SIZES)


def with_divergence(loss_of):
    """0.5 rewards a nat, or standard deviations of them for ddpo: ||mu - mu_base||^2 / (2 sigma^2) at each state."""

    @wraps(loss_of)
    def loss(call):
        divergence = 0.0
        for batch in call.batches:
            for k, x in list(enumerate(batch.trajectory.latents))[1:]:
                mean = batch.chain.mean(k, x)
                with torch.no_grad(), call.network.base_model():
                    base = batch.chain.mean(k, x)
                divergence = divergence + (mean - base).square().sum() / (2 * batch.chain.sigma(k) ** 2)
        price = 0.5 / all_rewards(call).std() if loss_of is ddpo else 0.5
        return loss_of(call) + price * divergence / sum(SIZES)

    return loss


def run(loss_of, kind, settings, loss_scale=1.0):
    """Three optimizer steps: the gradients of `RLRStep`, those of the loss, and the last state."""
    torch.manual_seed(0)
    random.seed(0)
    settings, num_steps = dict(settings), settings.get("num_steps", 4)
    settings.pop("num_steps", None)
    network = NonlinearChain(num_steps, dim=6)
    if "kl_weight" in settings:
        network = AdaptedChain(num_steps, dim=6)
        settings["base_model"] = network.base_model
    parameters = [p for p in network.parameters() if p.requires_grad]
    rlr = RLRStep(num_steps, kind != "black box", black_box=kind == "sum", parameters=parameters, **settings)
    found, expected, memory = [], [], []
    for step in range(3):
        batches = [
            rlr.rollout(chain, x_T, score, prompts=prompts, score_predictions=other_decoder(score))
            for (chain, x_T, score), prompts in zip(micro_batches(network, kind), PROMPTS)
        ]
        for inner_epoch in range(rlr.settings.num_inner_epochs):
            call = SimpleNamespace(rlr=rlr, network=network, batches=batches, memory=memory)
            call.step, call.inner_epoch = step, inner_epoch
            states = torch.get_rng_state(), random.getstate()
            loss_of(call).backward()
            expected.append(gradients(network))
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            rlr.backward(batches, loss_scale)
            found.append(gradients(network))
            with torch.no_grad():
                for p in parameters:
                    p += 0.03 * torch.randn_like(p)
    return found, expected, rlr.state_dict()


@pytest.mark.parametrize(
    "loss_of, kind, settings",
    [
        (backpropagation, "smooth", {"estimator": "full_bp"}),
        (backpropagation, "smooth", {"estimator": "full_bp", "keep_graphs": 3}),
        (backpropagation, "smooth", {"estimator": "truncated_bp", "truncation_steps": 2}),
        (backpropagation, "smooth", {"estimator": "alignprop"}),
        (low_variance, "smooth", {"estimator": "draft_lv", "lv_samples": 3}),
        (ddpo, "black box", {"estimator": "ddpo"}),
        (ddpo, "smooth", {"estimator": "ddpo", "baseline": "per_prompt"}),
        (clipped, "sum", {"estimator": "ddpo", "num_inner_epochs": 2, "ppo_clip_range": 0.1}),
        (mixed, "smooth", {"mixing": 0.3, "baseline": "leave_one_out"}),
        (mixed, "smooth", {"mixing": 0.3, "baseline": "leave_one_out", "keep_graphs": 2}),
        (mixed, "smooth", {"sweep_fraction": 1, "baseline": "per_prompt"}),
        (mixed, "sum", {"mixing": 0.3, "baseline": "leave_one_out"}),
        (mixed, "sum", {"mixing": 0.3, "baseline": "per_prompt"}),
        (mixed, "black box", {"mixing": 0.6, "baseline": "per_prompt"}),
        (reinforce, "black box", {"mixing": 0.0, "baseline": "per_prompt"}),
        (mixed, "smooth", {"estimator": "rlr_paper", "rest": "likelihood_ratio", "subchain_length": 0}),
        (mixed, "sum", {"estimator": "rlr_paper", "rest": "likelihood_ratio", "subchain_sampling": "grad_norm"}),
        (regressed, "smooth", {"mixing": 0.3, "baseline": "predicted_x0"}),
        (regressed, "sum", {"mixing": 0.3, "baseline": "predicted_x0", "baseline_steps": 2}),
        (regressed, "black box", {}),
        (regressed, "sum", {"keep_graphs": 2}),
        (with_drawn_steps, "smooth", {"mixing": 1.0, "num_steps": 6}),
        (with_drawn_steps, "smooth", {"mixing": 1.0, "num_steps": 6, "keep_graphs": 5}),
        (equation_6, "smooth", {"estimator": "rlr_paper", "num_steps": 6, "zo_scale": 0.5}),
        (branches, "black box", {"branches": 2}),
        (with_divergence(reinforce), "black box", {"mixing": 0.0, "baseline": "leave_one_out", "kl_weight": 0.5}),
        (with_divergence(mixed), "smooth", {"mixing": 0.6, "baseline": "leave_one_out", "kl_weight": 0.5}),
        (with_divergence(backpropagation), "smooth", {"estimator": "full_bp", "kl_weight": 0.5, "keep_graphs": 2}),
        (with_divergence(ddpo), "black box", {"estimator": "ddpo", "kl_weight": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "") or str(value),
)
def test_the_gradient_is_that_of_the_estimators_own_loss(loss_of, kind, settings):
    """Also with a loss scale, of which the statistics are free."""
    found, expected, state = run(loss_of, kind, settings)
    for gradient, reference in zip(found, expected):
        assert reference.norm() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10)
    scaled, _, same_state = run(loss_of, kind, settings, loss_scale=8.0)
    for gradient, reference in zip(scaled, found):
        torch.testing.assert_close(gradient, 8 * reference, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(numbers(same_state), numbers(state), rtol=1e-8, atol=1e-10, equal_nan=True)
