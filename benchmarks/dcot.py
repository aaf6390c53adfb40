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
"""Does a chain of thought help a reward of fine scale? Edge sharpness of emoji, at equal U-Net calls.

    python benchmarks/dcot.py        or, for a short test, with --quick

Four variants on several seeds: with and without a chain of thought, and with the half-order sub-chain anywhere or in the fine
third of the chain. The levels of "a fox" are "a fox on a white background", "a fox" and "a 3d fox": captions of the kinds that the
embedded model has learned from. Prints a table and writes dcot.csv and dcot.png.
"""

import json
import os
import platform
import statistics
import tempfile

import torch
from bench_common import (
    ASSETS,
    VERSIONS,
    add_workers_flag,
    as_flags,
    forget_earlier_run,
    make_parser,
    parse_benchmark,
    plot_seeds,
    worker_pool,
    write_csv,
)
from rlr_training.prompts import load_prompts
from study_plan import FLAGS
from tqdm import tqdm
from train_rlr_sd import main as train
from train_rlr_sd import parse_args


EMOJI = os.path.join(ASSETS, "emoji.txt")


def sharpness(images, prompts):
    """images (B, 3, H, W) in [0, 1] and B prompts -> (B,): ten times the RMS difference between neighboring pixels."""
    across = (images[..., 1:] - images[..., :-1]).square().mean((1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).square().mean((1, 2, 3))
    return 10 * torch.sqrt(across + down + 1e-6)


def write_prompts(folder):
    """Write the prompts with their levels as JSONL; returns the path."""
    path = os.path.join(folder, "levels.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for prompt in load_prompts(EMOJI):
            levels = {
                "coarse": f"{prompt} on a white background",
                "mid": prompt,
                "fine": f"a 3d {prompt.partition(' ')[2]}",
            }
            file.write(json.dumps({"prompt": prompt, **levels}) + "\n")
    return path


def run(has_thought, is_fine, seed, num_steps, steps, batch_size, images):
    """The row of one training run.

    Args:
        has_thought: whether the prompts have levels.
        is_fine: whether the sub-chain starts in the fine third only.
        num_steps: T.
        steps: optimizer steps.
        batch_size: images of a step.
        images: on which base and tuned model are compared.
    """
    torch.set_num_threads(1)
    forget_earlier_run()
    last_start = max(num_steps // 3 - 1, 2) if is_fine else num_steps - 1
    with tempfile.TemporaryDirectory() as folder:
        output_dir = os.path.join(folder, "out")
        numbers = {"num_inference_steps": num_steps, "max_train_steps": steps, "seed": seed, "learning_rate": 3e-3}
        numbers |= {"train_batch_size": batch_size, "decode_batch_size": batch_size, "num_eval_images": images}
        flags = [
            *("--pretrained_model_name_or_path", os.path.join(ASSETS, "tiny-emoji"), *FLAGS, *as_flags(numbers)),
            *("--prompts", write_prompts(folder) if has_thought else EMOJI, "--output_dir", output_dir),
            *("--reward", f"{os.path.abspath(__file__)}:sharpness", "--gradient_estimator", "rlr_paper"),
            *("--rest", "likelihood_ratio", "--subchain_length", "2", "--subchain_range", "2", str(last_start)),
        ]
        train(parse_args(flags))
        with open(os.path.join(output_dir, "evaluation.json"), encoding="utf-8") as file:
            results = json.load(file)
    return {
        "chain_of_thought": has_thought,
        "fine_range": is_fine,
        "seed": seed,
        "base": results["base"]["mean"],
        "tuned": results["tuned"]["mean"],
        "gain": results["gain"]["mean"],
    }


def group(rows):
    """{variant: rows of all seeds}."""
    groups = {}
    for row in rows:
        name = "chain of thought" if row["chain_of_thought"] else "plain"
        groups.setdefault(name + (", fine range" if row["fine_range"] else ""), []).append(row)
    return groups


def print_table(groups):
    print(f"{'':<30}{'base':>8}{'gain':>8}{'lowest':>8}{'highest':>9}")
    for name, rows in groups.items():
        gains = [row["gain"] for row in rows]
        base = statistics.mean(row["base"] for row in rows)
        print(f"{name:<30}{base:>8.3f}{statistics.mean(gains):>8.3f}{min(gains):>8.3f}{max(gains):>9.3f}")


def main(input_args=None):
    parser = make_parser(__doc__)
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    seeds, *sizes = (1, 4, 1, 2, 4) if args.quick else (3, 20, 24, 16, 64)
    num_steps, steps, batch_size, _ = sizes
    variants = [(has_thought, is_fine) for is_fine in (False, True) for has_thought in (False, True)]
    with worker_pool(args.workers) as pool:
        futures = [pool.submit(run, *variant, seed, *sizes) for variant in variants for seed in range(seeds)]
        rows = [future.result() for future in tqdm(futures, desc="Runs")]
    header = (
        f"python benchmarks/dcot.py{' --quick' if args.quick else ''}, {platform.machine()}, {VERSIONS},"
        f" {seeds} seeds, {steps} optimizer steps of {batch_size} images, T = {num_steps}"
    )
    groups = group(rows)
    print(header)
    print_table(groups)
    write_csv(rows, os.path.join(args.out, "dcot.csv"), header)
    gains = {name: [row["gain"] for row in rows] for name, rows in groups.items()}
    plot_seeds(gains, "gain in edge sharpness", os.path.join(args.out, "dcot.png"), (6.5, 3.2))
    return rows


if __name__ == "__main__":
    main()
