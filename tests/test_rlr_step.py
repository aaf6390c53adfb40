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
"""A step of a run: its pictures against the pipeline's, and its gradient, for every estimator, against autograd through what
its paper has as its loss."""

import random
from types import SimpleNamespace

import pytest
import torch
import train_rlr_sd
from rlr_testing import Mix, tiny_pipeline, train
from rlr_utils import decode_latents, make_scheduler


SEEN = []


def red(images, prompts):
    """A smooth reward, of each prompt in its own way: how much redder than blue; what it has seen is kept."""
    SEEN.append((images.detach().clone(), prompts))
    worth = torch.tensor([1.0 + len(prompt) for prompt in prompts])
    return worth * (images[:, 0] - images[:, 2]).square().mean((1, 2))


def bright(images, prompts):
    """A black box, likewise."""
    return torch.tensor([1.0 + len(prompt) for prompt in prompts]) * (images > 0.1).float().mean((1, 2, 3))


red.differentiable, bright.differentiable = True, False
RED, BRIGHT = "test_rlr_step:red", "test_rlr_step:bright"


def scores_of(call, name="total"):
    """Of all pictures of the step, (N,)."""
    return torch.cat([batch.scores[name] for batch in call.step_batches])


def of_this_batch(call, values):
    """(N,) -> (B,)."""
    return values.split(len(call.batch.prompts))[[batch is call.batch for batch in call.step_batches].index(True)]


def worth_of(call, scores=None):
    """What each picture of the batch scores above the mean of all others of the step, or of those of its own prompt."""
    scores, worth = scores_of(call) if scores is None else scores, []
    prompts = [prompt for batch in call.step_batches for prompt in batch.prompts]
    for i, prompt in enumerate(prompts):
        others = [j for j in range(len(prompts)) if j != i]
        if call.args.baseline == "per_prompt":
            others = [j for j in others if prompts[j] == prompt]
        worth.append(scores[i] - scores[others].mean())
    return of_this_batch(call, torch.stack(worth))


def picture_reward(call, x_0):
    """The smooth reward with its graph, (B,)."""
    return red(decode_latents(call.scorer.vae, x_0), call.batch.prompts)


def log_probs(call):
    """The log-probabilities of the steps that were taken, (B,) for k = 1..T, under the weights of now."""
    chain, latents = call.batch.chain, call.batch.trajectory.latents
    return [
        torch.distributions.Normal(chain.mean(k, latents[k]), chain.sigma(k)).log_prob(latents[k - 1]).sum((1, 2, 3))
        for k in range(1, chain.num_steps + 1)
    ]


def score_function(call):
    """REINFORCE."""
    worth = worth_of(call)
    return -sum(worth * log_prob for log_prob in log_probs(call)).mean()


def ddpo(call):
    worth = worth_of(call) / scores_of(call).std()
    return -sum(worth * log_prob for log_prob in log_probs(call)).mean()


def clipped(call):
    """PPO's objective; the first inner epoch is at the weights of the rollout."""
    worth = worth_of(call) / scores_of(call).std()
    if call.inner_epoch == 0:
        clipped.old = [log_prob.detach() for log_prob in log_probs(call)]
    loss = 0.0
    for now, old in zip(log_probs(call), clipped.old):
        ratio = (now - old).exp()
        bounded = ratio.clamp(1 - call.args.ppo_clip_range, 1 + call.args.ppo_clip_range)
        loss = loss - torch.minimum(ratio * worth, bounded * worth).mean()
    return loss


def replayed(call, mixing, score_of):
    """x_0 in one graph of the whole chain, in which step k mixes its score with what comes back; k = 1 hands all on."""
    chain, trajectory = call.batch.chain, call.batch.trajectory
    batch = len(call.batch.prompts)
    x = trajectory.latents[-1]
    for k in range(chain.num_steps, 0, -1):
        x = chain.mean(k, x)
        if mixing[k] < 1:
            score = score_of(k).view(-1, 1, 1, 1) * trajectory.noises[k] / chain.sigma(k)
            x = Mix.apply(x, mixing[k], -score / batch)
        x = x + chain.sigma(k) * trajectory.noises[k]
    return x


def backpropagation(call):
    return -picture_reward(call, replayed(call, [1.0] * 4, None)).mean()


def mixed(call):
    worth = worth_of(call)
    x_0 = replayed(call, [None, 1.0, 0.3, 0.3], lambda k: worth)
    return -picture_reward(call, x_0).mean()


def mixed_with_a_black_box(call):
    """The gradient of the smooth part at the picture, and beside it the other part's score at the last step."""
    chain, trajectory = call.batch.chain, call.batch.trajectory
    smooth, black_box = scores_of(call, RED), -2 * scores_of(call, BRIGHT)
    worth = worth_of(call, smooth + black_box)
    x_0 = replayed(call, [None, 1.0, 0.3, 0.3], lambda k: worth)
    score = worth_of(call, black_box).view(-1, 1, 1, 1) * trajectory.noises[1] / chain.sigma(1)
    return -(picture_reward(call, x_0) + (score * x_0).sum((1, 2, 3))).mean()


def with_weights_perturbed(call):
    """The paper's: the last step's gradient, a sub-chain of two, and at the other steps the weights' own perturbation, worth
    what the batch scores above the other batch of the step."""
    chain, trajectory = call.batch.chain, call.batch.trajectory
    latents, noises = trajectory.latents, trajectory.noises
    kept, moved = [p.detach().clone() for p in call.parameters], {}
    for k in range(1, 7):
        with call.batch.perturbation.applied(k):
            moved[k] = [(p - old).detach() for p, old in zip(call.parameters, kept)]
    perturbed = [k for k in moved if any(m.any() for m in moved[k])]
    start = call.schedule.mixing.index(0.0)
    assert perturbed == [k for k in range(2, 7) if k not in (start, start + 1)]
    x_0 = chain.mean(1, latents[1]) + chain.sigma(1) * noises[1]
    x = latents[start + 1]
    for k in (start + 1, start):
        x = chain.mean(k, x) + chain.sigma(k) * noises[k]
    score = worth_of(call).view(-1, 1, 1, 1) * noises[start] / chain.sigma(start)
    loss = -(picture_reward(call, x_0) + (score * x).sum((1, 2, 3))).mean()
    means = [batch.scores["total"].mean() for batch in call.step_batches]
    ahead = (means[0] - means[1]) * (1 if call.batch is call.step_batches[0] else -1)
    for k in perturbed:
        assert torch.cat([m.flatten() for m in moved[k]]).std() == pytest.approx(call.args.zo_scale, rel=0.05)
        along = sum((p * m).sum() for p, m in zip(call.parameters, moved[k]))
        loss = loss - ahead * along / call.args.zo_scale**2
    return loss


def of_some_steps(call):
    """Backpropagation in which a step that is left out hands its cotangent on as such steps did in the mean."""
    chain, trajectory, gains = call.batch.chain, call.batch.trajectory, call.schedule.transport
    assert (set(gains) != {1.0}) == (len(call.calls) > 0)
    assert set(call.batch.weights[4:]) <= {0.0, 2.0} and set(call.batch.weights[:4]) == {1.0}
    x_0 = trajectory.latents[0].detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(picture_reward(call, x_0).sum(), x_0)
    loss = 0.0
    for k in range(1, chain.num_steps + 1):
        weight = call.batch.weights[k]
        x_k = trajectory.latents[k].detach().requires_grad_()
        mean = chain.mean(k, x_k)
        loss = loss - weight * (cotangent * mean).sum() / len(x_0)
        (passed,) = torch.autograd.grad(mean, x_k, cotangent, retain_graph=True)
        cotangent = gains[k] * cotangent + weight * (passed - gains[k] * cotangent)
    return loss


def low_variance(call):
    """DRaFT-LV: the pictures under new noise, and the reward through their last step."""
    chain, x_0 = call.batch.chain, call.batch.trajectory.latents[0]
    total = 0.0
    for _ in range(2):
        x_1 = chain.scheduler.add_noise(x_0, torch.randn_like(x_0), chain.timesteps[-1:])
        total = total + picture_reward(call, chain.mean(1, x_1) + chain.sigma(1) * torch.randn_like(x_0))
    return -total.mean() / 2


def branches(call):
    """Two branches of each picture from one step of its own, which differ in the sign of that step's noise."""
    chain, trajectory, prompts = call.batch.chain, call.batch.trajectory, call.batch.prompts
    loss = 0.0
    for i, prompt in enumerate(prompts):
        k = random.randint(1, chain.num_steps)
        x_k = trajectory.latents[k]
        noise, later = torch.randn_like(x_k[:1]), {}
        for j in range(k - 1, 0, -1):
            later[j] = torch.randn_like(noise)
        rewards = []
        for sign in (1.0, -1.0):
            # The other pictures of the batch go along, each under its own prompt.
            x, taken = x_k.clone(), sign * noise
            for j in range(k, 0, -1):
                x = chain.mean(j, x).detach() + chain.sigma(j) * (taken if j == k else later[j])
            rewards.append(bright(decode_latents(call.scorer.vae, x[i : i + 1]), [prompt]))
        cotangent = (rewards[0] - rewards[1]) * noise / (2 * chain.sigma(k))
        loss = loss - chain.num_steps * (cotangent * chain.mean(k, x_k)[i]).sum() / len(prompts)
    return loss


def held_to_the_base_model(call):
    """The divergence of two Gaussians of one sigma, at the states of the rollout, is ||mu - mu_base||^2 / (2 sigma^2)."""
    chain, trajectory = call.batch.chain, call.batch.trajectory
    loss = score_function(call)
    for k in range(1, chain.num_steps + 1):
        mean = chain.mean(k, trajectory.latents[k])
        call.unet.disable_adapters()
        with torch.no_grad():
            base = chain.mean(k, trajectory.latents[k])
        call.unet.enable_adapters()
        divergence = (mean - base).square().sum((1, 2, 3)) / (2 * chain.sigma(k) ** 2)
        loss = loss + 0.5 * divergence.mean()
    return loss


def compared(monkeypatch, tmp_path, loss_of, *flags):
    """Run two steps, the second of them with an adapter that does something, and compare each gradient with that of the
    loss; the same again in a unit eight times as large, as float16 has it."""
    calls, states, step_batches = [], [], []
    sweep, advantages_of = train_rlr_sd.sweep, train_rlr_sd.Estimator.advantages

    def listened(self, accelerator, batches):
        step_batches[:] = batches
        return advantages_of(self, accelerator, batches)

    def gradient_of(parameters, run):
        """What `run` adds to the gradients, drawing from the generators as they were."""
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        for p in parameters:
            p.grad = None
        result = run()
        return result, torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])

    def spied(args, batch, advantages, schedule, scorer, unet, scale):
        states[:] = torch.get_rng_state(), random.getstate()
        parameters = [p for p in unet.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        inner_epoch = sum(earlier is batch for earlier in calls)
        call = SimpleNamespace(
            args=args, batch=batch, schedule=schedule, scorer=scorer, unet=unet, parameters=parameters
        )
        call.inner_epoch, call.step_batches, call.calls = inner_epoch, step_batches, calls
        _, expected = gradient_of(parameters, lambda: loss_of(call).backward())
        arguments = args, batch, advantages, schedule, scorer, unet
        more, magnified = gradient_of(parameters, lambda: sweep(*arguments, 8.0))
        result, found = gradient_of(parameters, lambda: sweep(*arguments, 1.0))
        assert scale == 1.0 and expected.norm() > 0
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert (magnified - 8 * found).norm() < 1e-4 * magnified.norm()
        torch.testing.assert_close(more.statistics, result.statistics, rtol=1e-4, atol=0, equal_nan=True)
        torch.testing.assert_close(more.divergence, result.divergence, rtol=1e-4, atol=0)
        torch.testing.assert_close(more.clipped, result.clipped)
        for p, earlier in zip(parameters, before):
            p.grad = p.grad if earlier is None else p.grad + earlier
        calls.append(batch)
        return result

    monkeypatch.setattr(train_rlr_sd, "sweep", spied)
    monkeypatch.setattr(train_rlr_sd.Estimator, "advantages", listened)
    train(tmp_path / "out", "--train_batch_size", "4", "--learning_rate", "1e-2", *flags)
    return calls


@pytest.mark.parametrize(
    "loss_of, flags",
    [
        (backpropagation, ["--gradient_estimator", "full_bp", "--reward", RED]),
        (low_variance, ["--gradient_estimator", "draft_lv", "--lv_samples", "2", "--reward", RED]),
        (ddpo, ["--gradient_estimator", "ddpo", "--reward", BRIGHT]),
        (
            clipped,
            ["--gradient_estimator", "ddpo", "--reward", RED, "--num_inner_epochs", "2", "--ppo_clip_range", "0.05"],
        ),
        (mixed, ["--mixing", "0.3", "--baseline", "leave_one_out", "--reward", RED]),
        (
            mixed_with_a_black_box,
            ["--mixing", "0.3", "--baseline", "leave_one_out", "--reward", f"{RED},{BRIGHT}:-2"],
        ),
        (
            score_function,
            ["--mixing", "0", "--baseline", "per_prompt", "--reward", BRIGHT, "--images_per_prompt", "2"],
        ),
        (
            of_some_steps,
            ["--mixing", "1", "--sweep_fraction", "0.5", "--reward", RED, "--num_inference_steps", "6"],
        ),
        (
            with_weights_perturbed,
            [
                *("--gradient_estimator", "rlr_paper", "--subchain_length", "2", "--num_inference_steps", "6"),
                *("--reward", RED, "--gradient_accumulation_steps", "2", "--zo_scale", "0.5"),
            ],
        ),
        (branches, ["--mixing", "0", "--branches", "1", "--reward", BRIGHT]),
        (
            held_to_the_base_model,
            ["--mixing", "0", "--baseline", "leave_one_out", "--reward", BRIGHT, "--kl_weight", "0.5"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_gradient_of_a_run_is_that_of_the_estimators_own_loss(monkeypatch, tmp_path, loss_of, flags):
    calls = compared(monkeypatch, tmp_path, loss_of, *flags)
    assert len(calls) == (4 if loss_of in (clipped, with_weights_perturbed) else 2)


@pytest.mark.parametrize(
    "scheduler, guidance_scale, eta, negative, size",
    [
        ("ddim", 5.0, 1.0, None, (32, 32)),
        ("ddim", 4.0, 0.3, "a blue one", (48, 32)),
        ("ddim", 1.0, 1.0, None, (32, 32)),
        ("ddpm", 3.0, 1.0, None, (32, 32)),
        ("euler_ancestral", 3.0, 1.0, "a blue one", (32, 32)),
    ],
)
def test_the_first_pictures_of_a_run_are_the_pipelines_own(tmp_path, scheduler, guidance_scale, eta, negative, size):
    """As a user draws them, from the same generators."""
    flags = ["--scheduler", scheduler, "--guidance_scale", str(guidance_scale), "--eta", str(eta)]
    flags += ["--height", str(size[0]), "--width", str(size[1]), "--reward", RED, "--max_train_steps", "1"]
    flags += [] if negative is None else ["--negative_prompt", negative]
    SEEN.clear()
    train(tmp_path / "out", "--decode_batch_size", "2", *flags)
    found, prompts = SEEN[-1]
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    one_rank = SimpleNamespace(num_processes=1, process_index=0)
    images = pipeline(
        prompts,
        height=size[0],
        width=size[1],
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        eta=eta,
        generator=train_rlr_sd.generators_of(SimpleNamespace(train_batch_size=2, seed=0), one_rank, 1, 0),
        output_type="pt",
    ).images
    assert len(set(prompts)) == 2
    torch.testing.assert_close(found, images, rtol=1e-4, atol=1e-4)
