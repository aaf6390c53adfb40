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
"""What a training step costs: its time beside the bare calls of its networks, its memory, and its U-Net calls.

    python benchmarks/step_cost.py                   the embedded pipeline, about five minutes on two cores
    python benchmarks/step_cost.py --quick           a few seconds, to test the benchmark
    python benchmarks/step_cost.py --preset sd14     SD 1.4 at 512 x 512 in bf16 with the ViT-L/14 aesthetic reward, on a GPU
    python benchmarks/step_cost.py --preset sd14 --device cpu --num_inference_steps 2 --rounds 1 --batch_sizes 1 \
        --estimators rlr full_bp truncated_bp        the same on a CPU, which is slow

The bare calls are the guided U-Net forwards, the recomputed U-Net forwards with their vector-Jacobian products, and the
decodings and rewards with theirs, as many as in the step and at the same latents. Step and bare calls take turns in one
process, so the load of the machine affects both. The ratio is the median of the rounds' ratios, with the smallest and the
largest. SD 1.4 has its full size and random weights, which do not change its speed. Peak memory is that of the weights plus
the peak of what a step adds: resident memory on a CPU, the allocator's peak on a GPU. Prints tables and writes step_cost.csv
and step_cost.png, with a suffix for the other preset.
"""

import ctypes
import os
import statistics
import sys
from typing import NamedTuple

import torch
from bench_common import (
    VERSIONS,
    fast_garbage_collection,
    in_own_process,
    machine_name,
    make_parser,
    parse_benchmark,
    peak_memory,
    ratios_of,
    seconds_in_turns,
    seconds_of,
    write_csv,
)
from bench_networks import PROMPT, load, runs_on_cpu
from diffusion_models.decoders import decoder_blocks, recompute_blocks
from reward_models.base import WeightedSum
from rlr_training.scoring import score_latents
from rlr_utils import RLRStep
from step_cost_report import limits, plot, print_table
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusers.training_utils import free_memory


LV_SAMPLES = 2
# {name: settings of `RLRStep` for T steps and sub-chains of h}. AlignProp is measured at the mean of its random K.
ESTIMATORS = {
    "rlr": lambda T, h: {"mixing": 0.9},
    "rlr, keep_graphs": lambda T, h: {"mixing": 0.9, "keep_graphs": T},
    "rlr, sweep_fraction .5": lambda T, h: {"mixing": 0.9, "sweep_fraction": 0.5},
    "rlr_paper": lambda T, h: paper_settings(h, "zeroth_order"),
    "rlr_paper, rest likelihood_ratio": lambda T, h: paper_settings(h, "likelihood_ratio"),
    "full_bp": lambda T, h: {"estimator": "full_bp"},
    "ddpo": lambda T, h: {"estimator": "ddpo"},
    "alignprop": lambda T, h: {"estimator": "truncated_bp", "truncation_steps": (T + 1) // 2},
    "truncated_bp": lambda T, h: {"estimator": "truncated_bp", "truncation_steps": 1},
    "draft_lv": lambda T, h: {"estimator": "draft_lv", "lv_samples": LV_SAMPLES},
}


def paper_settings(length, rest):
    """Those of rlr_paper with a sub-chain that always starts at the same step."""
    return {"estimator": "rlr_paper", "subchain_length": length, "subchain_range": (2, 2), "rest": rest}


class Case(NamedTuple):
    """What is measured: an estimator, T, images per step, length h of the sub-chain, and the side in pixels."""

    estimator: str
    num_steps: int
    batch_size: int
    length: int
    resolution: int


class Step:
    """One optimizer step, from the noise to the optimizer, and the bare calls of its networks at the same latents.

    train_rlr_sd.py also looks up prompts, gathers over ranks, and logs, without further calls of the networks.

    Args:
        networks: `Networks`.
        case: `Case`.

    Attributes:
        calls: U-Net calls for one image, as `RLRStep.expected_calls` counts them.
    """

    def __init__(self, networks, case):
        self.networks, self.case = networks, case
        self.decode_batch_size = networks.decode_batch_size or case.batch_size
        settings = ESTIMATORS[case.estimator](case.num_steps, case.length)
        defaults = {"baseline": "leave_one_out", "sweep_fraction": 1}
        self.rlr = RLRStep(case.num_steps, **{**defaults, **settings}, parameters=networks.trainable)
        schedule = self.rlr.draw_schedule()
        self.calls = self.rlr.expected_calls(schedule)
        # DRaFT-LV sweeps the last step several times, each time after another re-noising.
        self.repeats = LV_SAMPLES if case.estimator == "draft_lv" else 1
        # Drawn once: step and bare calls must be of the same steps, and of as many as on average.
        self.swept = []
        while self.repeats * len(self.swept) != round(self.calls.swept):
            self.schedule = schedule.draw()
            self.swept = [k for k in schedule.swept if self.schedule.weights[k] > 0]
        self.kept = [k for k in self.swept if k <= self.rlr.settings.keep_graphs]
        self.chain = networks.chain(case.num_steps, case.batch_size, (case.resolution, case.resolution))
        shape = networks.model.latents_shape(case.batch_size, (case.resolution, case.resolution))
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(networks.embeds.device)
        self.prompts = [PROMPT] * case.batch_size
        self.rewards = WeightedSum({"aesthetic": (1.0, networks.reward)})
        self.optimizer = torch.optim.AdamW(networks.trainable, lr=0.0)
        self.trajectory = None

    def score(self, latents, with_gradient):
        scores, reward_grad = score_latents(
            self.networks.model.decode, self.rewards, latents, self.prompts, self.decode_batch_size, with_gradient
        )
        return scores["total"], reward_grad

    def run(self):
        """The optimizer step."""
        generators = [torch.Generator().manual_seed(i) for i in range(self.case.batch_size)]
        batch = self.rlr.rollout(self.chain, self.x_T, self.score, generators)
        batch.schedule = batch.schedule._replace(weights=self.schedule.weights)
        self.rlr.backward([batch])
        torch.nn.utils.clip_grad_norm_(self.networks.trainable, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trajectory = batch.trajectory

    def bare(self):
        """The calls of `run`, after one, with nothing between them, and with a decoder that computes nothing twice."""
        networks, latents = self.networks, self.trajectory.latents
        for block in decoder_blocks(networks.vae.decoder):
            del block.forward
        with torch.no_grad():
            for k in range(self.case.num_steps, 0, -1):
                if k not in self.kept:
                    self._predict(k, latents[k])
        if self.case.estimator == "draft_lv":
            self._decode_and_score(with_gradient=False)
        for _ in range(self.repeats):
            self._decode_and_score(with_gradient=self.case.estimator != "ddpo")
        with_input_grad = any(self.schedule.mixing[k] for k in self.schedule.swept if k > 1)
        for k in self.swept * self.repeats:
            prediction = self._predict(k, latents[k].detach().requires_grad_(with_input_grad))
            torch.autograd.backward(prediction, prediction.detach())
        self.optimizer.zero_grad()
        recompute_blocks(networks.vae.decoder)

    def _predict(self, k, x):
        embeds, timestep = self.networks.embeds, self.chain.timesteps[self.case.num_steps - k]
        inputs = torch.cat([x, x]).to(embeds.dtype)
        return self.networks.unet(inputs, timestep, encoder_hidden_states=embeds.expand(len(inputs), -1, -1)).sample

    def _decode_and_score(self, with_gradient):
        x_0 = self.trajectory.latents[0]
        for start in range(0, len(x_0), self.decode_batch_size):
            part = slice(start, start + self.decode_batch_size)
            inputs = x_0[part].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                images = self.networks.model.decode(inputs)
                pixels = images.detach().requires_grad_(with_gradient)
                scores = self.networks.reward(pixels, self.prompts[part])
            if with_gradient:
                scores.sum().backward()
                images.backward(pixels.grad)

    @property
    def stored_bytes(self):
        """Latents and noises of the rollout, which grow with T by design."""
        return (2 * self.case.num_steps + 1) * self.x_T.nbytes


def matmul_flops(device, dtype):
    """FLOP/s of a product of large matrices, the best of five."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(5))


def measure(networks, case, rounds, peak_flops):
    """A row: time and its ratio to the time of the bare calls, U-Net calls, and the use made of the processor."""
    step = Step(networks, case)
    step.run()
    with FlopCounterMode(display=False) as counter:  # this round warms up, too
        step.bare()
    seconds = seconds_in_turns({"step": step.run, "bare": step.bare}, rounds)
    median = statistics.median(seconds["step"])
    return {
        **case._asdict(),
        "seconds_per_image": median / case.batch_size,
        "images_per_second": case.batch_size / median,
        **ratios_of(seconds["step"], seconds["bare"]),
        "unet_forwards_per_image": round(step.calls.forward),
        "unet_vjps_per_image": round(step.calls.swept),
        "tflop_per_image": counter.get_total_flops() / case.batch_size / 1e12,
        "utilisation": counter.get_total_flops() / median / peak_flops,
        "stored_mib": step.stored_bytes / 2**20,
    }


def memory(args, cases):
    """The peak of the step of every case, without and with the weights, in MiB.

    On a CPU it runs in a process of its own on one thread, in which every tensor's memory is returned to the system at once.
    Resident memory is then that of the tensors, whatever was allocated before.
    """
    torch.set_num_threads(1)
    if runs_on_cpu(args):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    networks = load(args)
    modules = (networks.unet, networks.vae, networks.reward)
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    rows = []
    with fast_garbage_collection():
        for case in tqdm(cases, desc="Memory"):
            step = Step(networks, case)
            # With the embedded pipeline, the first run also contains what libraries set up for these sizes.
            peak = min(peak_memory(step.run, step.x_T.device) for _ in range(2 if args.preset == "bundle" else 1))
            rows.append({"step_mib": peak / 2**20, "peak_mib": (weights + peak) / 2**20})
    return rows


def parse_args(input_args):
    """The arguments, with the defaults of the preset filled in."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=["bundle", "sd14"], default="bundle", help="The networks.")
    parser.add_argument("--device", default=None, help="Default: the accelerator, if there is one.")
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default=None, help="Default for sd14: bf16."
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="Checkpoint the U-Net; the decoder always is."
    )
    parser.add_argument("--num_inference_steps", type=int, default=None, help="T. Default: 20, or 50 for sd14.")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=None, help="Default: 16, or 1, 4 and 8 for sd14."
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=ESTIMATORS,
        default=None,
        metavar="NAME",
        help="Default: all, for sd14 without keep_graphs, whose 50 graphs take 77 GiB for one image.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="How often each step and its bare calls take turns.")
    args = parse_benchmark(parser, input_args)
    is_sd14 = args.preset == "sd14"
    args.num_inference_steps = args.num_inference_steps or (50 if is_sd14 else 20)
    args.batch_sizes = args.batch_sizes or ([1, 4, 8] if is_sd14 else [16])
    if args.estimators is None:
        args.estimators = [name for name in ESTIMATORS if not (is_sd14 and name.endswith("keep_graphs"))]
    if args.quick:
        args.num_inference_steps, args.batch_sizes, args.rounds = 4, [2], 1
    return args


def groups_of(args):
    """{title: (column that varies, cases)}."""
    resolution = 512 if args.preset == "sd14" else 32
    by_estimator = [
        Case(name, args.num_inference_steps, size, 2, resolution)
        for size in args.batch_sizes
        for name in args.estimators
    ]
    groups = {"estimators": ("estimator", by_estimator)}
    if args.preset == "bundle":
        steps, sizes, lengths, sides = [10, 20, 50, 100], [1, 4, 16], [1, 4, 8], [32, 64, 96]
        if args.quick:
            steps, sizes, lengths, sides = [4, 8], [1, 2], [1, 2], [32, 64]
        plain = Case("rlr", steps[0], 2 if args.quick else 8, 2, resolution)
        paper = plain._replace(estimator="rlr_paper, rest likelihood_ratio")
        groups["steps T"] = ("num_steps", [plain._replace(num_steps=value) for value in steps])
        groups["batch"] = ("batch_size", [plain._replace(batch_size=value) for value in sizes])
        groups["sub-chain h"] = ("length", [paper._replace(length=value) for value in lengths])
        groups["resolution"] = ("resolution", [plain._replace(resolution=value, batch_size=2) for value in sides])
    return groups


def main(input_args=None):
    args = parse_args(input_args)
    groups, networks = groups_of(args), load(args)
    device, dtype = networks.embeds.device, networks.embeds.dtype
    peak_flops = matmul_flops(device, dtype)
    every_case = [case for _, cases in groups.values() for case in cases]
    with tqdm(total=len(every_case), desc="Time") as bar:
        for title, (key, cases) in groups.items():
            rounds, rows = args.rounds if key == "estimator" else min(args.rounds, 2), []
            for case in cases:
                rows.append(measure(networks, case, rounds, peak_flops))
                bar.update()
            groups[title] = (key, rows)
    del networks
    free_memory()
    every_row = [row for _, rows in groups.values() for row in rows]
    peaks = in_own_process(memory, args, every_case) if runs_on_cpu(args) else memory(args, every_case)
    for row, peak in zip(every_row, peaks):
        row.update(peak)

    command = "python benchmarks/step_cost.py " + " ".join(sys.argv[1:] if input_args is None else input_args)
    header = (
        f"{command.strip()}, {machine_name(runs_on_cpu(args))}, {torch.get_num_threads()} threads, {dtype}, matmul"
        f" {peak_flops / 1e12:.2f} TFLOP/s, {VERSIONS}, {args.rounds} rounds"
        f"{' (2 where something is varied)' if args.preset == 'bundle' else ''}, seed 0"
    )
    print(header)
    for title, (_, rows) in groups.items():
        print_table(title, rows)
    print("\n" + "\n".join(limits(groups)))
    name = "step_cost" if args.preset == "bundle" else f"step_cost_{args.preset}"
    write_csv(every_row, os.path.join(args.out, f"{name}.csv"), header)
    plot(groups, os.path.join(args.out, f"{name}.png"))
    return groups


if __name__ == "__main__":
    main()
