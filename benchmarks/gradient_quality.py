#!/usr/bin/env python
# coding=utf-8
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
"""Bias and variance of every gradient estimator, on a chain with a closed form and on the embedded Stable Diffusion.

    make gradient-quality        or        python benchmarks/gradient_quality.py --quick

Prints tables and writes gradient_quality_toy.csv, gradient_quality.csv and gradient_quality.png. On tiny-sd all estimators
see the same runs of the chain, hence the same noise. The true gradient is the mean of full backpropagation over these and
many more runs.
"""

import os
import platform
import random
from dataclasses import replace

import torch
from bench_common import (
    DIGITS,
    FORWARDS_PER_SWEPT,
    TINY_AESTHETIC,
    TINY_SD,
    VERSIONS,
    add_workers_flag,
    make_parser,
    parse_benchmark,
    ratios_of,
    seconds_in_turns,
    worker_pool,
    write_csv,
)
from diffusion_models import load_model
from diffusion_models.adapters import add_lora
from matplotlib.figure import Figure
from reward_models import load_reward
from rlr_training.prompts import load_prompts
from rlr_utils import Batch, RLRStep, WeightPerturbation, rollout
from toy_chain import LinearGaussianChain, gradients
from tqdm import tqdm


KINDS = ("smooth", "rough", "black box")
# What is drawn on tiny-sd.
FULL = {"num_steps": 20, "batch_size": 32, "warmup": 3, "draws": 14, "truth_draws": 56}
QUICK = {"num_steps": 4, "batch_size": 4, "warmup": 1, "draws": 4, "truth_draws": 4}


class Estimator:
    """A gradient estimator, with what it remembers of earlier batches.

    Args:
        num_steps: T.
        differentiable: whether the reward has a gradient that the estimator uses.
        settings: of `RLRStep`; by default the baseline is leave-one-out and every step is swept.
    """

    def __init__(self, num_steps, differentiable=True, **settings):
        self.rlr = RLRStep(num_steps, differentiable, **{"baseline": "leave_one_out", "sweep_fraction": 1, **settings})

    def add_gradient(self, batch):
        """Add the gradient of -(mean reward) of a batch from `shared_batch` to `.grad`."""
        rlr = self.rlr
        if rlr.settings.perturbs_weights:  # these need a rollout of their own, under the perturbed weights
            rlr.backward([rlr.rollout(batch.chain, batch.trajectory.latents[-1], batch.score)])
            return
        schedule = rlr.draw_schedule().draw()
        rlr.backward(
            [
                replace(
                    batch,
                    schedule=schedule,
                    reward_grad=batch.reward_grad if rlr.differentiable else None,
                    black_box=torch.zeros_like(batch.rewards) if rlr.differentiable else batch.rewards,
                    predicted=batch.predicted if rlr.predicted_steps(schedule) else None,
                )
            ]
        )

    def cost(self, decode):
        """Cost for one image in forward passes of the network, see `FORWARDS_PER_SWEPT`.

        Args:
            decode: forward passes that take as long as decoding and scoring an image.
        """
        schedule = self.rlr.draw_schedule()
        calls = self.rlr.expected_calls(schedule)
        scored = len(self.rlr.predicted_steps(schedule)) + 2 * self.rlr.settings.branches
        return calls.forward + FORWARDS_PER_SWEPT * calls.swept + decode * scored


def estimators_for(num_steps, kind, parameters=()):
    """{name: Estimator} for a kind of reward.

    Args:
        num_steps: T.
        kind: one of `KINDS`.
        parameters: the trainable ones, for the weight perturbations.
    """

    def estimator(**settings):
        return Estimator(num_steps, kind != "black box", parameters=parameters, **settings)

    def ddpo(**settings):
        # DDPO's estimator with advantages that are not normalised, which would change the scale of the gradient.
        return Estimator(num_steps, differentiable=False, mixing=0.0, **settings)

    def paper(rest):
        return estimator(estimator="rlr_paper", rest=rest)

    def truncated_bp(steps):
        return estimator(estimator="truncated_bp", truncation_steps=min(steps, num_steps))

    likelihood_ratio = {
        "ddpo, leave-one-out": ddpo(),
        "ddpo, predicted x0": ddpo(baseline="predicted_x0"),
    }
    if kind == "black box":
        return {
            **likelihood_ratio,
            "rlr, leave-one-out": estimator(),
            "rlr, predicted x0": estimator(baseline="predicted_x0"),
            "branches 2": estimator(branches=2),
        }
    estimators = {
        "full_bp": estimator(estimator="full_bp"),
        "rlr, leave-one-out": estimator(),
        "rlr, predicted x0": estimator(baseline="predicted_x0"),
        "rlr .5, predicted x0": estimator(baseline="predicted_x0", mixing=0.5),
        **likelihood_ratio,
        "rlr_paper, likelihood ratio": paper("likelihood_ratio"),
        "truncated_bp 1": truncated_bp(1),
        "truncated_bp 5": truncated_bp(5),
        "alignprop": estimator(estimator="alignprop"),
        "rlr, sweep_fraction 0.5": estimator(sweep_fraction=0.5),
        "rlr, sweep_fraction 0.25": estimator(sweep_fraction=0.25),
    }
    if kind == "smooth":
        estimators["ddpo, no baseline"] = ddpo(baseline="none")
        estimators["rlr_paper, zeroth order"] = paper("zeroth_order")
        estimators["draft_lv 2"] = estimator(estimator="draft_lv", lv_samples=2)
    return estimators


def shared_batch(chain, trajectory, score):
    """A `Batch` of one run of a chain, from which every estimator takes its gradient.

    Args:
        trajectory: with predictions at all steps.
        score: as for `RLRStep.rollout`.
    """
    rewards, reward_grad = score(trajectory.latents[0], True)
    predictions = [trajectory.predictions[k] for k in range(1, chain.num_steps + 1)]
    by_step = [torch.full_like(rewards, torch.nan), *(score(x_0, False)[0] for x_0 in predictions)]
    predicted = torch.stack(by_step, dim=1)
    return Batch(
        chain=chain,
        score=score,
        trajectory=trajectory,
        schedule=None,  # each estimator has its own
        rewards=rewards,
        black_box=rewards,
        reward_grad=reward_grad,
        predicted={"total": predicted, "black_box": predicted},
        prompts=None,
        perturbation=WeightPerturbation((), scale=1.0, seed=0, steps=()),
    )


def measure_toy(seed, batches, batch_size, warmup=4):
    """Bias and variance on the closed form: rows of estimator, max |z| over the coordinates, variance for one image."""
    torch.manual_seed(seed)
    random.seed(seed)
    chain = LinearGaussianChain()
    num_steps = chain.num_steps
    (-chain.expected_reward()).backward()
    truth = gradients(chain)
    estimators = estimators_for(num_steps, "smooth", list(chain.parameters()))
    del estimators["draft_lv 2"]  # the chain has no forward process
    estimators["rlr .9, leave-one-out"] = Estimator(num_steps, mixing=0.9)
    for fraction in (0.5, 0.25):
        name = f"ddpo, sweep_fraction {fraction}"
        estimators[name] = Estimator(num_steps, differentiable=False, mixing=0.0, sweep_fraction=fraction)

    def score(x_0, with_gradient):
        return chain.reward(x_0), chain.reward_grad(x_0) if with_gradient else None

    draws = {name: [] for name in estimators}
    for i in range(warmup + batches):
        x_T = torch.randn(batch_size, 4, dtype=torch.float64)
        batch = shared_batch(chain, rollout(chain, x_T, predict=range(1, num_steps + 1)), score)
        for name, estimator in estimators.items():
            estimator.add_gradient(batch)
            gradient = gradients(chain)
            if i >= warmup:
                draws[name].append(gradient)
    rows = []
    for name, values in draws.items():
        values = torch.stack(values)
        z = (values.mean(0) - truth) / (values.std(0) / len(values) ** 0.5)
        variance = batch_size * values.var(0).sum().item()
        rows.append({"estimator": name, "max_z": z.abs().max().item(), "variance": variance})
    return rows


# The rough reward is R + AMPLITUDE sin(OMEGA w . image). Over images that differ the sine averages to nothing, and so does
# its share of the gradient of E[R]. The gradient at any one image is almost all due to the sine.
AMPLITUDE, OMEGA = 0.5, 300.0


class TinyStableDiffusion:
    """tiny-sd with a LoRA that differs a little from the base model, and its rewards."""

    def __init__(self, num_steps):
        self.model = load_model(TINY_SD)
        self.chain = self.model.make_chain(self.model.network, num_steps, self.model.default_size)
        torch.manual_seed(0)
        add_lora(self.model, rank=4, alpha=4, layers=["to_k", "to_q", "to_v", "to_out.0"])
        for name, parameter in self.model.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        self.aesthetic = load_reward("aesthetic", path=TINY_AESTHETIC)
        direction = torch.randn(3, 32, 32)
        self.direction = direction / direction.norm()
        self.prompts = load_prompts(DIGITS)

    @property
    def parameters(self):
        return [p for p in self.model.network.parameters() if p.requires_grad]

    def chain_of(self, prompts):
        return self.chain.conditioned_on(self.model.embed(prompts), self.model.embed([""]))

    def score(self, kind):
        """The `score` of `RLRStep.rollout` for a kind of reward."""

        def score(latents, with_gradient):
            x_0 = latents.clone().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                images = self.model.decode(x_0)
                rewards = self.aesthetic(images, [""] * len(images))
                if kind == "rough":
                    rewards = rewards + AMPLITUDE * torch.sin(OMEGA * (images * self.direction).sum((1, 2, 3)))
            reward_grad = torch.autograd.grad(rewards.sum(), x_0)[0] if with_gradient else None
            return rewards.detach(), reward_grad

        return score

    def batches(self, batch_size, kinds=KINDS):
        """One run of the chain, as a batch for each kind of reward."""
        chain = self.chain_of(random.choices(self.prompts, k=batch_size))
        trajectory = rollout(chain, torch.randn(batch_size, 4, 8, 8), predict=range(1, chain.num_steps + 1))
        return {kind: shared_batch(chain, trajectory, self.score(kind)) for kind in kinds}


def draw_tiny(worker, num_steps, batch_size, warmup, draws, truth_draws):
    """One process's share: {(kind, estimator): gradients (draws, parameters)}, and those of full backpropagation."""
    torch.set_num_threads(1)
    tiny = TinyStableDiffusion(num_steps)
    torch.manual_seed(1000 + worker)
    random.seed(1000 + worker)
    estimators = {
        (kind, name): estimator
        for kind in KINDS
        for name, estimator in estimators_for(num_steps, kind, tiny.parameters).items()
    }
    drawn = {key: [] for key in estimators}
    for i in tqdm(range(warmup + draws), desc="estimators", disable=worker > 0):
        batches = tiny.batches(batch_size)
        for (kind, name), estimator in estimators.items():
            estimator.add_gradient(batches[kind])
            gradient = gradients(tiny.model.network)
            if i >= warmup:
                drawn[kind, name].append(gradient)
    truth, full_bp = [], Estimator(num_steps, estimator="full_bp")
    for _ in tqdm(range(truth_draws), desc="truth", disable=worker > 0):
        full_bp.add_gradient(tiny.batches(batch_size, ("smooth",))["smooth"])
        truth.append(gradients(tiny.model.network))
    return {key: torch.stack(values) for key, values in drawn.items()}, torch.stack(truth)


def decode_cost(num_steps):
    """The time to decode and score an image, in guided forward passes of the U-Net."""
    tiny = TinyStableDiffusion(num_steps)
    chain, x, score = tiny.chain_of(tiny.prompts[:16]), torch.randn(16, 4, 8, 8), tiny.score("smooth")
    with torch.no_grad():
        calls = {"decode": lambda: score(x, False), "forward": lambda: chain.mean(1, x)}
        seconds = seconds_in_turns(calls, rounds=9)
    return ratios_of(seconds["decode"], seconds["forward"])["ratio"]


def measure_tiny(num_steps, batch_size, warmup, draws, truth_draws, workers):
    """(rows, `decode_cost`): for each reward and estimator the relative bias and its noise, and noise-to-signal and cost."""
    decode = decode_cost(num_steps)
    shares = max(workers, 1)
    share = (num_steps, batch_size, warmup, draws // shares, truth_draws // shares)
    with worker_pool(workers) as pool:
        results = list(pool.map(draw_tiny, range(shares), *([value] * shares for value in share)))
    drawn = {key: torch.cat([result[0][key] for result in results]).double() for key in results[0][0]}
    truth = torch.cat([result[1] for result in results] + [drawn["smooth", "full_bp"]]).double().mean(0)
    signal = truth.square().sum()
    costs = {kind: {n: e.cost(decode) for n, e in estimators_for(num_steps, kind).items()} for kind in KINDS}
    rows = []
    for (kind, name), values in drawn.items():
        variance = values.var(0).sum()
        noise = (variance / len(values) / signal).sqrt()
        bias = ((values.mean(0) - truth).square().sum() / signal - noise**2).clamp_min(0).sqrt()
        noise_to_signal = (batch_size * variance / signal).item()
        cost = costs[kind][name] / (4 * num_steps)  # in units of full backpropagation
        rows.append(
            {
                "reward": kind,
                "estimator": name,
                "relative_bias": bias.item(),
                "bias_noise": noise.item(),
                "noise_to_signal": noise_to_signal,
                "cost": cost,
                "noise_to_signal_x_cost": noise_to_signal * cost,
                "cosine": torch.cosine_similarity(values, truth[None]).mean().item(),
            }
        )
    return rows, decode


def print_table(title, rows):
    print(f"\n{title}")
    widths = {key: max(len(key), 27 if key == "estimator" else 9) for key in rows[0]}
    print("  ".join(f"{key:<{width}}" for key, width in widths.items()))
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else v for v in row.values())
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths.values())))


def plot(rows, path):
    """Bias against noise at equal compute, a point per estimator; hollow where noise hides the bias."""
    kinds, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("reward", "estimator"))
    figure = Figure(figsize=(4.2 * len(kinds) + 2.5, 4.2), layout="constrained")
    points = {}
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds):
        for row in rows:
            if row["reward"] != kind:
                continue
            index, is_hidden = names.index(row["estimator"]), row["bias_noise"] > 0.2
            (points[row["estimator"]],) = axes.plot(
                row["noise_to_signal_x_cost"],
                0.0 if is_hidden else row["relative_bias"],
                "os^Dv<>pP*hXd8"[index % 14],
                color=f"C{index % 10}",
                mfc="none" if is_hidden else None,
                ms=8,
            )
        axes.set(xscale="log", title=f"{kind} reward", xlabel="noise-to-signal x cost of an image", ylim=(-0.05, 1.1))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative bias (hollow: hidden by noise)")
    figure.legend([points[name] for name in names], names, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def main(input_args=None):
    parser = make_parser(__doc__)
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    command = "python benchmarks/gradient_quality.py" + (" --quick" if args.quick else "")
    header = f"{command}, {platform.machine()}, {VERSIONS}"

    toy = []
    for seed in range(1 if args.quick else 3):
        batches, batch_size = (8, 64) if args.quick else (256, 128)
        toy += [{"seed": seed, **row} for row in measure_toy(seed, batches, batch_size)]
    print_table("Linear-Gaussian chain, d = 4, T = 10: bias as max |z|, variance of the gradient of an image", toy)
    write_csv(toy, os.path.join(args.out, "gradient_quality_toy.csv"), header)

    settings = QUICK if args.quick else FULL
    rows, decode = measure_tiny(workers=args.workers, **settings)
    header += f", {settings}, workers {args.workers}, decode + reward = {decode:.2f} guided U-Net forwards"
    print_table(f"tiny-sd, {settings}; decode + reward = {decode:.2f} guided U-Net forwards", rows)
    write_csv(rows, os.path.join(args.out, "gradient_quality.csv"), header)
    plot(rows, os.path.join(args.out, "gradient_quality.png"))
    return toy, rows


if __name__ == "__main__":
    main()
