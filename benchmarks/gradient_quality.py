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

Prints a table and writes gradient_quality.csv and gradient_quality.png. On tiny-sd all estimators see the same runs of
the chain, so that they are compared on the same noise, and the truth is the mean of full backpropagation over many more.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from tqdm import tqdm


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from reward_models import load_reward  # noqa: E402
from rlr_utils import (  # noqa: E402
    AdaptiveMixing,
    PerturbedChain,
    PredictedReward,
    RunningReward,
    StableDiffusionChain,
    SubchainSampler,
    Trajectory,
    Transport,
    WeightPerturbation,
    alignprop,
    backward_sweep,
    branch,
    ddpo,
    decode_latents,
    full_bp,
    leave_one_out,
    load_prompts,
    renoise,
    rlr,
    rlr_paper,
    rollout,
    truncated_bp,
)

import diffusers  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402


class LinearGaussianChain(torch.nn.Module):
    """x_{k-1} = a x_k + b + sigma_k z_k per coordinate, from x_T ~ N(0, I): moments, hence gradients, in closed form.

    The reward is R = -|x_0 - target|^2 / 2. `expected_reward` runs the recursion of mean and variance.
    """

    def __init__(self, num_steps=10, dim=4):
        super().__init__()
        self.num_steps = num_steps
        self.a = torch.nn.Parameter(torch.linspace(0.7, 0.95, dim, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.linspace(-0.1, 0.1, dim, dtype=torch.float64))
        self.target = torch.full((dim,), 3.0, dtype=torch.float64)

    def sigma(self, k):
        return 0.14 + 0.035 * k

    def mean(self, k, x):
        return self.a * x + self.b

    def predict(self, k, x):
        """The mean and E[x_0 | x_k], which is what a denoiser predicts."""
        prediction = x
        for _ in range(k):
            prediction = self.a * prediction + self.b
        return self.mean(k, x), prediction

    def reward(self, x_0):
        return -(x_0 - self.target).square().sum(1) / 2

    def reward_grad(self, x_0):
        return self.target - x_0

    def expected_reward(self):
        mean, variance = torch.zeros_like(self.target), torch.ones_like(self.target)
        for k in range(self.num_steps, 0, -1):
            mean, variance = self.a * mean + self.b, self.a**2 * variance + self.sigma(k) ** 2
        return -(variance + (mean - self.target).square()).sum() / 2


class Sample(NamedTuple):
    """A batch that an estimator is asked for its gradient of -(mean of R) on.

    Attributes:
        chain, trajectory: the run, with predictions.
        reward: `reward(x_0) -> (N,)` for latents (N, ...), without a graph.
        reward_and_grad: the same with dR/dx_0.
        rewards, reward_grad: of the run.
        predicted: (T + 1, B), the rewards of the predicted x_0.
        parameters: the trainable ones.
    """

    chain: object
    trajectory: Trajectory
    reward: object
    reward_and_grad: object
    rewards: torch.Tensor
    reward_grad: torch.Tensor
    predicted: torch.Tensor
    parameters: list


def predicted_rewards(trajectory, reward):
    """(T + 1, B): the reward of the picture predicted at every step; NaN at 0, where there is none."""
    by_step = [reward(trajectory.predictions[k]) for k in range(1, len(trajectory.latents))]
    return torch.stack([torch.full_like(by_step[0], torch.nan), *by_step])


def baseline_advantages(name, num_steps):
    """`advantages(sample)` of a baseline; it learns from one call to the next."""
    regression = PredictedReward(num_steps)

    def advantages(sample):
        if name == "none":
            return sample.rewards
        if name == "leave-one-out":
            return leave_one_out(sample.rewards)
        result = regression.advantages(sample.rewards, sample.predicted)
        regression.update(sample.rewards, sample.predicted)
        return result

    return advantages


def swept(num_steps, schedule_of, baseline="leave-one-out", fraction=1.0):
    """An estimator that is a schedule, a baseline and a fraction: `estimate(sample)` adds to the gradients."""
    advantages, transport = baseline_advantages(baseline, num_steps), Transport(num_steps)

    def estimate(sample):
        schedule = schedule_of(num_steps)._replace(fraction=fraction)
        statistics = backward_sweep(
            sample.chain,
            sample.trajectory,
            schedule.mixing,
            reward_grad=sample.reward_grad,
            advantages=advantages(sample),
            stop_after=schedule.stop_after,
            weights=schedule.draw_weights(),
            transport=transport.gains,
        )
        transport.update(statistics)
        return statistics

    return estimate


def adaptive(num_steps, baseline, differentiable=True, fraction=1.0):
    mixing = AdaptiveMixing(num_steps)
    sweep = swept(num_steps, lambda n: rlr(n, mixing, differentiable), baseline, fraction)
    return lambda sample: mixing.update(sweep(sample))


def paper(num_steps, rest, length=2, scale=0.02):
    """Equation 6 with a uniform start; its zeroth-order term runs the chain once more, under perturbed weights."""
    subchain, running = SubchainSampler(num_steps, length), RunningReward()

    def estimate(sample):
        schedule = rlr_paper(num_steps, subchain.draw(), length, rest)
        if schedule.perturbed:
            perturbation = WeightPerturbation(sample.parameters, scale, random.getrandbits(62), schedule.perturbed)
            trajectory = rollout(PerturbedChain(sample.chain, perturbation), sample.trajectory.latents[num_steps])
            rewards, reward_grad = sample.reward_and_grad(trajectory.latents[0])
            perturbation.add_gradient(leave_one_out(rewards.mean()[None], running.mean).item())
            running.update(rewards)
            sample = sample._replace(trajectory=trajectory, rewards=rewards, reward_grad=reward_grad)
        return swept(num_steps, lambda n: schedule)(sample)

    return estimate


def draft_lv(num_steps, samples=2):
    def estimate(sample):
        for _ in range(samples):
            renoised = renoise(sample.chain, sample.trajectory.latents[0])
            _, reward_grad = sample.reward_and_grad(renoised.latents[0])
            schedule = truncated_bp(num_steps, 1)
            backward_sweep(sample.chain, renoised, schedule.mixing, reward_grad=reward_grad / samples, stop_after=1)

    return estimate


def branching(num_steps, pairs):
    def estimate(sample):
        batch = len(sample.rewards)
        for i in range(batch):
            single = Trajectory([x[i : i + 1] for x in sample.trajectory.latents], None)
            k = random.randint(1, num_steps)
            chains = sample.chain.repeat(i, 1), sample.chain.repeat(i, 2 * pairs)
            branch(*chains, single, k, sample.reward, pairs, weight=num_steps / batch)

    return estimate


def estimators(T, decode, kind):
    """{name: (estimate, cost)} for a kind of reward; costs in U-Net forwards per picture, a sweep's step counting 3.

    Args:
        T: num_steps.
        decode: cost of decoding and scoring a picture, in U-Net forwards.
        kind: "smooth", "rough" or "black box".
    """
    full, predicted = T + 3 * T, T + 3 * T + T * decode
    likelihood = {
        "ddpo, leave-one-out": (swept(T, ddpo), full),
        "ddpo, predicted x0": (swept(T, ddpo, "predicted x0"), predicted),
    }
    if kind == "black box":
        pairs = 2
        return {
            **likelihood,
            "rlr, leave-one-out": (adaptive(T, "leave-one-out", differentiable=False), full),
            "rlr, predicted x0": (adaptive(T, "predicted x0", differentiable=False), predicted),
            f"branches {pairs}": (branching(T, pairs), T + 3 + 2 * pairs * ((T - 1) / 2 + decode)),
        }
    chosen = {
        "full_bp": (swept(T, full_bp), full),
        "rlr, leave-one-out": (adaptive(T, "leave-one-out"), full),
        "rlr, predicted x0": (adaptive(T, "predicted x0"), predicted),
        "rlr .5, predicted x0": (swept(T, lambda n: rlr(n, 0.5, True), "predicted x0"), predicted),
        **likelihood,
        "rlr_paper, likelihood ratio": (paper(T, "likelihood_ratio"), full),
        "truncated_bp 1": (swept(T, lambda n: truncated_bp(n, 1)), T + 3),
        "truncated_bp 5": (swept(T, lambda n: truncated_bp(n, min(5, n))), T + 3 * 5),
        "alignprop": (swept(T, alignprop), T + 3 * (T + 1) / 2),
    }
    for fraction in (0.5, 0.25):
        calls = full_bp(T)._replace(fraction=fraction).expected_steps
        estimate = adaptive(T, "leave-one-out", fraction=fraction)
        chosen[f"rlr, sweep_fraction {fraction}"] = estimate, T + 3 * calls
    if kind == "smooth":
        chosen["ddpo, no baseline"] = (swept(T, ddpo, "none"), full)
        chosen["rlr_paper, zeroth order"] = (paper(T, "zeroth_order"), T + 3 * 3)
        chosen["draft_lv 2"] = (draft_lv(T), T + 2 * 3)
    return chosen


def flat_gradient(parameters):
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return gradient


def measure_toy(seed, batches, batch_size, warmup=4):
    """Bias and variance on the closed form: rows of estimator, max |z| over the coordinates, variance per picture."""
    torch.manual_seed(seed)
    random.seed(seed)
    chain = LinearGaussianChain()
    parameters, T = list(chain.parameters()), chain.num_steps
    (-chain.expected_reward()).backward()
    truth = flat_gradient(parameters)
    chosen = {name: estimate for name, (estimate, _) in estimators(T, 0.0, "smooth").items() if "draft_lv" not in name}
    chosen["rlr .9, leave-one-out"] = swept(T, lambda n: rlr(n, 0.9, True))
    for fraction in (0.5, 0.25):
        chosen[f"ddpo, sweep_fraction {fraction}"] = swept(T, ddpo, fraction=fraction)
    draws = {name: [] for name in chosen}
    for i in range(warmup + batches):
        trajectory = rollout(
            chain, torch.randn(batch_size, 4, dtype=torch.float64), predict=range(1, chain.num_steps + 1)
        )
        x_0 = trajectory.latents[0]
        rewards = chain.reward(x_0)
        with torch.no_grad():
            predicted = predicted_rewards(trajectory, chain.reward)
        sample = Sample(
            chain=chain,
            trajectory=trajectory,
            reward=chain.reward,
            reward_and_grad=lambda x: (chain.reward(x), chain.reward_grad(x)),
            rewards=rewards,
            reward_grad=chain.reward_grad(x_0),
            predicted=predicted,
            parameters=parameters,
        )
        for name, estimate in chosen.items():
            estimate(sample)
            gradient = flat_gradient(parameters)
            if i >= warmup:
                draws[name].append(gradient)
    rows = []
    for name, values in draws.items():
        values = torch.stack(values)
        z = (values.mean(0) - truth) / (values.std(0) / len(values) ** 0.5)
        rows.append(
            {"estimator": name, "max_z": z.abs().max().item(), "variance": batch_size * values.var(0).sum().item()}
        )
    return rows


# R + A sin(OMEGA w . picture): over the pictures' spread the sine averages to nothing, and so does its share of the
# gradient of E[R]; but at any one picture dR/dx_0 is almost all sine.
AMPLITUDE, OMEGA = 0.5, 300.0


class TinyStableDiffusion:
    """tiny-sd with a LoRA that has moved a little, and its rewards."""

    def __init__(self, num_steps):
        self.num_steps = num_steps
        self.pipeline = StableDiffusionPipeline.from_pretrained(os.path.join(ROOT, "assets", "tiny-sd"))
        self.vae, self.scheduler = self.pipeline.vae.requires_grad_(False), self.pipeline.scheduler
        self.scheduler.set_timesteps(num_steps)
        torch.manual_seed(0)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet = self.pipeline.unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        self.aesthetic = load_reward("aesthetic", path=os.path.join(ROOT, "assets", "tiny-aesthetic"))
        direction = torch.randn(3, 32, 32)
        self.direction = direction / direction.norm()
        self.captions = load_prompts(os.path.join(ROOT, "assets", "digits.txt"))

    def chain(self, prompts):
        with torch.no_grad():
            embeds = self.pipeline.encode_prompt(prompts, "cpu", 1, True)
        return StableDiffusionChain(self.pipeline.unet, self.scheduler, *embeds, guidance_scale=5.0, eta=1.0)

    def reward(self, latents, rough):
        images = decode_latents(self.vae, latents)
        sine = AMPLITUDE * torch.sin(OMEGA * (images * self.direction).sum((1, 2, 3))) if rough else 0.0
        return self.aesthetic(images, [""] * len(images)) + sine

    def samples(self, batch_size, kinds):
        """One run, as a `Sample` for each kind of reward."""
        prompts = random.choices(self.captions, k=batch_size)
        chain = self.chain(prompts)
        trajectory = rollout(chain, torch.randn(batch_size, 4, 8, 8), predict=range(1, chain.num_steps + 1))
        samples = {}
        for kind in kinds:
            rough = kind == "rough"

            @torch.no_grad()
            def reward(latents, rough=rough):
                return self.reward(latents, rough)

            def reward_and_grad(latents, rough=rough):
                x_0 = latents.clone().requires_grad_()
                rewards = self.reward(x_0, rough)
                return rewards.detach(), torch.autograd.grad(rewards.sum(), x_0)[0]

            rewards, reward_grad = reward_and_grad(trajectory.latents[0])
            samples[kind] = Sample(
                chain=chain,
                trajectory=trajectory,
                reward=reward,
                reward_and_grad=reward_and_grad,
                rewards=rewards,
                reward_grad=None if kind == "black box" else reward_grad,
                predicted=predicted_rewards(trajectory, reward),
                parameters=self.parameters,
            )
        return samples


def draw_tiny(worker, num_steps, batch_size, warmup, draws, truth_draws, decode):
    """One process's share: {(kind, estimator): (draws, parameters)} and the draws of full backpropagation."""
    torch.set_num_threads(1)
    tiny = TinyStableDiffusion(num_steps)
    torch.manual_seed(1000 + worker)
    random.seed(1000 + worker)
    kinds = ("smooth", "rough", "black box")
    chosen = {(kind, name): e for kind in kinds for name, (e, _) in estimators(num_steps, decode, kind).items()}
    gradients = {key: [] for key in chosen}
    for i in tqdm(range(warmup + draws), desc="estimators", disable=worker > 0):
        samples = tiny.samples(batch_size, kinds)
        for (kind, name), estimate in chosen.items():
            estimate(samples[kind])
            gradient = flat_gradient(tiny.parameters)
            if i >= warmup:
                gradients[kind, name].append(gradient)
    truth = []
    for _ in tqdm(range(truth_draws), desc="truth", disable=worker > 0):
        swept(num_steps, full_bp)(tiny.samples(batch_size, ("smooth",))["smooth"])
        truth.append(flat_gradient(tiny.parameters))
    return {key: torch.stack(values) for key, values in gradients.items()}, torch.stack(truth)


def decode_cost(num_steps):
    """Decoding and scoring a picture in guided U-Net forwards: the median ratio of interleaved repeats."""
    import time

    tiny = TinyStableDiffusion(num_steps)
    chain, x, ratios = tiny.chain(tiny.captions[:16]), torch.randn(16, 4, 8, 8), []
    with torch.no_grad():
        for _ in range(9):
            times = [time.perf_counter()]
            for call in (lambda: chain.mean(1, x), lambda: tiny.reward(x, False)):
                call()
                times.append(time.perf_counter())
            ratios.append((times[2] - times[1]) / (times[1] - times[0]))
    return sorted(ratios)[4]


def end_with_parent():
    """Let this process end when the one that has started it does, however that ends: no work is left behind."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def worker_pool(workers):
    """Fresh processes for long work."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def measure_tiny(num_steps, batch_size, warmup, draws, truth_draws, workers):
    """Rows of reward, estimator, relative bias and its noise, noise-to-signal, cost, their product, cosine."""
    decode = decode_cost(num_steps)
    share = (num_steps, batch_size, warmup, draws // workers, truth_draws // workers, decode)
    with worker_pool(workers) as pool:
        results = list(pool.map(draw_tiny, range(workers), *([value] * workers for value in share)))
    gradients = {key: torch.cat([result[0][key] for result in results]).double() for key in results[0][0]}
    truth = torch.cat([result[1] for result in results] + [gradients["smooth", "full_bp"]]).double().mean(0)
    signal = truth.square().sum()
    rows = []
    for (kind, name), values in gradients.items():
        variance = values.var(0).sum()
        noise = (variance / len(values) / signal).sqrt()
        bias = ((values.mean(0) - truth).square().sum() / signal - noise**2).clamp_min(0).sqrt()
        cost = estimators(num_steps, decode, kind)[name][1]
        noise_to_signal = batch_size * variance / signal
        rows.append(
            {
                "reward": kind,
                "estimator": name,
                "relative_bias": bias.item(),
                "bias_noise": noise.item(),
                "noise_to_signal": noise_to_signal.item(),
                "cost": cost / (4 * num_steps),
                "noise_to_signal_x_cost": (noise_to_signal * cost / (4 * num_steps)).item(),
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
    """Bias against noise at equal compute, a point per estimator; hollow where the noise hides the bias."""
    kinds, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("reward", "estimator"))
    figure = Figure(figsize=(4.2 * len(kinds) + 2.5, 4.2), layout="constrained")
    shown = {}
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds):
        for row in rows:
            if row["reward"] != kind:
                continue
            index, hidden = names.index(row["estimator"]), row["bias_noise"] > 0.2
            (shown[row["estimator"]],) = axes.plot(
                row["noise_to_signal_x_cost"],
                0.0 if hidden else row["relative_bias"],
                "os^Dv<>pP*hXd8"[index % 14],
                color=f"C{index % 10}",
                mfc="none" if hidden else None,
                ms=8,
            )
        axes.set(xscale="log", title=f"{kind} reward", xlabel="noise-to-signal x cost of a picture", ylim=(-0.05, 1.1))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative bias (hollow: hidden by noise)")
    figure.legend([shown[name] for name in names], names, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def parse_benchmark(parser, input_args):
    """The arguments with those that all benchmarks have: --quick, whose figures mean nothing, and --out, a folder that then is
    there: benchmarks/results by default, or with --quick a new one."""
    parser.add_argument("--quick", action="store_true", help="A minute's worth, to see that everything runs.")
    parser.add_argument(
        "--out", default=None, help="Folder of the results; default: benchmarks/results, with --quick a temporary one."
    )
    args = parser.parse_args(input_args)
    if args.out is None:
        args.out = tempfile.mkdtemp() if args.quick else os.path.join(ROOT, "benchmarks", "results")
    os.makedirs(args.out, exist_ok=True)
    print(f"results go to {args.out}")
    return args


def write_csv(rows, path, header):
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(f"# {header}\n")
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="Processes for tiny-sd, of one thread each.")
    args = parse_benchmark(parser, input_args)
    command = "python benchmarks/gradient_quality.py" + (" --quick" if args.quick else "")
    header = f"{command}, {platform.machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}"

    toy = []
    for seed in range(1 if args.quick else 3):
        batches, batch_size = (64, 64) if args.quick else (256, 128)
        toy += [{"seed": seed, **row} for row in measure_toy(seed, batches, batch_size)]
    print_table("Linear-Gaussian chain, d = 4, T = 10: bias as max |z|, variance of a picture's gradient", toy)
    write_csv(toy, os.path.join(args.out, "gradient_quality_toy.csv"), header)

    settings = {"num_steps": 20, "batch_size": 32, "warmup": 3, "draws": 14, "truth_draws": 56}
    if args.quick:
        settings = {"num_steps": 4, "batch_size": 4, "warmup": 1, "draws": 4, "truth_draws": 4}
    rows, decode = measure_tiny(workers=args.workers, **settings)
    header += f", {settings}, workers {args.workers}, decode + reward = {decode:.2f} guided U-Net forwards"
    print_table(f"tiny-sd, {settings}; decode + reward = {decode:.2f} guided U-Net forwards", rows)
    write_csv(rows, os.path.join(args.out, "gradient_quality.csv"), header)
    plot(rows, os.path.join(args.out, "gradient_quality.png"))
    return toy, rows


if __name__ == "__main__":
    main()
