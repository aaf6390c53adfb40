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
"""What an optimizer step costs beside the bare calls of its networks: seconds, U-Net calls and memory.

    python benchmarks/step_cost.py                   the embedded pipeline, in five minutes on two cores
    python benchmarks/step_cost.py --quick           a few seconds of it, to see that it runs
    python benchmarks/step_cost.py --preset sd14     SD 1.4 at 512 x 512 in bf16 with the ViT-L/14 aesthetic reward, on a GPU
    python benchmarks/step_cost.py --preset sd14 --device cpu --num_inference_steps 2 --rounds 1 --batch_sizes 1 \
        --estimators rlr full_bp truncated_bp        the same on a CPU, where it takes its time

The bare calls are as many guided U-Net forwards, recomputed U-Net forwards with their vector-Jacobian products, decodings
and rewards with theirs, at the latents of the step itself. Step and bare calls take turns in one process, so that the
load of the machine falls on both; the ratio is the median of the rounds' ratios, with the smallest and the largest. SD
1.4 has its full size and random weights, which do not change speed. Peak memory is that of the weights and what a step
adds to them at the most: resident memory on a CPU, the allocator's peak on a GPU. Prints tables and writes step_cost.csv
and step_cost.png, or with a suffix those of the preset.
"""

import argparse
import ctypes
import multiprocessing
import os
import platform
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, Optional

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params, free_memory


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from gradient_quality import parse_benchmark, write_csv  # noqa: E402
from reward_cost import cases as reward_cases  # noqa: E402
from reward_cost import peak_memory, seconds_of  # noqa: E402
from reward_models import load_reward  # noqa: E402
from reward_models.base import WeightedSum  # noqa: E402
from rlr_utils import (  # noqa: E402
    ClippedRatio,
    PerturbedChain,
    StableDiffusionChain,
    WeightPerturbation,
    backward_sweep,
    ddpo,
    decode_latents,
    draft_lv,
    full_bp,
    leave_one_out,
    renoise,
    rlr,
    rlr_paper,
    rollout,
    truncated_bp,
)
from train_rlr_sd import add_adapter, load_pipeline, parse_args, score_latents  # noqa: E402


SD14_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD14_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD14_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LV_SAMPLES = 2
# {name: schedule of T steps and sub-chains of h}. AlignProp is shown with the mean of its random K.
ESTIMATORS = {
    "rlr": lambda T, h: rlr(T, 0.9, differentiable=True),
    "rlr, keep_graphs": lambda T, h: rlr(T, 0.9, differentiable=True),
    "rlr, sweep_fraction .5": lambda T, h: rlr(T, 0.9, differentiable=True)._replace(fraction=0.5),
    "rlr_paper": lambda T, h: rlr_paper(T, 2, h, "zeroth_order"),
    "rlr_paper, rest likelihood_ratio": lambda T, h: rlr_paper(T, 2, h, "likelihood_ratio"),
    "full_bp": lambda T, h: full_bp(T),
    "ddpo": lambda T, h: ddpo(T),
    "alignprop": lambda T, h: truncated_bp(T, (T + 1) // 2),
    "truncated_bp": lambda T, h: truncated_bp(T, 1),
    "draft_lv": lambda T, h: draft_lv(T),
}


class Model(NamedTuple):
    """What a run has on its device."""

    unet: torch.nn.Module
    vae: torch.nn.Module
    scheduler: DDIMScheduler
    reward: torch.nn.Module
    embeds: torch.Tensor
    vae_scale_factor: int
    decode_batch_size: Optional[int]

    @property
    def trainable(self):
        return [p for p in self.unet.parameters() if p.requires_grad]


class Case(NamedTuple):
    """What is measured: an estimator, T, pictures at a time, the sub-chain's length h, and the side in pixels."""

    estimator: str
    num_steps: int
    batch_size: int
    length: int
    resolution: int


def with_lora(unet, accelerator, checkpointing):
    """The U-Net as the training script has it."""
    unet.requires_grad_(False)
    add_adapter(parse_args([]), unet)
    cast_training_params(unet, dtype=torch.float32)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return accelerator.prepare_model(unet.to(accelerator.device), evaluation_mode=True)


def bundle(accelerator, checkpointing):
    """The embedded pipeline and aesthetic reward."""
    assets, device = os.path.join(ROOT, "assets"), accelerator.device
    pipeline = load_pipeline(
        parse_args(["--pretrained_model_name_or_path", os.path.join(assets, "tiny-sd")]), torch.float32
    )
    pipeline.vae.enable_gradient_checkpointing()
    return Model(
        with_lora(pipeline.unet, accelerator, checkpointing),
        pipeline.vae.to(device),
        pipeline.scheduler,
        load_reward("aesthetic", path=os.path.join(assets, "tiny-aesthetic"), device=device),
        pipeline.encode_prompt("a red seven", "cpu", 1, False)[0].detach().to(device),
        pipeline.vae_scale_factor,
        decode_batch_size=None,
    )


def sd14(accelerator, checkpointing, dtype):
    """SD 1.4 and the ViT-L/14 aesthetic reward at full size, with random weights."""
    device = accelerator.device
    with device:
        unet, vae = UNet2DConditionModel(**SD14_UNET), AutoencoderKL(**SD14_VAE).requires_grad_(False)
        reward = reward_cases(quick=False)["aesthetic"]().reward.eval().requires_grad_(False)
    reward.clip.text_model = reward.clip.text_projection = None
    vae.enable_gradient_checkpointing()
    return Model(
        with_lora(unet.to(dtype=dtype, memory_format=torch.channels_last), accelerator, checkpointing),
        vae.to(dtype=dtype, memory_format=torch.channels_last),
        DDIMScheduler(**SD14_SCHEDULER),
        reward,
        torch.randn(1, 77, 768, device=device, dtype=dtype),
        vae_scale_factor=8,
        decode_batch_size=1,
    )


def on_cpu(args):
    return args.device == "cpu" or not torch.accelerator.is_available()


def load(args):
    """The model of --preset."""
    torch.manual_seed(0)
    random.seed(0)
    precision = args.mixed_precision or ("bf16" if args.preset == "sd14" else "no")
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu(args))
    if args.preset == "bundle":
        return bundle(accelerator, args.gradient_checkpointing)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]
    return sd14(accelerator, args.gradient_checkpointing, dtype)


class Step:
    """One optimizer step, from the noise to the optimizer, and its networks' bare calls at the same latents.

    What train_rlr_sd.py does besides takes no call of theirs: it looks up prompts, gathers over ranks, and logs.
    """

    def __init__(self, model, case):
        self.model, self.case = model, case
        self.decode_batch_size = model.decode_batch_size or case.batch_size
        # How often the sweep is taken, each time at a re-noised last step where it is more than once.
        self.samples = LV_SAMPLES if case.estimator == "draft_lv" else 1
        self.schedule = ESTIMATORS[case.estimator](case.num_steps, case.length)
        # Once, so that step and bare calls are of the same steps, and as many as in the mean.
        self.swept = []
        while len(self.swept) != round(self.schedule.expected_steps):
            self.weights = self.schedule.draw_weights()
            self.swept = [k for k in self.schedule.swept if self.weights[k] > 0]
        self.keep = self.swept if case.estimator.endswith("keep_graphs") else []
        model.scheduler.set_timesteps(case.num_steps)
        size = case.resolution // model.vae_scale_factor
        shape = (case.batch_size, model.unet.config.in_channels, size, size)
        embeds = model.embeds.expand(case.batch_size, -1, -1)
        self.chain = StableDiffusionChain(model.unet, model.scheduler, embeds, embeds)
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(embeds.device)
        self.prompts = ["a red seven"] * case.batch_size
        self.rewards = WeightedSum({"aesthetic": (1.0, model.reward)})
        self.optimizer = torch.optim.AdamW(model.trainable, lr=0.0)
        self.trajectory = None

    @property
    def vjps(self):
        """Recomputed U-Net calls."""
        return self.samples * len(self.swept)

    def score(self, latents, with_gradient):
        scores, gradient = score_latents(
            self.model.vae, self.rewards, latents, self.prompts, self.decode_batch_size, with_gradient
        )
        return leave_one_out(scores["total"]), gradient

    def run(self):
        chain, schedule, estimator = self.chain, self.schedule, self.case.estimator
        generators = [torch.Generator().manual_seed(i) for i in range(self.case.batch_size)]
        perturbation = WeightPerturbation(self.model.trainable, 0.02, random.getrandbits(62), schedule.perturbed)
        self.trajectory = trajectory = rollout(
            PerturbedChain(chain, perturbation), self.x_T, generators, keep=self.keep
        )
        x_0, with_gradient = trajectory.latents[0], estimator not in ("ddpo", "draft_lv")
        advantages, reward_grad = self.score(x_0, with_gradient)
        if estimator == "draft_lv":
            for _ in range(self.samples):
                renoised = renoise(chain, x_0)
                _, reward_grad = self.score(renoised.latents[0], True)
                reward_grad = reward_grad / self.samples
                backward_sweep(chain, renoised, schedule.mixing, reward_grad=reward_grad, stop_after=1)
        elif estimator == "ddpo":
            backward_sweep(chain, trajectory, schedule.mixing, cotangent=ClippedRatio(chain, trajectory, advantages))
        else:
            backward_sweep(
                chain,
                trajectory,
                schedule.mixing,
                reward_grad=reward_grad,
                advantages=advantages,
                stop_after=schedule.stop_after,
                weights=self.weights,
            )
            perturbation.add_gradient(advantages.mean().item())
        torch.nn.utils.clip_grad_norm_(self.model.trainable, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bare(self):
        """The calls of `run`, after one, with nothing between them, and with a decoder that computes nothing twice."""
        model, latents, num_steps = self.model, self.trajectory.latents, self.case.num_steps
        timesteps = model.scheduler.timesteps.to(self.x_T.device)
        embeds = self.chain.negative_prompt_embeds[:1]
        with_gradient = self.case.estimator != "ddpo"

        def predict(k, x):
            inputs = torch.cat([x, x]).to(embeds.dtype)
            own = embeds.expand(len(inputs), -1, -1)
            return model.unet(inputs, timesteps[num_steps - k], encoder_hidden_states=own).sample

        def decode_and_score(with_gradient):
            for start in range(0, len(latents[0]), self.decode_batch_size):
                part = slice(start, start + self.decode_batch_size)
                x_0 = latents[0][part].detach().requires_grad_(with_gradient)
                with torch.set_grad_enabled(with_gradient):
                    images = decode_latents(model.vae, x_0)
                    pixels = images.detach().requires_grad_(with_gradient)
                    scores = model.reward(pixels, self.prompts[part])
                if with_gradient:
                    scores.sum().backward()
                    images.backward(pixels.grad)

        model.vae.disable_gradient_checkpointing()
        with torch.no_grad():
            for k in range(num_steps, 0, -1):
                if k not in self.keep:
                    predict(k, latents[k])
        if self.case.estimator == "draft_lv":
            decode_and_score(False)
        for _ in range(self.samples):
            decode_and_score(with_gradient)
        with_input_grad = any(self.schedule.mixing[k] for k in self.schedule.swept if k > 1)
        for k in self.swept * self.samples:
            prediction = predict(k, latents[k].detach().requires_grad_(with_input_grad))
            torch.autograd.backward(prediction, prediction.detach())
        self.optimizer.zero_grad()
        model.vae.enable_gradient_checkpointing()

    @property
    def stored_bytes(self):
        """Latents and noises of the rollout, which grow with T by design."""
        return (2 * self.case.num_steps + 1) * self.x_T.nbytes


def matmul_flops(device, dtype):
    """FLOP/s of a large product of matrices, the best of five."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(5))


def measure(model, case, rounds, peak_flops, bar):
    """A row: time and its ratio to the bare calls', U-Net calls, memory, and how busy the processor was."""
    step = Step(model, case)
    sides, seconds = {"step": step.run, "bare": step.bare}, {"step": [], "bare": []}
    step.run()
    with FlopCounterMode(display=False) as counter:  # this round warms up, too
        step.bare()
    for i in range(rounds):
        for side in sorted(sides, reverse=i % 2 == 0):
            seconds[side].append(seconds_of(sides[side]))
    bar.update()
    ratios = [a / b for a, b in zip(*seconds.values())]
    median = statistics.median(seconds["step"])
    return {
        **case._asdict(),
        "seconds_per_image": median / case.batch_size,
        "images_per_second": case.batch_size / median,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "unet_forwards_per_image": case.num_steps - len(step.keep),
        "unet_vjps_per_image": step.vjps,
        "tflop_per_image": counter.get_total_flops() / case.batch_size / 1e12,
        "utilisation": counter.get_total_flops() / median / peak_flops,
        "stored_mib": step.stored_bytes / 2**20,
    }


def memory(args, cases):
    """The peak of every case's step, and the weights', in MiB.

    On a CPU in a process of its own on one thread, where every tensor's memory goes back to the system at once: resident
    memory is then that of the tensors and not of what happened to be there before.
    """
    torch.set_num_threads(1)
    if on_cpu(args):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    model = load(args)
    weights = sum(p.nbytes for module in (model.unet, model.vae, model.reward) for p in module.parameters())
    rows = []
    for case in tqdm(cases, desc="Memory"):
        step = Step(model, case)
        # The first run shows, beside what the embedded pipeline takes, what libraries set up for these sizes.
        peak = min(peak_memory(step.run, step.x_T.device) for _ in range(2 if args.preset == "bundle" else 1))
        rows.append({"step_mib": peak / 2**20, "peak_mib": (weights + peak) / 2**20})
    return rows


def print_table(title, rows):
    print(f"\n{title}")
    print(
        f"{'estimator':<34}{'T':>4}{'batch':>6}{'h':>3}{'pixels':>7}{'s / image':>11}{'images / s':>11}{'ratio':>7}"
        f"{'range':>15}{'forwards':>9}{'VJPs':>6}{'utilisation':>12}{'peak MiB':>9}{'of the step':>12}{'stored':>7}"
    )
    for row in rows:
        spread = f"{row['ratio_min']:.3f} - {row['ratio_max']:.3f}"
        print(
            f"{row['estimator']:<34}{row['num_steps']:>4}{row['batch_size']:>6}{row['length']:>3}{row['resolution']:>7}"
            f"{row['seconds_per_image']:>11.4f}{row['images_per_second']:>11.3f}{row['ratio']:>7.3f}{spread:>15}"
            f"{row['unet_forwards_per_image']:>9}{row['unet_vjps_per_image']:>6g}{row['utilisation']:>12.2f}"
            f"{row['peak_mib']:>9.1f}{row['step_mib']:>12.1f}{row['stored_mib']:>7.1f}"
        )


def plot(groups, path):
    """Left: every estimator's ratio with its range. Then seconds per image and peak memory by what has been varied."""
    figure = Figure(figsize=(3.2 * len(groups) + 2, 5.2), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False)
    for (time_cell, memory_cell), (title, (key, rows)) in zip(axes.T, groups.items()):
        memory_used = [row["peak_mib"] for row in rows]
        if key == "estimator":
            several = len({row["batch_size"] for row in rows}) > 1
            names = [row["estimator"] + (f", batch {row['batch_size']}" if several else "") for row in rows]
            spread = [
                [row["ratio"] - row["ratio_min"] for row in rows],
                [row["ratio_max"] - row["ratio"] for row in rows],
            ]
            time_cell.barh(names, [row["ratio"] for row in rows], xerr=spread, capsize=2)
            time_cell.axvline(1.0, color="black", lw=0.8)
            time_cell.set_xlabel("time, bare calls = 1")
            memory_cell.barh(names, memory_used)
            memory_cell.set_xlabel("peak memory, MiB")
            for cell in (time_cell, memory_cell):
                cell.invert_yaxis()
        else:
            shown = [
                (time_cell, [row["seconds_per_image"] for row in rows], "seconds per picture"),
                (memory_cell, memory_used, "peak memory, MiB"),
            ]
            for cell, values, label in shown:
                cell.plot([row[key] for row in rows], values, "o-")
                cell.set(xlabel=key, ylabel=label, ylim=(0, 1.15 * max(values)))
                cell.grid(alpha=0.3)
        time_cell.set_title(title)
    figure.savefig(path, dpi=120)


def bars(groups):
    """Lines that say which bars are met."""
    lines = []
    by_estimator = groups["estimators"][1]
    large = [row for row in by_estimator if row["batch_size"] >= 16]
    if large:
        worst = max(large, key=lambda row: row["ratio"])
        lines.append(
            (worst["ratio"] <= 1.1, f"time beside the bare calls: {worst['ratio']:.3f} ({worst['estimator']})")
        )
    peak = {(row["estimator"], row["batch_size"]): row["peak_mib"] for row in by_estimator}
    for (name, size), used in peak.items():
        if name in ("rlr", "full_bp") and ("truncated_bp", size) in peak:
            ratio = used / peak["truncated_bp", size]
            lines.append((ratio <= 1.1, f"memory of {name} beside truncated_bp with K = 1, batch {size}: {ratio:.3f}"))
    if "steps T" in groups:
        rows = groups["steps T"][1]
        small, large = (row["step_mib"] - row["stored_mib"] for row in (rows[0], rows[-1]))
        ratio = large / small
        first, last = rows[0]["num_steps"], rows[-1]["num_steps"]
        lines.append(
            (ratio <= 1.05, f"memory of a step at T = {last} beside T = {first}, less the stored latents: {ratio:.3f}")
        )
    return [f"{'met   ' if met else 'MISSED'}  {line}" for met, line in lines]


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["bundle", "sd14"], default="bundle", help="The networks.")
    parser.add_argument("--device", default=None, help="Default: the accelerator, if there is one.")
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default=None, help="Default for sd14: bf16."
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Of the U-Net; the decoder's always is.")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="T; default: 20, or 50 for sd14.")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=None, help="Default: 16, or 1, 4 and 8 for sd14."
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=ESTIMATORS,
        default=None,
        metavar="NAME",
        help="Default: all, for sd14 without keep_graphs, whose 50 graphs take 112 GiB a picture.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each step and its bare calls.")
    args = parse_benchmark(parser, input_args)
    full = args.preset == "sd14"
    num_steps = args.num_inference_steps or (50 if full else 20)
    batch_sizes = args.batch_sizes or ([1, 4, 8] if full else [16])
    rounds, resolution = args.rounds, 512 if full else 32
    estimators = args.estimators or [name for name in ESTIMATORS if not (full and name.endswith("keep_graphs"))]
    if args.quick:
        num_steps, batch_sizes, rounds = 4, [2], 1
    groups = {
        "estimators": (
            "estimator",
            [Case(name, num_steps, size, 2, resolution) for size in batch_sizes for name in estimators],
        )
    }
    if not full:
        steps, sizes, lengths, sides = [10, 20, 50, 100], [1, 4, 16], [1, 4, 8], [32, 64, 96]
        if args.quick:
            steps, sizes, lengths, sides = [4, 8], [1, 2], [1, 2], [32, 64]
        plain = Case("rlr", steps[0], 2 if args.quick else 8, 2, resolution)
        paper = plain._replace(estimator="rlr_paper, rest likelihood_ratio")
        groups["steps T"] = ("num_steps", [plain._replace(num_steps=value) for value in steps])
        groups["batch"] = ("batch_size", [plain._replace(batch_size=value) for value in sizes])
        groups["sub-chain h"] = ("length", [paper._replace(length=value) for value in lengths])
        groups["resolution"] = (
            "resolution",
            [plain._replace(resolution=value, batch_size=2) for value in sides],
        )

    model = load(args)
    device, dtype = model.embeds.device, model.embeds.dtype
    peak_flops = matmul_flops(device, dtype)
    with tqdm(total=sum(len(cases) for _, cases in groups.values()), desc="Time") as bar:
        for title, (key, cases) in groups.items():
            turns = rounds if key == "estimator" else min(rounds, 2)
            groups[title] = (key, [measure(model, case, turns, peak_flops, bar) for case in cases])
    every = [row for _, rows in groups.values() for row in rows]
    del model
    cases = [Case(*(row[name] for name in Case._fields)) for row in every]
    if on_cpu(args):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            peaks = other.submit(memory, args, cases).result()
    else:
        free_memory()
        peaks = memory(args, cases)
    for row, peak in zip(every, peaks):
        row.update(peak)

    machine = platform.machine() if on_cpu(args) else torch.cuda.get_device_name()
    command = "python benchmarks/step_cost.py " + " ".join(sys.argv[1:] if input_args is None else input_args)
    header = (
        f"{command.strip()}, {machine}, {torch.get_num_threads()} threads, {dtype}, matmul {peak_flops / 1e12:.2f} TFLOP/s,"
        f" torch {torch.__version__}, diffusers {diffusers.__version__}, {rounds} rounds"
        f"{'' if full else ' (2 where something is varied)'}, seed 0"
    )
    print(header)
    for title, (_, rows) in groups.items():
        print_table(title, rows)
    print("\n" + "\n".join(bars(groups)))
    name = "step_cost_sd14" if full else "step_cost"
    write_csv(every, os.path.join(args.out, f"{name}.csv"), header)
    plot(groups, os.path.join(args.out, f"{name}.png"))
    return groups


if __name__ == "__main__":
    main()
