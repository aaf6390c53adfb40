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
"""How far a reward can rise while images stay what they are: estimators at equal work on the embedded emoji models.

    python benchmarks/study.py              some 15 hours on two cores; it can be stopped, and continues when started again
    python benchmarks/study.py --quick      a short run that tests it
    python benchmarks/study.py --report     the tables and the plot of the runs so far

study_plan.py lists the comparisons, each of some estimators on a reward. Every run has an estimator, a learning rate and a seed,
and the work of 24 optimizer steps of rlr, in floating-point operations that torch counts: of network, decoder and reward. Along
the run, and at several scales of its adapter, images of fixed seeds get the reward that is trained on, and a classifier says how
many show what their prompt asks for. A run's score is the highest reward at which that share is still 95 % of the base model's.
Learning rates are tried on a seed of its own, on a grid that grows until the best is not at its end. The two best are run on all
seeds, and each seed takes the one that is better on the others.

Writes study_points.csv, some rows for each run, and from it study.csv and study.png.
"""

import os
import platform
import tempfile
from concurrent.futures import as_completed
from contextlib import redirect_stderr, redirect_stdout

from bench_common import (
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
from study_plan import ACCURACY, COMPARISONS, QUICK, Settings, arguments, judge_of, script_of, work_of
from study_report import CANDIDATES, TUNING_SEED, Cell, best_rates, cell_of, plot, print_table, summarize
from tqdm import tqdm


RATES = (1e-3, 3e-3, 1e-2)
WIDEST = (1e-4, 1e-1)  # the grid does not grow beyond
SCALES = (0.5, 0.75, 1.25)
FIELDS = ("comparison", "estimator", "learning_rate", "seed", "kind", "at", "score", "accuracy")


def run_cell(cell, settings):
    """The rows of a run: its points along the run, by the work done, and by the scale of its adapter."""
    forget_earlier_run()
    work = work_of(cell.comparison, cell.estimator, settings)
    steps = max(1, round(settings.steps * work_of(cell.comparison, "rlr", settings) / work))
    numbers = {"learning_rate": cell.learning_rate, "seed": cell.seed, "max_train_steps": steps}
    numbers |= {"heldout_steps": max(1, steps // settings.scorings), "num_heldout_images": settings.num_images}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        flags = ["--heldout_reward", ACCURACY, "--output_dir", folder]
        args = arguments(cell.comparison, cell.estimator, settings, numbers, flags)
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            judge = judge_of(cell.comparison, settings)
            try:
                script_of(cell.comparison).main(args)
                lines = [line for line in metrics_of(folder) if "heldout_mean" in line]
                scaled = judge.scores_by_scale(folder, (*SCALES, 1.0))
            except SystemExit:  # a gradient that was not finite ten times: the base model is what is left
                lines, scaled = [], {}
    end = [(steps, *scaled.pop(1.0))] if scaled else []
    along = [
        (line["step"], line["heldout_trained_mean"], line["heldout_mean"]) for line in lines if line["step"] < steps
    ]
    points = [("run", 0.0, *judge.base), *(("run", step * work / 1e12, *scores) for step, *scores in [*along, *end])]
    points += [("scale", scale, *scores) for scale, scores in scaled.items()]
    return [dict(zip(FIELDS, (*cell, *point))) for point in points]


def run_missing(cells, path, header, settings, pool):
    """Run the cells that a file lacks, and add each as soon as it ends."""
    done = {cell_of(row) for row in read_csv(path)}
    futures = {pool.submit(run_cell, cell, settings): cell for cell in cells if cell not in done}
    for future in tqdm(as_completed(futures), desc="Runs", total=len(futures)):
        append_csv(future.result(), path, FIELDS, header)


def run_comparison(name, seeds, path, header, settings, pool):
    """Tune the learning rates of the estimators, then run the seeds."""
    names = COMPARISONS[name].estimators
    rates, tried = {estimator: list(RATES) for estimator in names}, None
    while rates != tried:
        cells = [Cell(name, estimator, rate, TUNING_SEED) for estimator in names for rate in rates[estimator]]
        run_missing(cells, path, header, settings, pool)
        rows, tried = read_csv(path), rates
        rates = {estimator: wider(tried[estimator], best_rates(rows, name, estimator)[0]) for estimator in names}
    candidates = {estimator: best_rates(rows, name, estimator)[:CANDIDATES] for estimator in names}
    cells = [Cell(name, one, rate, seed) for seed in range(seeds) for one in names for rate in candidates[one]]
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
    parser.add_argument(
        "--comparisons", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="What to run. Default: all."
    )
    parser.add_argument("--seeds", type=int, default=5, help="Seeds of each estimator. Default: 5.")
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    settings = QUICK if args.quick else Settings()
    header = (
        f"python benchmarks/study.py{' --quick' if args.quick else ''}, {settings}, {platform.machine()}, {VERSIONS}"
    )
    path = os.path.join(args.out, "study_points.csv")
    if not args.report:
        with worker_pool(args.workers) as pool:
            if args.quick:
                cells = [Cell("decision", "rlr", RATES[0], seed) for seed in (0, TUNING_SEED)]
                run_missing(cells, path, header, settings, pool)
            else:
                for name in args.comparisons:
                    run_comparison(name, args.seeds, path, header, settings, pool)
    rows = read_csv(path)
    table = summarize(rows, COMPARISONS)
    if not table:
        print(f"{path} has no runs yet but those that choose learning rates" if rows else f"there is no {path} yet")
        return table
    print_table(table)
    write_csv(table, os.path.join(args.out, "study.csv"), header)
    plot(rows, table, os.path.join(args.out, "study.png"))
    return table


if __name__ == "__main__":
    run()
