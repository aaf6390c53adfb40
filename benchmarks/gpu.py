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
"""What a GPU makes of a training step of SD 1.4 at 512 x 512: its time, its memory, and where the time goes.

    python benchmarks/gpu.py            at most nine minutes, on an NVIDIA GPU of at least 40 GB
    python benchmarks/gpu.py --quick    the embedded pipeline on any device, to test the benchmark

The networks have their full sizes and random weights, in bf16. The figures are:

- rates: of a large matrix product and of a copy, against which the rest is held.
- network: milliseconds and kernels of a guided forward, and of one with its vector-Jacobian product, beside those of the same
  U-Net without a LoRA and without what the training wraps around it.
- step: seconds of a whole optimizer step by estimator and batch size, at few denoising steps and at 50; compiled, too.
- memory: the allocator's peak during such a step beside the count of benchmarks/memory.py.
- profile: the kernels that take the most time of a step, and how long the GPU waits for launches.
- runs: short runs of every estimator and family in every precision, by tests/test_rlr_gpu.py.

Every figure is written to gpu.json as soon as it is known, and a run that was stopped continues there; gpu.md has the tables.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from bench_common import (
    ROOT,
    VERSIONS,
    in_own_process,
    machine_name,
    make_parser,
    parse_benchmark,
    peak_memory,
    seconds_of,
)
from bench_networks import load, runs_on_cpu
from memory import GIB, count
from rlr_training.cuda_graphs import GraphedNetwork
from step_cost import Case, Step, matmul_flops
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusers import UNet2DConditionModel
from diffusers.training_utils import free_memory


ROUNDS = 5
STEPS, ALL_STEPS = 10, 50  # denoising steps of most figures, and of the one that is a real step
BATCH_SIZES = (1, 4, 8)
ESTIMATORS = ("rlr", "full_bp", "ddpo")
TOP_KERNELS = 12
# How the U-Net is called.
PLAIN, GRAPHED, COMPILED = "plain", "CUDA graphs", "compiled blocks"


class Bench:
    """The networks of a preset, loaded when they are first asked for, plain or compiled.

    Args:
        quick: the embedded pipeline instead of SD 1.4.
    """

    def __init__(self, quick):
        self.quick = quick
        preset, precision = ("bundle", "no") if quick else ("sd14", "bf16")
        self.settings = SimpleNamespace(
            preset=preset, device=None, mixed_precision=precision, gradient_checkpointing=False
        )
        self.on_cpu = runs_on_cpu(self.settings)
        self.resolution = 32 if quick else 512
        self.loaded = (None, None)

    def networks(self, how=PLAIN):
        """`Networks`, of which the U-Net is called as one of `PLAIN`, `GRAPHED` and `COMPILED`; the others are freed."""
        if self.loaded[0] != how:
            self.loaded = (None, None)
            free_memory()
            networks = load(self.settings)
            if how == COMPILED:
                networks.model.network.compile_repeated_blocks()
            elif how == GRAPHED:
                networks = networks._replace(unet=GraphedNetwork(networks.unet))
            self.loaded = (how, networks)
        return self.loaded[1]

    def case(self, estimator, num_steps, batch_size):
        return Case(estimator, num_steps, batch_size, 2, self.resolution)


def milliseconds(run):
    """The median time of a call, after two that warm up."""
    run(), run()
    return 1000 * statistics.median(seconds_of(run) for _ in range(ROUNDS))


def kernels_of(run):
    """{kernel: (calls, milliseconds)} of a call on the GPU; empty on a CPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        seconds_of(run)
    rows = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    return {event.key: (event.count, event.self_device_time_total / 1000) for event in rows}


def rates(bench):
    """TFLOP/s of a product of large matrices in bf16 and float32, and GB/s of a copy, counting reads and writes."""
    device = torch.device("cpu") if bench.on_cpu else torch.device("cuda")
    source = torch.randn(2**20 if bench.quick else 2**30, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source)) for _ in range(5))
    return {
        "bf16_tflops": matmul_flops(device, torch.bfloat16) / 1e12,
        "float32_tflops": matmul_flops(device, torch.float32) / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / seconds / 1e9,
    }


def network(bench, batch_size):
    """Milliseconds and kernels of a guided forward and of one with its VJP, with the LoRA and of the bare U-Net."""
    networks = bench.networks()
    config, embeds = networks.model.network.config, networks.embeds
    with embeds.device:
        bare = UNet2DConditionModel.from_config(config).to(embeds.dtype).requires_grad_(False)
    bare.to(memory_format=torch.channels_last)
    x = torch.randn(networks.model.latents_shape(2 * batch_size, (bench.resolution,) * 2)).to(embeds)
    conditions = {"encoder_hidden_states": embeds.expand(2 * batch_size, -1, -1)}
    timestep, figures = torch.tensor(500, device=embeds.device), {}
    for name, unet in (("ours", networks.unet), ("bare", bare)):

        def forward():
            with torch.no_grad():
                unet(x, timestep, **conditions)

        def swept():
            prediction = unet(x.detach().requires_grad_(), timestep, **conditions).sample
            torch.autograd.backward(prediction, prediction.detach())
            networks.unet.zero_grad()

        for what, run in (("forward", forward), ("swept", swept)):
            figures[f"{name}_{what}_ms"] = milliseconds(run)
            figures[f"{name}_{what}_kernels"] = sum(calls for calls, _ in kernels_of(run).values())
    return figures


def step(bench, estimator, num_steps, batch_size, how=PLAIN):
    """Seconds of an optimizer step, its FLOPs, and the share of them in what a large product would do in that time."""
    networks = bench.networks(how)
    one = Step(networks, bench.case(estimator, num_steps, batch_size))
    one.run()
    # Counted on the calls alone, and of the network itself: what CUDA graphs compute is not seen.
    counted = Step(networks._replace(unet=networks.model.network), one.case)
    counted.trajectory = one.trajectory
    with FlopCounterMode(display=False) as counter:
        counted.bare()
    seconds = [seconds_of(one.run) for _ in range(2)]
    flops = counter.get_total_flops()
    peak_flops = matmul_flops(networks.embeds.device, networks.embeds.dtype)
    return {
        "denoising_steps": num_steps,
        "seconds": min(seconds),
        "slower": max(seconds),
        "tflop_per_image": flops / batch_size / 1e12,
        "utilisation": flops / min(seconds) / peak_flops,
    }


def memory(bench, batch_size):
    """GiB at the peak of a step of full_bp, by the allocator and by count."""
    networks = bench.networks()
    parts = (networks.unet, networks.vae, networks.reward)
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    one = Step(networks, bench.case("full_bp", 2, batch_size))
    one.run()
    measured = (weights + peak_memory(one.run, one.x_T.device)) / GIB
    settings = bench.settings
    counted = in_own_process(count, settings.mixed_precision, False, [batch_size], settings.preset, 2)
    return {"measured_gib": measured, "counted_gib": counted[0]["peak_gib"]}


def profile_step(bench, num_steps, batch_size):
    """The kernels that take the most time of a step of rlr, and the share of its time in which the GPU works."""
    one = Step(bench.networks(), bench.case("rlr", num_steps, batch_size))
    one.run()
    seconds = min(seconds_of(one.run) for _ in range(2))
    kernels = kernels_of(one.run)
    total = sum(milliseconds for _, milliseconds in kernels.values())
    top = sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP_KERNELS]
    return {
        "seconds": seconds,
        "kernels": sum(calls for calls, _ in kernels.values()),
        "gpu_busy": total / 1000 / seconds,
        "top": [{"kernel": name[:110], "calls": calls, "share": ms / total} for name, (calls, ms) in top],
    }


def runs(bench):
    """How many of the short runs in tests/test_rlr_gpu.py passed, and which failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_rlr_gpu.py"]
    command += ["-n", str(min(6, os.cpu_count()))]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "RUN_GPU": "1"}, capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else ended.stderr[-500:], "failed": failed}


def figures_of(quick):
    """{title: (function, its arguments)}, in the order in which they are measured."""
    sizes, steps, all_steps = ((1,), 2, 2) if quick else (BATCH_SIZES, STEPS, ALL_STEPS)
    middle, default = sizes[len(sizes) // 2], "rlr, sweep_fraction .5"  # that of --sweep_fraction auto
    figures = {"rates": (rates,)}
    figures |= {f"network, batch {size}": (network, size) for size in sizes}
    figures["profile"] = (profile_step, steps, middle)
    if not quick:
        figures |= {f"memory, batch {size}": (memory, size) for size in sizes}
    for how in (PLAIN,) if quick else (PLAIN, GRAPHED, COMPILED):
        figures[f"step, {default}, batch {middle}, T = {all_steps}, {how}"] = (step, default, all_steps, middle, how)
        for name in ESTIMATORS[:1] if quick else ESTIMATORS:
            figures |= {f"step, {name}, batch {size}, {how}": (step, name, steps, size, how) for size in sizes}
    if not quick:
        figures["runs"] = (runs,)
    return figures


def table(title, rows):
    """A table of rows of equal keys in Markdown."""
    lines = [f"## {title}", "", "| | " + " | ".join(rows[next(iter(rows))]) + " |"]
    lines.append("|---" * (1 + len(rows[next(iter(rows))])) + "|")
    for name, row in rows.items():
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_tables(results, header, path):
    """The figures as Markdown, a table for each kind."""
    lines, done = [header, ""], {name: row for name, row in results.items() if "error" not in row}
    for kind in ("rates", "network", "step", "memory", "runs"):
        rows = {name: row for name, row in done.items() if name.split(",")[0] == kind}
        if rows:
            lines += [*table(kind, rows), ""]
    if "profile" in done:
        summary = dict(done["profile"])
        top = {row.pop("kernel"): row for row in (dict(row) for row in summary.pop("top"))}
        lines += [*table("profile", {"step": summary}), ""]
        if top:
            lines += [*table("kernels of that step", top), ""]
    lines += [f"- {name}: {row['error']}" for name, row in results.items() if "error" in row]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines).rstrip() + "\n")


def main(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.5, help="Begin no figure after so many minutes.")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="Measure only the figures whose titles begin with one of these."
    )
    args = parse_benchmark(parser, input_args)
    bench, started = Bench(args.quick), time.monotonic()
    header = (
        f"python benchmarks/gpu.py, {machine_name(bench.on_cpu)}, {VERSIONS}, {bench.settings.mixed_precision}, seed 0"
    )
    path, results = os.path.join(args.out, "gpu.json"), {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        results = known["results"] if known["header"] == header else {}
    for title, (function, *given) in tqdm(figures_of(args.quick).items(), desc="Figures"):
        late = time.monotonic() - started > 60 * args.minutes
        if late or title in results or not title.startswith(tuple(args.only)):
            continue
        try:
            results[title] = function(bench, *given)
        except torch.OutOfMemoryError as error:
            results[title] = {"error": str(error).splitlines()[0]}
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump({"header": header, "results": results}, file, indent=1)
        os.replace(f"{path}.part", path)
        write_tables(results, header, os.path.join(args.out, "gpu.md"))
    with open(os.path.join(args.out, "gpu.md"), encoding="utf-8") as file:
        print(file.read())
    return results


if __name__ == "__main__":
    main()
