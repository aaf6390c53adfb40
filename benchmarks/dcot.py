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
"""Does a chain of thought help a reward of fine scale? Edge sharpness on the embedded pipeline, with and without, and with
the half-order sub-chain anywhere or in the fine third of the chain; the same U-Net calls for all, several seeds.

    python benchmarks/dcot.py        or, to see that it runs, with --quick

The captions of the embedded pipeline know a colour and a digit and nothing finer, so that its coarse prompt leaves out the
colour ("a seven") and mid and fine are the caption itself. Prints a table and writes dcot.csv and dcot.png.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile

import torch
from matplotlib.figure import Figure
from tqdm import tqdm


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from gradient_quality import parse_benchmark, worker_pool, write_csv  # noqa: E402
from rlr_utils import load_prompts  # noqa: E402
from train_rlr_sd import main as train  # noqa: E402
from train_rlr_sd import parse_args  # noqa: E402


CAPTIONS = os.path.join(ROOT, "assets", "digits.txt")


def sharpness(images, prompts):
    """images (B, 3, H, W) in [0, 1] and B prompts -> (B,): ten times the root mean square difference of neighbours."""
    across = (images[..., 1:] - images[..., :-1]).square().mean((1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).square().mean((1, 2, 3))
    return 10 * torch.sqrt(across + down + 1e-6)


def write_prompts(folder):
    """The captions with their levels, as JSONL."""
    path = os.path.join(folder, "levels.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for caption in load_prompts(CAPTIONS):
            levels = {"coarse": f"a {caption.split()[-1]}", "mid": caption, "fine": caption}
            file.write(json.dumps({"prompt": caption, **levels}) + "\n")
    return path


def run(thought, in_range, seed, num_steps, steps):
    """One training run; its row."""
    torch.set_num_threads(1)
    fine = ["2", str(max(num_steps // 3 - 1, 2))] if in_range else ["2", str(num_steps - 1)]
    with tempfile.TemporaryDirectory() as folder:
        train(
            parse_args(
                [
                    *("--pretrained_model_name_or_path", os.path.join(ROOT, "assets", "tiny-sd")),
                    *("--prompts", write_prompts(folder) if thought else CAPTIONS),
                    *("--reward", f"{os.path.abspath(__file__)}:sharpness", "--gradient_estimator", "rlr_paper"),
                    *("--rest", "likelihood_ratio", "--subchain_length", "2", "--subchain_range", *fine),
                    *(
                        "--num_inference_steps",
                        str(num_steps),
                        "--train_batch_size",
                        "16",
                        "--decode_batch_size",
                        "16",
                    ),
                    *("--learning_rate", "1e-3", "--max_train_steps", str(steps), "--num_eval_images", "60"),
                    *("--seed", str(seed), "--report_to", "none", "--output_dir", os.path.join(folder, "out")),
                ]
            )
        )
        with open(os.path.join(folder, "out", "evaluation.json"), encoding="utf-8") as file:
            results = json.load(file)
    return {
        "chain_of_thought": thought,
        "fine_range": in_range,
        "seed": seed,
        "base": results["base"]["mean"],
        "tuned": results["tuned"]["mean"],
        "gain": results["gain"]["mean"],
    }


def plot(groups, path):
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, rows) in enumerate(groups.items()):
        axes.plot([row["gain"] for row in rows], [place] * len(rows), "o", color="C0", alpha=0.5)
        axes.plot(statistics.mean(row["gain"] for row in rows), place, "|", color="black", ms=18)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.6)
    axes.set(xlabel="gain in edge sharpness; bars: means of the seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, of one thread each.")
    args = parse_benchmark(parser, input_args)
    seeds, num_steps, steps = (1, 4, 1) if args.quick else (3, 20, 20)
    ways = [(thought, in_range) for in_range in (False, True) for thought in (False, True)]
    with worker_pool(args.workers) as pool:
        running = [pool.submit(run, *way, seed, num_steps, steps) for way in ways for seed in range(seeds)]
        rows = [future.result() for future in tqdm(running, desc="Runs")]
    header = (
        f"python benchmarks/dcot.py{' --quick' if args.quick else ''}, {platform.machine()}, torch {torch.__version__},"
        f" {seeds} seeds, {steps} optimizer steps of 16 pictures, T = {num_steps}"
    )
    groups = {}
    for row in rows:
        name = ("chain of thought" if row["chain_of_thought"] else "plain") + (
            ", fine range" if row["fine_range"] else ""
        )
        groups.setdefault(name, []).append(row)
    print(header)
    print(f"{'':<30}{'base':>8}{'gain':>8}{'lowest':>8}{'highest':>9}")
    for name, found in groups.items():
        gains = [row["gain"] for row in found]
        base = statistics.mean(row["base"] for row in found)
        print(f"{name:<30}{base:>8.3f}{statistics.mean(gains):>8.3f}{min(gains):>8.3f}{max(gains):>9.3f}")
    write_csv(rows, os.path.join(args.out, "dcot.csv"), header)
    plot(groups, os.path.join(args.out, "dcot.png"))
    return rows


if __name__ == "__main__":
    main()
