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
"""Which estimator trains best at equal compute: all of them on the embedded Stable Diffusion, for four rewards.

    python benchmarks/study.py              it can be stopped, and continues when started again
    python benchmarks/study.py --quick      a short run that tests it
    python benchmarks/study.py --report     the tables and the plot of the runs so far

Every run of train_rlr_sd.py has a reward, an estimator, a learning rate and a seed, and as many optimizer steps as --budget
seconds of bare network calls pay for: forward passes and vector-Jacobian products of the U-Net, the decoder and the reward.
Their prices are measured once, in turns, and are the same for all runs. So neither the load of the machine nor the speed of
the code around the calls has an influence on the comparison. Each estimator has, for each reward, the best of three learning
rates, chosen on a seed of its own. The adapters are evaluated on images of fixed seeds that no run has trained on.

Writes study_prices.csv, study_cells.csv (a row per run) and study_curves.csv (training rewards by optimizer step) as it
runs, and from them study.csv (the table) and study.png; prints the tables of docs/results.md.
"""

import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import as_completed
from contextlib import redirect_stderr, redirect_stdout

import torch
from accelerate import Accelerator
from bench_common import (
    VERSIONS,
    add_workers_flag,
    append_csv,
    make_parser,
    metrics_of,
    parse_benchmark,
    read_csv,
    seconds_in_turns,
    worker_pool,
    write_csv,
)
from bench_networks import PROMPT, bundle
from bench_runs import load_base_model, train
from diffusion_models.decoders import decoder_blocks
from reward_models import parse_reward
from rlr_training.scoring import score_latents
from study_plan import (
    ESTIMATORS,
    LEARNING_RATES,
    REWARDS,
    SEEDS,
    TUNING_SEED,
    Cell,
    Settings,
    best_learning_rate,
    cell_of,
    estimator_flags,
    estimators_of,
    flags_of,
    step_price,
)
from study_report import findings, plot, print_tables, summarize
from tqdm import tqdm


FIELDS = [*Cell._fields, "steps", "predicted", "swept", "final", "other", "diversity", "nearest_real"]
CURVE_FIELDS = [*Cell._fields, "step", "reward_mean"]


def measure_prices(settings, rounds):
    """{call: seconds for an image} of every bare call, the median of rounds in which all take turns."""
    torch.set_num_threads(1)
    networks, batch = bundle(Accelerator(cpu=True), checkpointing=False), settings.batch_size
    for block in decoder_blocks(networks.vae.decoder):
        del block.forward
    size = networks.model.default_size
    chain = networks.chain(settings.num_steps, batch, size)
    latents = torch.randn(networks.model.latents_shape(batch, size))

    def forward():
        with torch.no_grad():
            chain.mean(1, latents)

    def vjp():
        chain.mean(1, latents.clone().requires_grad_()).sum().backward()

    def scoring(rewards, with_gradient):
        return lambda: score_latents(networks.model.decode, rewards, latents, [PROMPT] * batch, batch, with_gradient)

    calls = {"forward": forward, "vjp": vjp}
    for name, reward in REWARDS.items():
        rewards = load_base_model(reward.trained, 1, 1, flags_of(settings)).rewards
        calls[f"score {name}"] = scoring(rewards, with_gradient=False)
        if reward.has_gradient:
            calls[f"gradient {name}"] = scoring(rewards, with_gradient=True)
    warm_up = 2
    seconds = seconds_in_turns(calls, warm_up + rounds, desc="prices")
    return {name: statistics.median(values[warm_up:]) / batch for name, values in seconds.items()}


def run_cell(cell, settings, steps):
    """Train and evaluate; without steps the base model is evaluated.

    Returns:
        (row, curve): the row of the run, with the steps of the chain at which an image was predicted and those that were
        swept, on average, and rows of training rewards by optimizer step.
    """
    torch.set_num_threads(1)
    reward, metrics = REWARDS[cell.reward], []
    flags = [*flags_of(settings), "--reward", reward.trained]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            rewards = f"{reward.trained},{reward.heldout}"
            base_model = load_base_model(rewards, settings.num_images // 4, 4, flags)
            if steps > 0:
                flags += estimator_flags(cell.estimator, settings.num_steps)
                flags += [f"--learning_rate={cell.learning_rate}", f"--seed={cell.seed}", f"--max_train_steps={steps}"]
                train(folder, flags)
                metrics = metrics_of(folder)
                base_model.model.pipeline.load_lora_weights(folder)
            summary, details = base_model.measure(base_model.draw())
    scores = details["scores"]
    total = sum(term.weight * scores[name] for name, term in parse_reward(reward.trained).items())
    row = {
        **cell._asdict(),
        "steps": steps,
        "predicted": sum(line["predicted_steps"] for line in metrics) / max(steps, 1),
        "swept": sum(line["swept_steps"] for line in metrics) / max(steps, 1),
        "final": total.mean().item(),
        "other": scores[reward.heldout].mean().item(),
        "diversity": summary["diversity"],
        "nearest_real": summary["nearest_real"],
    }
    return row, curve_rows(cell, [line["reward_mean"] for line in metrics])


def curve_rows(cell, means):
    """The training rewards of a run as rows, each the mean over about a twelfth of the steps."""
    window = max(1, len(means) // 12)
    parts = [(i, means[i : i + window]) for i in range(0, len(means), window)]
    return [{**cell._asdict(), "step": i + len(part) / 2, "reward_mean": sum(part) / len(part)} for i, part in parts]


def steps_of(cell, prices, settings):
    """How many optimizer steps the budget pays for; 0 for the base model."""
    if cell.estimator == "base":
        return 0
    return max(1, int(settings.budget / step_price(cell.reward, cell.estimator, prices, settings)))


class Results:
    """The files of a study in a folder, all with the same header.

    Args:
        folder: that holds, or will hold, the files.
        header: of this study on this machine.
    """

    def __init__(self, folder, header):
        self.header = header
        self.prices, self.cells, self.curves = (
            os.path.join(folder, f"study_{name}.csv") for name in ("prices", "cells", "curves")
        )

    def check(self, study, is_report):
        """Refuse files of another study, and a report of files that do not exist.

        Args:
            study: the beginning of the header, which does not depend on the machine. A report may be made on another
                machine, and has the header of the files.
        """
        headers = {}
        for path in (self.prices, self.cells, self.curves):
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    headers[path] = file.readline().strip("# \n")
            elif is_report:
                sys.exit(f"study.py: error: {path!r} does not exist: run the study first")
        if is_report and headers[self.cells].startswith(f"{study}, "):
            self.header = headers[self.cells]
        for path, other in headers.items():
            if other != self.header:
                sys.exit(f"study.py: error: {path!r} is of another study than {self.header!r}: use another --out")

    def add(self, row, curve):
        """Append a run."""
        append_csv(curve, self.curves, CURVE_FIELDS, self.header)
        append_csv([row], self.cells, FIELDS, self.header)


def run_missing(cells, results, settings, prices, pool):
    """Run the cells that the results lack, and write each as soon as it ends."""
    done, futures = {cell_of(row) for row in read_csv(results.cells)}, {}
    for cell in cells:
        if cell not in done:
            steps = steps_of(cell, prices, settings)
            futures[pool.submit(run_cell, cell, settings, steps)] = cell, steps
    for future in tqdm(as_completed(futures), desc="runs", total=len(futures)):
        cell, steps = futures[future]
        try:
            row, curve = future.result()
        except SystemExit as error:  # such as for a gradient that is not finite: the run has failed, and ranks last
            tqdm.write(f"{cell}: {error}")
            row, curve = {**dict.fromkeys(FIELDS, float("nan")), **cell._asdict(), "steps": steps}, []
            row["final"] = -float("inf")
        results.add(row, curve)


def run_study(estimators, seeds, results, settings, prices, pool):
    """Tune the learning rates, then run the seeds.

    Args:
        estimators: {reward: names}.
    """
    for reward, names in estimators.items():
        tuning = [Cell(reward, name, rate, TUNING_SEED) for name in names for rate in LEARNING_RATES]
        run_missing([Cell(reward, "base", 0.0, 0), *tuning], results, settings, prices, pool)
        rows = read_csv(results.cells)
        best = {name: best_learning_rate(rows, reward, name) for name in names}
        final = [Cell(reward, name, rate, seed) for seed in seeds for name, rate in best.items()]
        run_missing(final, results, settings, prices, pool)


def run(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--report", action="store_true", help="Run nothing; tables and plot of the runs so far.")
    parser.add_argument("--budget", type=float, default=50.0, help="Seconds of bare calls of a run.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images of an optimizer step.")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS), help="Rewards to run.")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="What to run.")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Run only so many of the five seeds.")
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    settings = Settings(args.budget, args.batch_size, num_steps=20, num_images=64)
    if args.quick:
        settings = Settings(0.0, 2, num_steps=3, num_images=8)
    study = (
        f"python benchmarks/study.py{' --quick' if args.quick else ''} --budget {settings.budget:g} --batch_size"
        f" {settings.batch_size}, rates {', '.join(f'{rate:g}' for rate in LEARNING_RATES)}, T = {settings.num_steps}"
    )
    results = Results(args.out, f"{study}, {platform.machine()}, {VERSIONS}, one thread a run")
    results.check(study, args.report)
    if not os.path.isfile(results.prices):
        measured = measure_prices(settings, rounds=1 if args.quick else 15)
        rows = [{"call": name, "seconds": value} for name, value in measured.items()]
        write_csv(rows, results.prices, results.header)
    prices = {row["call"]: row["seconds"] for row in read_csv(results.prices)}
    if not args.report:
        estimators, seeds = {}, SEEDS[: args.seeds]
        for reward in args.rewards:
            estimators[reward] = [name for name in estimators_of(reward) if name in args.estimators]
        if args.quick:
            estimators, seeds = {"rough": ["rlr, predicted_x0"]}, SEEDS[:2]
        with worker_pool(args.workers) as pool:
            run_study(estimators, seeds, results, settings, prices, pool)

    cells, curves = read_csv(results.cells), read_csv(results.curves)
    table = summarize(cells)
    rows = [row for reward in REWARDS for row in table[reward]]
    print_tables(table)
    print("", *findings(table, curves, cells, prices, settings), sep="\n")
    write_csv(rows, os.path.join(args.out, "study.csv"), results.header)
    plot(table, curves, cells, prices, settings, os.path.join(args.out, "study.png"))
    return table


if __name__ == "__main__":
    run()
