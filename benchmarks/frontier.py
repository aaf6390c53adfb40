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
"""How far a reward can rise while images stay what they are: estimators at equal work on the embedded emoji model.

    python benchmarks/frontier.py              it can be stopped, and continues when started again
    python benchmarks/frontier.py --quick      a short run that tests it
    python benchmarks/frontier.py --report     the table and the plot of the runs so far

Every run has a reward, an estimator, a learning rate and a seed, and the work of --steps optimizer steps of rlr, in
floating-point operations that torch counts: of network, decoder and rewards. Along the run, and at several scales of its
adapter, images of fixed seeds get the reward that is trained on, and a classifier says how many show what their prompt asks for.
A run's score is the highest reward at which that share is still 95 % of the base model's. The learning rate is the best of a
grid on a seed of its own, which grows until the best is not at its end.

Writes frontier_points.csv, some rows for each run, and from it frontier.csv and frontier.png.
"""

import functools
import os
import platform
import tempfile
from concurrent.futures import as_completed
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import torch
from bench_common import (
    ASSETS,
    VERSIONS,
    add_workers_flag,
    append_csv,
    forget_earlier_run,
    make_parser,
    metrics_of,
    parse_benchmark,
    read_csv,
    worker_pool,
    write_csv,
)
from diffusion_models.adapters import load_adapter
from diffusion_models.embeddings import PromptEmbeds
from frontier_report import TUNING_SEED, Cell, best_rate, cell_of, plot, print_table, summarize
from reward_models.custom import import_callable
from rlr_training.chains import conditioned, make_chain, sampling_options, set_defaults, set_size
from rlr_training.checks import rlr_settings
from rlr_training.evaluation import HELDOUT_SEED, heldout_prompts, load_base, make_draw
from rlr_training.memory import Operations
from rlr_training.prompts import load_prompts
from rlr_training.scoring import decoder_of, load_reward_sum, score_latents
from rlr_training.trial import try_model
from rlr_utils import RLRStep
from rlr_utils.settings import NEED_GRADIENT
from study_plan import SINE
from tqdm import tqdm
from train_rlr_sd import main as train
from train_rlr_sd import parse_args


MODEL, REWARDS_FOLDER = (os.path.join(ASSETS, name) for name in ("tiny-emoji", "tiny-emoji-rewards"))
CLIP, ACCURACY = (os.path.join(REWARDS_FOLDER, name) for name in ("clip", "emoji_classifier.py:ConceptAccuracy"))
FLAGS = [
    *("--pretrained_model_name_or_path", MODEL, "--prompts", os.path.join(ASSETS, "emoji.txt")),
    *("--reward_path", f"aesthetic={REWARDS_FOLDER}", "--reward_path", f"clip_score={CLIP}", "--feature_model", CLIP),
    *("--guidance_scale", "4.5", "--num_eval_images", "0", "--report_to", "none", "--checkpointing_steps", "1000"),
]
# {name: the reward that is trained on}
REWARDS = {
    "smooth": "aesthetic",
    "text": "clip_score",
    "rough": f"aesthetic,{SINE}:0.5",
    "file size": "jpeg_compressibility",
    "decision": f"{os.path.abspath(__file__)}:is_3d",
    "sum": "aesthetic,jpeg_compressibility:2",
}
# {name: flags}
ESTIMATORS = {
    "rlr": [],
    "full_bp": ["--gradient_estimator", "full_bp"],
    "alignprop": ["--gradient_estimator", "alignprop"],
    "truncated_bp 5": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "5"],
    "truncated_bp 1": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "1"],
    "ddpo": ["--gradient_estimator", "ddpo"],
    "rlr_paper": ["--gradient_estimator", "rlr_paper"],
}
RATES = (1e-3, 3e-3, 1e-2)
WIDEST = (1e-4, 1e-1)  # the grid does not grow beyond
SCALES = (0.25, 0.5, 0.75, 1.25)
FIELDS = ("reward", "estimator", "learning_rate", "seed", "kind", "at", "score", "accuracy")


class Settings(NamedTuple):
    """What all cells share.

    Attributes:
        steps: optimizer steps of rlr, whose work every run gets.
        batch_size: images of a step.
        num_steps: T.
        num_images: on which an adapter is judged.
        scorings: along a run.
    """

    steps: int = 24
    batch_size: int = 8
    num_steps: int = 20
    num_images: int = 64
    scorings: int = 5


@functools.cache
def classifier():
    accuracy, _ = import_callable(ACCURACY, {})
    return accuracy.classifier


def is_3d(images, prompts):
    """1 for an image that the classifier takes for a 3D emoji, 0 for a cartoon: a black box."""
    with torch.no_grad():  # the model draws images of the size that the classifier reads
        return classifier()(images)[1].argmax(1).float()


is_3d.differentiable = False


def estimators_of(reward):
    """The estimators that can be used with a reward."""
    is_black_box = reward in ("file size", "decision")
    names = [name for name, flags in ESTIMATORS.items() if not (is_black_box and set(flags) & set(NEED_GRADIENT))]
    return [name for name in names if name != "rlr_paper" or is_black_box]


def arguments(reward, estimator, settings, *flags):
    """The arguments of train_rlr_sd.py for a cell."""
    size = str(settings.batch_size)
    sizes = ["--num_inference_steps", str(settings.num_steps), "--train_batch_size", size, "--decode_batch_size", size]
    return parse_args([*FLAGS, *sizes, "--reward", REWARDS[reward], *ESTIMATORS[estimator], *flags])


# Work


@functools.cache
def prices(reward, settings):
    """{call: floating-point operations for an image} of network, decoder and reward."""
    judge = judge_of(reward, settings)
    args, model = judge.args, judge.model
    chain = make_chain(args, model, model.network, torch.device("cpu"), sampling_options(args, model))
    costs = try_model(args, model, conditioned(args, chain, judge.embeds)(judge.prompts[:1]), None)
    latents = torch.zeros(model.latents_shape(1, (args.height, args.width)))
    scored = {}
    for with_gradient in {False, judge.rewards.has_gradient}:
        with Operations() as counter:
            score_latents(decoder_of(args, model), judge.rewards, latents, judge.prompts[:1], 1, with_gradient)
        scored[with_gradient] = counter.total
    return {"forward": costs.forward, "swept": costs.swept, "score": scored[False], "gradient": scored.get(True)}


@functools.cache
def work_of(reward, estimator, settings):
    """Operations of an optimizer step."""
    price = prices(reward, settings)
    args = arguments(reward, estimator, settings)
    has_gradient = price["gradient"] is not None
    options = rlr_settings(args) | ({"mixing": 0.5} if reward == "rough" and estimator == "rlr" else {})
    rlr = RLRStep(settings.num_steps, has_gradient, black_box=reward not in ("smooth", "text", "rough"), **options)
    schedule = rlr.draw_schedule()
    calls, predicted = rlr.expected_calls(schedule), len(rlr.predicted_steps(schedule))
    scoring = price["gradient"] if has_gradient and estimator != "ddpo" else price["score"]
    network = calls.forward * price["forward"] + calls.swept * price["swept"]
    return settings.batch_size * (network + scoring + predicted * price["score"])


# Runs


class Judge:
    """The model without an adapter, and what its images are judged by.

    Attributes:
        base: (reward, concept accuracy) of the base model.
    """

    def __init__(self, reward, settings):
        self.args = arguments(reward, "rlr", settings)
        pool = load_prompts(self.args.prompts)
        self.prompts = heldout_prompts(pool, settings.num_images)
        self.model = load_base(self.args, torch.float32)
        set_size(self.args, self.model)
        set_defaults(self.args, self.model)
        self.rewards, self.accuracy = (
            load_reward_sum(self.args, text, self.prompts, "cpu", None) for text in (REWARDS[reward], ACCURACY)
        )
        self.embeds = PromptEmbeds(self.model, "cpu")
        self.base = self.scores()

    def scores(self):
        drawn = make_draw(self.args, self.model, self.embeds)(self.prompts, 16, first_seed=HELDOUT_SEED)
        return tuple(one(drawn, self.prompts).total.mean().item() for one in (self.rewards, self.accuracy))

    def scores_by_scale(self, folder):
        """{scale: (reward, concept accuracy)} of an adapter."""
        pipeline = self.model.pipeline
        load_adapter(pipeline, folder, "tuned")
        try:
            found = {}
            for scale in SCALES:
                pipeline.set_adapters(["tuned"], [scale])
                found[scale] = self.scores()
            return found
        finally:
            pipeline.unload_lora_weights()


judge_of = functools.cache(Judge)


def run_cell(cell, settings):
    """The rows of a run: its points along the run, by the work done, and by the scale of its adapter."""
    forget_earlier_run()
    work = work_of(cell.reward, cell.estimator, settings)
    steps = max(1, round(settings.steps * work_of(cell.reward, "rlr", settings) / work))
    numbers = {"learning_rate": cell.learning_rate, "seed": cell.seed, "max_train_steps": steps}
    numbers |= {"heldout_steps": max(1, steps // settings.scorings), "num_heldout_images": settings.num_images}
    flags = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        args = arguments(
            cell.reward, cell.estimator, settings, *flags, "--heldout_reward", ACCURACY, "--output_dir", folder
        )
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            train(args)
            lines = [line for line in metrics_of(folder) if "heldout_mean" in line]
            judge = judge_of(cell.reward, settings)
            scaled = judge.scores_by_scale(folder)
    points = [("run", 0.0, *judge.base)]
    points += [
        ("run", line["step"] * work / 1e12, line["heldout_trained_mean"], line["heldout_mean"]) for line in lines
    ]
    points += [("scale", scale, *scores) for scale, scores in scaled.items()]
    return [dict(zip(FIELDS, (*cell, *point))) for point in points]


def run_missing(cells, path, header, settings, pool):
    """Run the cells that a file lacks, and add each as soon as it ends."""
    done = {cell_of(row) for row in read_csv(path)} if os.path.isfile(path) else set()
    futures = {pool.submit(run_cell, cell, settings): cell for cell in cells if cell not in done}
    for future in tqdm(as_completed(futures), desc="runs", total=len(futures)):
        append_csv(future.result(), path, FIELDS, header)


def run_study(reward, names, seeds, path, header, settings, pool):
    """Tune the learning rates of estimators, then run the seeds."""
    rates = {name: list(RATES) for name in names}
    while True:
        cells = [Cell(reward, name, rate, TUNING_SEED) for name in names for rate in rates[name]]
        run_missing(cells, path, header, settings, pool)
        best, rows = {name: best_rate(read_csv(path), reward, name) for name in names}, rates
        rates = {name: wider(rates[name], best[name]) for name in names}
        if rates == rows:
            break
    cells = [Cell(reward, name, best[name], seed) for seed in seeds for name in names]
    run_missing(cells, path, header, settings, pool)


def wider(rates, best):
    """A grid of learning rates, with one more where the best is at its end."""
    lower, upper = min(rates), max(rates)
    if best == lower and lower / 3 >= WIDEST[0]:
        return [*rates, float(f"{lower / 3:.1g}")]
    if best == upper and upper * 3 <= WIDEST[1]:
        return [*rates, float(f"{upper * 3:.1g}")]
    return rates


def run(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--report", action="store_true", help="Run nothing; table and plot of the runs so far.")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS), help="Rewards to run.")
    parser.add_argument("--seeds", type=int, default=5, help="Run so many seeds.")
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    settings = Settings(1, 2, 3, 4, 1) if args.quick else Settings()
    header = f"python benchmarks/frontier.py{' --quick' if args.quick else ''}, {settings}, {platform.machine()}, {VERSIONS}"
    path = os.path.join(args.out, "frontier_points.csv")
    if not args.report:
        with worker_pool(args.workers) as pool:
            for reward in ["decision"] if args.quick else args.rewards:
                names = ["rlr"] if args.quick else estimators_of(reward)
                if args.quick:
                    run_missing(
                        [Cell(reward, "rlr", 1e-3, seed) for seed in (0, TUNING_SEED)], path, header, settings, pool
                    )
                else:
                    run_study(reward, names, range(args.seeds), path, header, settings, pool)
    rows = read_csv(path)
    table = summarize(rows, REWARDS, ESTIMATORS)
    print_table(table)
    write_csv(table, os.path.join(args.out, "frontier.csv"), header)
    plot(rows, table, list(ESTIMATORS), os.path.join(args.out, "frontier.png"))
    return table


if __name__ == "__main__":
    run()
