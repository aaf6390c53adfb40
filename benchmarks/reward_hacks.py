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
"""What rewards do to images when they are trained for too long.

    python benchmarks/reward_hacks.py        or, for a short test, with --quick

Trains the embedded emoji model on one reward after the other, twice as long as the demo, and draws the same seeds before and
after. Writes reward_hacks.csv, with the share of the images in which a classifier finds what the prompt asks for, and
reward_hacks.png.
"""

import os
import tempfile
from functools import partial

import torch
from bench_common import (
    ASSETS,
    VERSIONS,
    add_workers_flag,
    forget_earlier_run,
    make_parser,
    parse_benchmark,
    worker_pool,
    write_csv,
)
from diffusion_models.adapters import load_adapter
from reward_models import load_reward
from reward_models.custom import load_custom
from rlr_training.chains import set_defaults, set_size
from rlr_training.evaluation import load_base, make_draw
from rlr_training.plots import plot_grid
from rlr_training.prompts import load_prompts
from tqdm import tqdm
from train_rlr_sd import main, parse_args


REWARDS = os.path.join(ASSETS, "tiny-emoji-rewards")
CLIP = os.path.join(REWARDS, "clip")
PATHS = {"aesthetic": REWARDS, "clip_score": CLIP}
FLAGS = [
    *("--pretrained_model_name_or_path", os.path.join(ASSETS, "tiny-emoji")),
    *("--prompts", os.path.join(ASSETS, "emoji.txt"), "--feature_model", CLIP),
    *("--reward_path", f"aesthetic={REWARDS}", "--reward_path", f"clip_score={CLIP}"),
    *(
        "--num_inference_steps",
        "10",
        "--guidance_scale",
        "4.5",
        "--train_batch_size",
        "16",
        "--decode_batch_size",
        "16",
    ),
    *("--learning_rate", "2e-3", "--seed", "0", "--num_eval_images", "0", "--report_to", "none"),
]
FLOOR = 0.77  # of the base model it is .78 on average
# {name: (the reward, other flags)}
VARIANTS = {
    "aesthetic": ("aesthetic", []),
    "aesthetic, floor": ("aesthetic", ["--heldout_reward", "clip_score", "--reward_floor", f"clip_score:{FLOOR}"]),
    "clip_score": ("clip_score", []),
    "jpeg_compressibility": ("jpeg_compressibility", []),
    "jpeg_incompressibility": ("jpeg_incompressibility", []),
}


def train_and_draw(reward, flags, steps, num_images, more):
    """(row of the table, images (N, 3, H, W) of the base model, and of the tuned one)."""
    forget_earlier_run()
    with tempfile.TemporaryDirectory() as folder:
        args = parse_args(
            [*FLAGS, "--reward", reward, *flags, "--max_train_steps", str(steps), *more, "--output_dir", folder]
        )
        main(args)
        prompts = load_prompts(args.prompts)
        prompts = [prompts[i * len(prompts) // num_images] for i in range(num_images)]
        model = load_base(args, torch.float32)
        set_size(args, model)
        set_defaults(args, model)
        draw = partial(make_draw(args, model), prompts, 16)
        images = {"base": draw()}
        load_adapter(model.pipeline, folder, "tuned")
        images["tuned"] = draw()
    accuracy = load_custom(
        os.path.join(REWARDS, "emoji_classifier.py:ConceptAccuracy"), "cpu", images["base"].shape[2:], prompts[:2]
    )
    judges = {"reward": load_reward(reward, path=PATHS.get(reward)), "accuracy": accuracy}
    with torch.no_grad():
        scores = {
            f"{name}_{kind}": judge(drawn, prompts).mean().item()
            for kind, drawn in images.items()
            for name, judge in judges.items()
        }
    return scores, images["base"], images["tuned"], prompts


def run(input_args=None):
    parser = make_parser(__doc__)
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    variants, settings, shown = VARIANTS, (80, 64, []), 6
    if args.quick:
        variants = {name: VARIANTS[name] for name in ("aesthetic, floor",)}
        settings, shown = (
            (1, 4, ["--num_inference_steps", "2", "--train_batch_size", "2", "--num_heldout_images", "4"]),
            2,
        )
    rows, grid = [], {}
    with worker_pool(args.workers) as pool:
        futures = {name: pool.submit(train_and_draw, *variant, *settings) for name, variant in variants.items()}
        for name in tqdm(variants, desc="Rewards"):
            scores, base, tuned, prompts = futures[name].result()
            places = [i * len(prompts) // shown for i in range(shown)]
            grid = {"base": base[places], **grid, name: tuned[places]}
            rows.append({"variant": name, "steps": settings[0], **scores})
    header = (
        f"python benchmarks/reward_hacks.py{' --quick' if args.quick else ''}, {VERSIONS}, seed 0, {args.workers} workers of one"
        f" thread, {settings[1]} images"
    )
    print(header)
    for row in rows:
        print(
            f"{row['variant']:<24} reward {row['reward_base']:.3f} -> {row['reward_tuned']:.3f}, concepts"
            f" {row['accuracy_base']:.2f} -> {row['accuracy_tuned']:.2f}"
        )
    write_csv(rows, os.path.join(args.out, "reward_hacks.csv"), header)
    plot_grid(grid, [prompts[i] for i in places], os.path.join(args.out, "reward_hacks.png"))
    return rows


if __name__ == "__main__":
    run()
