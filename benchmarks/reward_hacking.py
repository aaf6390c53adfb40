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
"""Training beyond the useful point: reward against diversity and distance to real digits, with and without KL penalty.

    python benchmarks/reward_hacking.py        or, for a short test, with --quick

Trains on the embedded bundle's aesthetic head far beyond what improves the images, and measures every tenth adapter: the
trained and a held-out reward, diversity, and the distance of the images to real digits. All variants are compared at the
same gain, one standard deviation of the base model's rewards. Writes reward_hacking.csv and reward_hacking.png.
"""

import os
import sys
import tempfile

import torch
from bench_common import VERSIONS, add_workers_flag, make_parser, parse_benchmark, read_csv, worker_pool, write_csv
from bench_runs import clip_features, distance_to_digits, load_base_model, real_digits, train
from matplotlib.figure import Figure
from rlr_training.checkpoints import checkpoints_of
from rlr_training.evaluation import EarlyStopping
from tqdm import tqdm


# {name: (flags, optimizer steps)}; the steps take the reward well beyond a gain of one standard deviation.
VARIANTS = {
    "rlr": (["--gradient_estimator", "rlr"], 120),
    "rlr, KL .03": (["--gradient_estimator", "rlr", "--kl_weight", "0.03"], 120),
    "rlr, KL .1": (["--gradient_estimator", "rlr", "--kl_weight", "0.1"], 120),
    "full_bp": (["--gradient_estimator", "full_bp"], 120),
    "full_bp, KL .03": (["--gradient_estimator", "full_bp", "--kl_weight", "0.03"], 120),
    "ddpo": (["--gradient_estimator", "ddpo"], 480),
    "truncated_bp": (["--gradient_estimator", "truncated_bp"], 60),
    "truncated_bp, KL .03": (["--gradient_estimator", "truncated_bp", "--kl_weight", "0.03"], 60),
}
COLUMNS = ("aesthetic", "clip_score", "diversity", "drift", "frechet_to_real", "nearest_real")


def train_and_measure(name, flags, steps, every, num_prompts, more):
    """One variant: rows for the base model and every checkpoint, on images of the same seeds.

    Args:
        flags, more: of the training run; `more` are those of the base model, too.
        every: steps between checkpoints.
    """
    torch.set_num_threads(1)
    base_model = load_base_model("aesthetic,clip_score", num_prompts, 4, more)
    real, pipeline = clip_features()(real_digits(), 64), base_model.model.pipeline
    rows, base = [], None
    with tempfile.TemporaryDirectory() as folder:
        train(folder, [*flags, "--max_train_steps", str(steps), "--checkpointing_steps", str(every), *more])
        for step, path in {0: None, **checkpoints_of(folder)}.items():
            if path is not None:
                pipeline.load_lora_weights(path)
            summary, details = base_model.measure(base_model.draw(), base, real)
            base = base or details
            row = {"variant": name, "step": step, "aesthetic_std": details["scores"]["aesthetic"].std().item()}
            row.update({reward: figures["mean"] for reward, figures in summary["rewards"].items()})
            row.update({key: summary[key] for key in ("diversity", "drift", "frechet_to_real", "nearest_real")})
            rows.append(row)
            if path is not None:
                pipeline.unload_lora_weights()
    return rows


def closest_to_base(gains, images_per_prompt=128, num_prompts=12):
    """The distributions of some mean gains that are closest to the base model's in KL divergence.

    They are p(x) proportional to p_base(x) exp(R(x) / w): here the base model's own images, weighted. No training reaches a
    gain with less divergence, so what these distributions lose is due to the reward itself.

    Returns:
        {gain: (diversity, diversity / the base model's, distance to the nearest real digit)}
    """
    base_model = load_base_model("aesthetic", num_prompts, images_per_prompt)
    images = base_model.draw(desc="images of the base model")
    by_prompt = (num_prompts, images_per_prompt)
    scores = base_model.rewards(images, base_model.prompts).total.view(by_prompt)
    embeds = clip_features()(images, 64).view(*by_prompt, -1)
    nearest = distance_to_digits(images).view(by_prompt)

    def figures(inverse_temperature):
        weights = torch.softmax(inverse_temperature * scores, dim=1)
        pairs = weights[:, :, None] * weights[:, None] * (1 - torch.eye(images_per_prompt))
        diversity = (pairs * (1 - embeds @ embeds.mT)).sum((1, 2)) / pairs.sum((1, 2))
        gain = (weights * scores).sum(1).mean() - scores.mean()
        return gain.item(), diversity.mean().item(), (weights * nearest).sum(1).mean().item()

    base_diversity, results = figures(0.0)[1], {}
    for gain in gains:
        low, high = 0.0, 10.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if figures(middle)[0] < gain else (low, middle)
        _, diversity, distance = figures(low)
        results[gain] = (diversity, diversity / base_diversity, distance)
    return results


def at_gain(rows, gain):
    """The figures of a variant where its trained reward has first risen by `gain`, between two checkpoints linearly.

    Returns:
        {column: number}, or `None` if the reward never rises so much.
    """
    start = rows[0]["aesthetic"]
    for before, after in zip(rows, rows[1:]):
        if after["aesthetic"] - start >= gain:
            share = (start + gain - before["aesthetic"]) / (after["aesthetic"] - before["aesthetic"])
            return {key: before[key] + share * (after[key] - before[key]) for key in ("step", *COLUMNS)}
    return None


def early_stop(rows, patience=2):
    """(row, step): where --early_stop_patience on the held-out reward would have stopped, or `None`, and the best step."""
    stopping = EarlyStopping(patience)
    for row in rows[1:]:
        _, reason = stopping.update(row["step"], row["clip_score"])
        if reason is not None:
            return row, stopping.best_step
    return None, stopping.best_step


def print_table(rows, gain):
    """Every variant at the gain, and the diversity where early stopping would have ended it."""
    names = (
        *("step", "diversity", "of base", "nearest_real", "frechet_to_real", "clip_score"),
        *("early stop", "diversity there"),
    )
    print(f"{'':<22}" + "".join(f"{name:>17}" for name in names))
    base = rows[0]
    _print_row("base", base, base, None)
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        figures = at_gain(own, gain)
        if figures is None:
            largest = max(row["aesthetic"] for row in own) - base["aesthetic"]
            print(f"{name:<22}  never reached; largest gain {largest:.3f}")
        else:
            _print_row(name, figures, base, early_stop(own)[0])


def _print_row(name, figures, base, stop):
    cells = [f"{figures['step']:.0f}", f"{figures['diversity']:.4f}"]
    cells.append(f"{100 * figures['diversity'] / base['diversity']:.0f} %")
    cells += [f"{figures[key]:.4f}" for key in ("nearest_real", "frechet_to_real", "clip_score")]
    cells += ["-", "-"] if stop is None else [f"{stop['step']:.0f}"]
    if stop is not None:
        cells.append(f"{100 * stop['diversity'] / base['diversity']:.0f} %")
    print(f"{name:<22}" + "".join(f"{cell:>17}" for cell in cells))


def plot(rows, path, gain):
    """Each figure against the trained reward; the line is the gain at which the variants are compared."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    labels = {
        "diversity": "diversity",
        "nearest_real": "distance to the nearest real digit",
        "clip_score": "held-out reward",
    }
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items()):
        for name in names:
            own = [row for row in rows if row["variant"] == name]
            estimator, _, penalty = name.partition(",")
            color = f"C{[n.split(',')[0] for n in names].index(estimator)}"
            style = {"": "-", " KL .03": "--", " KL .1": ":"}[penalty]
            x, y = ([row[column] for row in own] for column in ("aesthetic", key))
            axes.plot(x, y, style, color=color, marker=".", label=name)
        axes.axvline(rows[0]["aesthetic"] + gain, color="black", lw=0.8)
        axes.set(xlabel="trained reward", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def measure_variants(variants, settings, workers):
    """The rows of all variants, several at a time."""
    # The longest first, so that no worker is left alone with one.
    order = sorted(variants, key=lambda name: -variants[name][1] * (1 + ("KL" in name)))
    with worker_pool(workers) as pool:
        futures = {name: pool.submit(train_and_measure, name, *variants[name], *settings) for name in order}
        return [row for name in tqdm(variants, desc="Variants") for row in futures[name].result()]


def run(input_args=None):
    parser = make_parser(__doc__)
    add_workers_flag(parser)
    parser.add_argument(
        "--only", nargs="+", default=None, choices=list(VARIANTS), help="Measure these again, and keep the others."
    )
    args = parse_benchmark(parser, input_args)
    table = os.path.join(args.out, "reward_hacking.csv")
    if args.only and not os.path.isfile(table):
        sys.exit(f"reward_hacking.py: error: --only keeps the other rows of {table!r}, which does not exist")
    rows = [row for row in read_csv(table) if row["variant"] not in args.only] if args.only else []
    variants, settings, size = VARIANTS, (10, 24, []), {}
    if args.quick:
        variants = {name: (VARIANTS[name][0], 2) for name in ("rlr, KL .03", "truncated_bp")}
        settings = (1, 2, ["--num_inference_steps", "3", "--train_batch_size", "2"])
        size = {"images_per_prompt": 8, "num_prompts": 2}
    if args.only:
        variants = {name: VARIANTS[name] for name in args.only}
    rows += measure_variants(variants, settings, args.workers)

    rows.sort(key=lambda row: (list(VARIANTS).index(row["variant"]), row["step"]))
    gain = rows[0]["aesthetic_std"]
    header = (
        f"python benchmarks/reward_hacking.py{' --quick' if args.quick else ''}, {VERSIONS}, seed 0, {args.workers} workers of"
        f" one thread, gain {gain:.4f}"
    )
    print(f"{header}\nat a gain of {gain:.3f}, one standard deviation of the base model's rewards:")
    print_table(rows, gain)
    for wanted, (diversity, share, distance) in closest_to_base([gain / 2, gain], **size).items():
        print(
            f"closest to the base model in KL at a gain of {wanted:.3f}: diversity {diversity:.4f}, {100 * share:.0f} % of"
            f" base; distance to the nearest real digit {distance:.4f}"
        )
    write_csv(rows, table, header)
    plot(rows, os.path.join(args.out, "reward_hacking.png"), gain)
    return rows


if __name__ == "__main__":
    run()
