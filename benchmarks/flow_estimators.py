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
"""Gradient estimators on a flow-matching model, the embedded Stable Diffusion 3.

    python benchmarks/flow_estimators.py        or, for a short test, with --quick

Each estimator trains at several learning rates and seeds, on the aesthetic reward and on a black box, the size of the image as a
JPEG file. truncated_bp differentiates the last step alone, at the pipeline's own levels and at evenly spaced ones. A run whose
line is in flow_estimators.jsonl is not repeated. Prints a table and writes flow_estimators.csv and flow_estimators.png.
"""

import json
import os
import platform
import statistics
import tempfile

from bench_common import (
    ASSETS,
    VERSIONS,
    add_workers_flag,
    as_flags,
    best_rates,
    forget_earlier_run,
    make_parser,
    metrics_of,
    parse_benchmark,
    plot_seeds,
    rows_of_runs,
    write_csv,
)
from train_rlr_flow import main as train
from train_rlr_flow import parse_args


MODEL, REWARDS = (os.path.join(ASSETS, name) for name in ("tiny-emoji-sd3", "tiny-emoji-rewards"))
ACCURACY = os.path.join(REWARDS, "emoji_classifier.py:ConceptAccuracy")
FLAGS = [
    *("--pretrained_model_name_or_path", MODEL, "--prompts", os.path.join(ASSETS, "emoji.txt")),
    *("--reward_path", f"aesthetic={REWARDS}", "--heldout_reward", ACCURACY, "--heldout_steps", "1000"),
    *("--feature_model", os.path.join(REWARDS, "clip"), "--num_heldout_images", "4"),
    *("--guidance_scale", "4.5", "--max_sequence_length", "1"),
    *("--train_batch_size", "16", "--decode_batch_size", "16"),
    *("--report_to", "none", "--checkpointing_steps", "1000"),
]
SMOOTH, BLACK_BOX = "aesthetic", "jpeg_compressibility"
# {name: (reward, flags)}
CASES = {
    "rlr": (SMOOTH, []),
    "full_bp": (SMOOTH, ["--gradient_estimator", "full_bp"]),
    "full_bp, eta 0": (SMOOTH, ["--gradient_estimator", "full_bp", "--eta", "0"]),
    "draft_lv": (SMOOTH, ["--gradient_estimator", "draft_lv"]),
    "truncated_bp 1": (SMOOTH, ["--gradient_estimator", "truncated_bp"]),
    "truncated_bp 1, linspace": (SMOOTH, ["--gradient_estimator", "truncated_bp", "--sigmas", "linspace"]),
    "rlr, flow_sde": (SMOOTH, ["--noise", "flow_sde"]),
    "ddpo": (SMOOTH, ["--gradient_estimator", "ddpo"]),
    "rlr, black box": (BLACK_BOX, []),
    "ddpo, black box": (BLACK_BOX, ["--gradient_estimator", "ddpo"]),
}
QUICK = ["rlr", "truncated_bp 1, linspace", "ddpo, black box"]


def run(name, rate, seed, num_steps, steps, images):
    """The row of one training run.

    Args:
        name: a key of `CASES`.
        rate: the learning rate.
        num_steps: T.
        steps: optimizer steps.
        images: on which base and tuned model are compared.
    """
    forget_earlier_run()
    reward, flags = CASES[name]
    numbers = {"num_inference_steps": num_steps, "max_train_steps": steps, "num_eval_images": images, "seed": seed}
    numbers |= {"learning_rate": rate, "reward": reward}
    flags = [*FLAGS, *flags, *as_flags(numbers)]
    with tempfile.TemporaryDirectory() as folder:
        output_dir = os.path.join(folder, "out")
        train(parse_args([*flags, "--output_dir", output_dir]))
        with open(os.path.join(output_dir, "evaluation.json"), encoding="utf-8") as file:
            results = json.load(file)
        seconds = [line["seconds"] for line in metrics_of(output_dir)]
    return {
        **{"estimator": name, "learning_rate": rate, "seed": seed},
        **{"base": results["base"]["mean"], "base_std": results["base"]["std"]},
        **{"gain": results["gain"]["mean"], "gain_error": results["gain"]["standard_error"]},
        "concept_accuracy": results["heldout"]["tuned"]["mean"],
        "seconds_per_step": statistics.median(seconds),
    }


def print_table(best):
    print(
        f"{'':<26}{'rate':>8}{'gain':>8}{'lowest':>8}{'highest':>9}{'in deviations':>15}{'accuracy':>10}{'s/step':>8}"
    )
    for name, rows in best.items():
        gains = [row["gain"] for row in rows]
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key != "estimator"}
        print(
            f"{name:<26}{rows[0]['learning_rate']:>8g}{mean['gain']:>8.3f}{min(gains):>8.3f}{max(gains):>9.3f}"
            f"{mean['gain'] / mean['base_std']:>15.2f}{mean['concept_accuracy']:>10.3f}{mean['seconds_per_step']:>8.2f}"
        )


def main(input_args=None):
    parser = make_parser(__doc__)
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    rates, seeds, sizes = ((1e-3,), 1, (2, 1, 2)) if args.quick else ((1e-3, 3e-3), 3, (10, 40, 128))
    cases = QUICK if args.quick else list(CASES)
    keys = [(name, rate, seed) for seed in range(seeds) for name in cases for rate in rates]
    rows = rows_of_runs(os.path.join(args.out, "flow_estimators.jsonl"), run, keys, sizes, args.workers)
    header = (
        f"python benchmarks/flow_estimators.py{' --quick' if args.quick else ''}, {platform.machine()}, {VERSIONS},"
        f" {seeds} seeds, {sizes[1]} optimizer steps of 16 images,"
        f" T = {sizes[0]}"
    )
    best = best_rates(rows, cases)
    print(header)
    print_table(best)
    write_csv(rows, os.path.join(args.out, "flow_estimators.csv"), header)
    gains = {name: [row["gain"] / row["base_std"] for row in rows] for name, rows in best.items()}
    path = os.path.join(args.out, "flow_estimators.png")
    plot_seeds(gains, "gain in deviations of the base model", path, (7.5, 3.6))
    return rows


if __name__ == "__main__":
    main()
