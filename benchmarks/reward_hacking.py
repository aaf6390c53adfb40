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
"""Training past the point: reward against diversity and the distance to real digits, with and without the KL penalty.

    python benchmarks/reward_hacking.py        or, to see that it runs, with --quick

Trains on the embedded bundle's aesthetic head far beyond what does the pictures good, and looks at every tenth adapter:
the trained and a held-out reward, diversity, and how far the pictures have gone from real digits. All are compared at the
same gain, one standard deviation of the base model's rewards. Writes reward_hacking.csv and reward_hacking.png.
"""

import argparse
import csv
import os
import sys
import tempfile

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]

from evaluate_rlr_sd import measure  # noqa: E402
from gradient_quality import parse_benchmark, worker_pool, write_csv  # noqa: E402
from make_tiny_assets import COLORS, load_scans, paint  # noqa: E402
from reward_models import load_rewards, parse_reward, parse_reward_paths  # noqa: E402
from reward_models.features import load_features  # noqa: E402
from rlr_utils import load_prompts  # noqa: E402
from train_rlr_sd import (  # noqa: E402
    EarlyStopping,
    checkpoints_of,
    generate,
    load_pipeline,
    main,
    parse_args,
    set_size,
)

import diffusers  # noqa: E402


ASSETS = os.path.join(ROOT, "assets")
CLIP = os.path.join(ASSETS, "tiny-aesthetic", "clip")
BASE = [
    *("--pretrained_model_name_or_path", os.path.join(ASSETS, "tiny-sd")),
    *("--reward_path", f"aesthetic={os.path.join(ASSETS, 'tiny-aesthetic')}", "--reward_path", f"clip_score={CLIP}"),
    *("--prompts", os.path.join(ASSETS, "digits.txt"), "--num_inference_steps", "10", "--train_batch_size", "32"),
    *("--decode_batch_size", "32", "--learning_rate", "1e-3", "--num_eval_images", "0", "--seed", "0"),
    *("--report_to", "none"),
]
# name -> (flags, optimizer steps): as many as take the reward well beyond a gain of one deviation.
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


def ink(images):
    """Pictures (N, 3, H, W) -> how much ink is where, (N, 64): the brightest color, on the grid of the scans."""
    return F.adaptive_avg_pool2d(images.amax(1, keepdim=True), 8).flatten(1)


def real_digits():
    """The painted scans: their pictures (N, 3, 32, 32)."""
    scans, _ = load_scans()
    colors = torch.arange(len(scans)) % len(COLORS)
    return paint(scans, colors, torch.Generator().manual_seed(0))


def base_model(reward, num_prompts, count, more=()):
    """(args, prompts, rewards, pipeline) of the embedded bundle; each of the prompts comes `count` times in a row."""
    args = parse_args([*BASE, *more])
    prompts = load_prompts(args.prompts)
    # A stride that meets all colors and digits.
    prompts = [prompts[i * 7 % len(prompts)] for i in range(num_prompts) for _ in range(count)]
    rewards = load_rewards(parse_reward(reward), parse_reward_paths(args.reward_path))
    pipeline = load_pipeline(args, torch.float32)
    set_size(args, pipeline)
    return args, prompts, rewards, pipeline


def train_and_measure(name, flags, steps, every, num_prompts, more):
    """One variant: a row of figures for the base model and every checkpoint, on pictures of the same seeds."""
    torch.set_num_threads(1)
    args, prompts, rewards, pipeline = base_model("aesthetic,clip_score", num_prompts, 4, more)
    features, real = load_features(CLIP), real_digits()
    real_embeds, real_ink = features(real, 64), ink(real)
    rows, base = [], None
    with tempfile.TemporaryDirectory() as folder:
        main(parse_args([*BASE, *flags, "--max_train_steps", str(steps), "--checkpointing_steps", str(every), *more,
                         "--output_dir", folder]))  # fmt: skip
        for step, path in {0: None, **checkpoints_of(folder)}.items():
            if path is not None:
                pipeline.load_lora_weights(path)
            images = generate(pipeline, prompts, args)
            summary, details = measure(images, prompts, rewards, features, base, real_embeds, torch.device("cpu"))
            base = base or details
            row = {"variant": name, "step": step, "aesthetic_std": details["scores"]["aesthetic"].std().item()}
            row.update({reward: found["mean"] for reward, found in summary["rewards"].items()})
            row.update({key: summary[key] for key in ("diversity", "drift", "frechet_to_real")})
            row["nearest_real"] = torch.cdist(ink(images), real_ink).amin(1).mean().item()
            rows.append(row)
            if path is not None:
                pipeline.unload_lora_weights()
    return rows


def reweighted(gains, count=128, num_prompts=12):
    """{gain: (diversity, as a share of the base model's, distance to the nearest real digit)} of the distribution that is
    nearest to the base model's in KL among those of that gain, p(x) proportional to p_base(x) exp(R(x) / w): the base
    model's own pictures, weighted. No training attains less divergence, so what this one loses is the reward's own doing.
    """
    args, prompts, rewards, pipeline = base_model("aesthetic", num_prompts, count)
    images = generate(pipeline, prompts, args, desc="base pictures, to be weighted")
    scores = rewards(images, prompts).total.view(num_prompts, count)
    embeds = load_features(CLIP)(images, 64).view(num_prompts, count, -1)
    nearest = torch.cdist(ink(images), ink(real_digits())).amin(1).view(num_prompts, count)

    def figures(inverse):
        weights = torch.softmax(inverse * scores, dim=1)
        pairs = weights[:, :, None] * weights[:, None] * (1 - torch.eye(count))
        spread = (pairs * (1 - embeds @ embeds.mT)).sum((1, 2)) / pairs.sum((1, 2))
        gain = (weights * scores).sum(1).mean() - scores.mean()
        return gain.item(), spread.mean().item(), (weights * nearest).sum(1).mean().item()

    whole, found = figures(0.0)[1], {}
    for gain in gains:
        low, high = 0.0, 10.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if figures(middle)[0] < gain else (low, middle)
        _, spread, distance = figures(low)
        found[gain] = (spread, spread / whole, distance)
    return found


def at_gain(rows, gain):
    """The figures of a variant where its trained reward first has risen by `gain`, between two checkpoints linearly, or
    `None` if it never does."""
    start = rows[0]["aesthetic"]
    for before, after in zip(rows, rows[1:]):
        if after["aesthetic"] - start >= gain:
            share = (start + gain - before["aesthetic"]) / (after["aesthetic"] - before["aesthetic"])
            return {key: before[key] + share * (after[key] - before[key]) for key in ("step", *COLUMNS)}
    return None


def early_stop(rows, patience=2):
    """The checkpoint at which --early_stop_patience on the held-out reward would have stopped, and the best one."""
    stopping = EarlyStopping(patience)
    for row in rows[1:]:
        _, reason = stopping.update(row["step"], row["clip_score"])
        if reason is not None:
            return row, stopping.best_step
    return None, stopping.best_step


def plot(rows, path, gain):
    """Each figure against the trained reward; the line is the gain at which the variants are compared."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    shown = {
        "diversity": "diversity",
        "nearest_real": "distance to the nearest real digit",
        "clip_score": "held-out reward",
    }
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 3), shown.items()):
        for i, name in enumerate(names):
            own = [row for row in rows if row["variant"] == name]
            color = f"C{[n.split(',')[0] for n in names].index(name.split(',')[0])}"
            style = {"": "-", " KL .03": "--", " KL .1": ":"}[name.partition(",")[2]]
            axes.plot(
                [row["aesthetic"] for row in own],
                [row[key] for row in own],
                style,
                color=color,
                marker=".",
                label=name,
            )
        axes.axvline(rows[0]["aesthetic"] + gain, color="black", lw=0.8)
        axes.set(xlabel="trained reward", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def run(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each.")
    parser.add_argument(
        "--only", nargs="+", default=None, choices=list(VARIANTS), help="Measure these again, and keep the others."
    )
    args = parse_benchmark(parser, input_args)
    table = os.path.join(args.out, "reward_hacking.csv")
    rows = []
    if args.only:
        if not os.path.isfile(table):
            sys.exit(f"reward_hacking.py: error: --only keeps the others of {table!r}, which is not there")
        with open(table, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file.readlines()[1:]) if row["variant"] not in args.only]
        rows = [{key: value if key == "variant" else float(value) for key, value in row.items()} for row in rows]
    variants, settings = VARIANTS, (10, 24, [])
    if args.quick:
        variants = {name: (VARIANTS[name][0], 2) for name in ("rlr, KL .03", "truncated_bp")}
        settings = (1, 2, ["--num_inference_steps", "3", "--train_batch_size", "2"])
    if args.only:
        variants = {name: VARIANTS[name] for name in args.only}
    # The longest first, so that no worker is left alone with one.
    order = sorted(variants, key=lambda name: -variants[name][1] * (1 + ("KL" in name)))
    with worker_pool(args.workers) as pool:
        futures = {name: pool.submit(train_and_measure, name, *variants[name], *settings) for name in order}
        for name in tqdm(variants, desc="Variants"):
            rows += futures[name].result()

    rows.sort(key=lambda row: (list(VARIANTS).index(row["variant"]), row["step"]))
    gain = rows[0]["aesthetic_std"]
    header = (
        f"python benchmarks/reward_hacking.py{' --quick' if args.quick else ''}, torch {torch.__version__}, diffusers"
        f" {diffusers.__version__}, seed 0, {args.workers} workers of one thread, gain {gain:.4f}"
    )
    print(f"{header}\nat a gain of {gain:.3f}, one deviation of the base model's rewards:")
    names = (
        "step",
        "diversity",
        "of base",
        "nearest_real",
        "frechet_to_real",
        "clip_score",
        "early stop",
        "diversity there",
    )
    print(f"{'':<22}" + "".join(f"{name:>17}" for name in names))
    for name in ("base", *dict.fromkeys(row["variant"] for row in rows)):
        own = [row for row in rows if name in ("base", row["variant"])]
        found = own[0] if name == "base" else at_gain(own, gain)
        if found is None:
            print(
                f"{name:<22}  never reached; largest gain {max(r['aesthetic'] for r in own) - own[0]['aesthetic']:.3f}"
            )
            continue
        stop, _ = early_stop(own) if name != "base" else (None, 0)
        share = found["diversity"] / own[0]["diversity"]
        cells = [f"{found['step']:.0f}", f"{found['diversity']:.4f}", f"{100 * share:.0f} %"]
        cells += [f"{found[key]:.4f}" for key in ("nearest_real", "frechet_to_real", "clip_score")]
        cells += (
            ["-", "-"]
            if stop is None
            else [f"{stop['step']:.0f}", f"{100 * stop['diversity'] / own[0]['diversity']:.0f} %"]
        )
        print(f"{name:<22}" + "".join(f"{cell:>17}" for cell in cells))
    size = {"count": 8, "num_prompts": 2} if args.quick else {}
    for wanted, (spread, share, distance) in reweighted([gain / 2, gain], **size).items():
        print(
            f"nearest in KL to the base model at a gain of {wanted:.3f}: diversity {spread:.4f}, {100 * share:.0f} % of"
            f" base; distance to the nearest real digit {distance:.4f}"
        )
    write_csv(rows, table, header)
    plot(rows, os.path.join(args.out, "reward_hacking.png"), gain)
    return rows


if __name__ == "__main__":
    run()
