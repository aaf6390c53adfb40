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
"""Does RLR win, and by how much: every estimator on the embedded Stable Diffusion, at equal compute.

    python benchmarks/study.py              in pieces if need be: it goes on where it was stopped
    python benchmarks/study.py --quick      half a minute of it, to see that it runs
    python benchmarks/study.py --report     the table and the plot of what is there

Every cell is a run of train_rlr_sd.py: a reward, an estimator, a learning rate, a seed. It may cost --budget seconds of bare
network calls, forwards and vector-Jacobian products of U-Net, decoder and reward, whose prices are measured once, taking
turns, and are then the same for all; so neither the load of the machine nor the speed of anybody's own code makes a
winner. Each estimator has for each reward the learning rate of three that is best on a seed of its own. The adapters are
judged on pictures of fixed seeds, from which no run has trained.

Writes study_prices.csv, study_cells.csv (a row a run) and study_curves.csv (training rewards by compute) as it goes, and
from them study.csv (the table) and study.png; prints the table as docs/results.md has it.
"""

import argparse
import csv
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import as_completed
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from tqdm import tqdm


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools"), os.path.join(ROOT, "benchmarks")]

from evaluate_rlr_sd import measure  # noqa: E402
from gradient_quality import parse_benchmark, worker_pool, write_csv  # noqa: E402
from reward_cost import seconds_of  # noqa: E402
from reward_hacking import CLIP, base_model, ink, real_digits  # noqa: E402
from reward_models import parse_reward  # noqa: E402
from reward_models.features import load_features  # noqa: E402
from rlr_utils import StableDiffusionChain, full_bp  # noqa: E402
from step_cost import bundle  # noqa: E402
from train_rlr_sd import generate, main, score_latents  # noqa: E402

import diffusers  # noqa: E402


SINE = f"{os.path.join(ROOT, 'benchmarks', 'study.py')}:fast_sine"
# {name: (what is trained, what is looked at besides)}
REWARDS = {
    "smooth": ("aesthetic", "clip_score"),
    "text": ("clip_score", "aesthetic"),
    "rough": (f"aesthetic,{SINE}:0.5", "clip_score"),
    "black box": ("jpeg_compressibility", "clip_score"),
}
PAPER = ["--gradient_estimator", "rlr_paper", "--subchain_length", "2", "--rest"]
ESTIMATORS = {
    "rlr": [],
    "rlr, predicted_x0": ["--baseline", "predicted_x0"],
    "rlr, leave_one_out": ["--baseline", "leave_one_out"],
    "rlr, per_prompt": ["--baseline", "per_prompt", "--images_per_prompt", "2"],
    "rlr, no baseline": ["--baseline", "none"],
    "rlr_paper, zeroth_order": [*PAPER, "zeroth_order"],
    "rlr_paper, likelihood_ratio": [*PAPER, "likelihood_ratio"],
    "rlr_paper, none": [*PAPER, "none"],
    "ddpo": ["--gradient_estimator", "ddpo"],
    "full_bp": ["--gradient_estimator", "full_bp"],
    "alignprop": ["--gradient_estimator", "alignprop"],
    "truncated_bp 1": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "1"],
    "truncated_bp 5": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "5"],
    "draft_lv": ["--gradient_estimator", "draft_lv"],
}
# Ours are blue, the paper's purple, those that truncate orange to red.
COLORS = dict(
    zip(
        ESTIMATORS,
        (
            *("#08306b", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#54278f", "#807dba", "#bcbddc"),
            *("black", "green", "gold", "orange", "orangered", "darkred"),
        ),
    )
)
NEED_GRADIENT = ("full_bp", "alignprop", "truncated_bp 1", "truncated_bp 5", "draft_lv")
# The share of the steps at which the default baseline predicts at most; elsewhere it is leave-one-out and nothing else.
PREDICTED = {"rough": 0.5, "black box": 1.0}
# At .02 the pictures of smooth and rough rewards are wrecked for them, and who wrecks them best says nothing.
LEARNING_RATES = (2.5e-3, 5e-3, 1e-2)
TUNING_SEED = 100
SEEDS = range(5)


class Settings(NamedTuple):
    """What all cells share: seconds of bare calls a cell, pictures a step, T, and pictures that judge an adapter."""

    budget: float
    batch_size: int
    num_steps: int
    num_images: int


class Cell(NamedTuple):
    """A run."""

    reward: str
    estimator: str
    learning_rate: float
    seed: int


def fast_sine(images, prompts):
    """sin(1200 w . picture) for a fixed direction w: over the pictures' spread it averages to nothing, but it is nearly
    all of the gradient at any one picture, which then points nowhere."""
    direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    direction = (direction / direction.norm()).to(images)
    return torch.sin(1200 * (images * direction).sum((1, 2, 3)))


def flags_of(settings):
    """What every run of the training script is told beside `reward_hacking.BASE`."""
    size = str(settings.batch_size)
    return [
        *("--num_inference_steps", str(settings.num_steps), "--train_batch_size", size),
        *("--decode_batch_size", size, "--lr_scheduler", "linear", "--resolution", "32"),
    ]


def graphs_of(estimator, num_steps):
    """All graphs are kept, as a researcher with memory to spare would, where the estimator sweeps those of the rollout."""
    sweeps = estimator not in ("draft_lv", "rlr_paper, zeroth_order")
    return ["--keep_graphs", str(num_steps)] if sweeps else []


@functools.cache
def judges():
    """What every process judges pictures by: the features, and the ink of real digits."""
    return load_features(CLIP), ink(real_digits())


def measure_prices(settings, rounds):
    """Seconds per picture of every bare call, {name: seconds}: the median of rounds in which all take their turn."""
    torch.set_num_threads(1)
    model = bundle(Accelerator(cpu=True), checkpointing=False)
    model.vae.disable_gradient_checkpointing()
    model.scheduler.set_timesteps(settings.num_steps)
    batch = settings.batch_size
    chain = StableDiffusionChain(model.unet, model.scheduler, *[model.embeds.expand(batch, -1, -1)] * 2)
    side, prompts = model.unet.config.sample_size, ["a red seven"] * batch
    latents = torch.randn(batch, model.unet.config.in_channels, side, side)

    def forward():
        with torch.no_grad():
            chain.mean(1, latents)

    def vjp():
        chain.mean(1, latents.clone().requires_grad_()).sum().backward()

    calls = {"forward": forward, "vjp": vjp}
    for name, (text, _) in REWARDS.items():
        _, _, rewards, _ = base_model(text, 1, 1, flags_of(settings))
        for kind in ("score", "gradient") if rewards.has_gradient else ("score",):
            calls[f"{kind} {name}"] = lambda rewards=rewards, kind=kind: score_latents(
                model.vae, rewards, latents, prompts, batch, kind == "gradient"
            )
    seconds = {name: [] for name in calls}
    for i in tqdm(range(rounds + 2), desc="prices"):
        for name, call in calls.items():
            value = seconds_of(call) / batch
            if i >= 2:
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def estimators_of(reward, prices):
    """Those that can do something of their own with a reward."""
    has_gradient = f"gradient {reward}" in prices
    names = [name for name in ESTIMATORS if has_gradient or name not in NEED_GRADIENT]
    # The baseline that is the default's there has no row of its own.
    default = {"rough": None, "black box": "rlr, predicted_x0"}.get(reward, "rlr, leave_one_out")
    return [name for name in names if name != default]


def planned_steps(reward, estimator, num_steps):
    """Of the steps of the chain those that are swept and those that a picture is predicted at, as prices have it: in the mean
    where steps are drawn, as by alignprop and by rlr."""
    swept = {
        "alignprop": (num_steps + 1) / 2,
        "truncated_bp 1": 1,
        "truncated_bp 5": min(5, num_steps),
        "draft_lv": 2,
        "rlr_paper, zeroth_order": 3,
        "rlr_paper, none": 3,
    }.get(estimator, num_steps)
    if reward not in PREDICTED and "--gradient_estimator" not in ESTIMATORS[estimator]:
        # What --sweep_fraction auto is for rlr where a gradient can be leaned on.
        swept = full_bp(num_steps)._replace(fraction=0.5).expected_steps
    share = {"rlr": PREDICTED.get(reward, 0.0), "rlr, predicted_x0": 1.0}.get(estimator, 0.0)
    return swept, share * num_steps


def price_of(reward, estimator, prices, num_steps, swept, predicted):
    """Seconds of bare calls that a picture costs."""
    score, gradient = prices[f"score {reward}"], prices.get(f"gradient {reward}")
    scoring = score if gradient is None or estimator == "ddpo" else gradient
    if estimator == "draft_lv":
        scoring = score + 2 * gradient
    # Where the graphs of the rollout are kept, a swept step's forward is the rollout's.
    forwards = num_steps - swept if graphs_of(estimator, num_steps) else num_steps
    return forwards * prices["forward"] + swept * prices["vjp"] + scoring + predicted * score


def step_price(reward, estimator, prices, settings, steps=None):
    """Seconds of bare calls that an optimizer step costs, by the (swept, predicted) steps of the chain, those planned if none
    are given."""
    steps = steps or planned_steps(reward, estimator, settings.num_steps)
    return price_of(reward, estimator, prices, settings.num_steps, *steps) * settings.batch_size


def run_cell(cell, settings, steps):
    """Train and judge: the row of a run, with the steps of the chain at which the baseline predicted a picture and those
    that were swept, in the mean, and its curve, rows of training rewards by optimizer step. No step is the
    base model."""
    torch.set_num_threads(1)
    trained, other = REWARDS[cell.reward]
    flags, metrics = [*flags_of(settings), "--reward", trained], []
    if steps > 0:
        flags += [*ESTIMATORS[cell.estimator], *graphs_of(cell.estimator, settings.num_steps)]
        flags += [f"--learning_rate={cell.learning_rate}", f"--seed={cell.seed}", f"--max_train_steps={steps}"]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            flags += ["--output_dir", folder]
            args, prompts, rewards, pipeline = base_model(f"{trained},{other}", settings.num_images // 4, 4, flags)
            if steps > 0:
                main(args)
                with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
                    metrics = [json.loads(line) for line in file]
                pipeline.load_lora_weights(folder)
            images = generate(pipeline, prompts, args)
            features, real_ink = judges()
            summary, details = measure(images, prompts, rewards, features, None, None, "cpu")
    scores = details["scores"]
    total = sum(term.weight * scores[name] for name, term in parse_reward(trained).items())
    row = {
        **cell._asdict(),
        "steps": steps,
        "predicted": sum(line["predicted_steps"] for line in metrics) / max(steps, 1),
        "swept": sum(line["swept_steps"] for line in metrics) / max(steps, 1),
        "final": total.mean().item(),
        "other": scores[other].mean().item(),
        "diversity": summary["diversity"],
        "nearest_real": torch.cdist(ink(images), real_ink).amin(1).mean().item(),
    }
    means = [line["reward_mean"] for line in metrics]
    window = max(1, len(means) // 12)
    curve = [
        {**cell._asdict(), "step": i + len(part) / 2, "reward_mean": sum(part) / len(part)}
        for i in range(0, len(means), window)
        for part in [means[i : i + window]]
    ]
    return row, curve


FIELDS = [*Cell._fields, "steps", "predicted", "swept", "final", "other", "diversity", "nearest_real"]
CURVE_FIELDS = [*Cell._fields, "step", "reward_mean"]


def read_rows(path):
    """The rows of a CSV of this study, numbers as numbers; none if there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [{k: v if k in ("reward", "estimator", "call") else float(v) for k, v in row.items()} for row in rows]


def append_rows(path, rows, fields, header):
    is_new = not os.path.isfile(path)
    with open(path, "a", encoding="utf-8", newline="") as file:
        if is_new:
            file.write(f"# {header}\n")
        writer = csv.DictWriter(file, fields)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def cell_of(row):
    return Cell(row["reward"], row["estimator"], row["learning_rate"], int(row["seed"]))


def best_learning_rate(rows, reward, estimator):
    """The one whose run on the seed for that ended highest, or `None` if there is none."""
    tried = [Cell(reward, estimator, rate, TUNING_SEED) for rate in LEARNING_RATES]
    own = [row for row in rows if cell_of(row) in tried]
    return max(own, key=lambda row: row["final"])["learning_rate"] if own else None


def run_missing(cells, done, settings, prices, table_file, curve_file, header, workers):
    """Run the cells that are not there yet, and write each as soon as it is."""
    with worker_pool(workers) as pool:
        futures = {}
        for cell in cells:
            steps = 0
            if cell.estimator != "base":
                steps = max(1, int(settings.budget / step_price(cell.reward, cell.estimator, prices, settings)))
            if cell not in done:
                futures[pool.submit(run_cell, cell, settings, steps)] = cell, steps
        for future in tqdm(as_completed(futures), desc="runs", total=len(futures)):
            cell, steps = futures[future]
            try:
                row, curve = future.result()
            except SystemExit as error:  # such as a gradient that is not finite: it has lost
                tqdm.write(f"{cell}: {error}")
                row, curve = {**dict.fromkeys(FIELDS, float("nan")), **cell._asdict(), "steps": steps}, []
                row["final"] = -float("inf")
            append_rows(curve_file, curve, CURVE_FIELDS, header)
            append_rows(table_file, [row], FIELDS, header)
            done.add(cell)


def finals_of(rows, reward, estimator, cells):
    """Of rows of cells or curves those of the seeds, at the learning rate that the cells have chosen."""
    rate = 0.0 if estimator == "base" else best_learning_rate(cells, reward, estimator)
    return [row for row in rows if row["seed"] in SEEDS and cell_of(row)[:3] == (reward, estimator, rate)]


def summarize(cells):
    """A row for each reward and estimator, over the seeds: {reward: rows, the highest first}."""
    table = {}
    for reward in REWARDS:
        rows = []
        for estimator in ("base", *ESTIMATORS):
            own = finals_of(cells, reward, estimator, cells)
            if not own:
                continue
            summary = {"reward": reward, "estimator": estimator, "learning_rate": own[0]["learning_rate"]}
            summary.update(seeds=len(own), steps=int(own[0]["steps"]))
            for name in ("final", "other", "diversity", "nearest_real"):
                values = [row[name] for row in own]
                summary[name] = statistics.mean(values)
                if name == "final":
                    # Of a run that has not come to its end, no number.
                    spread = (
                        torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else float("nan")
                    )
                    summary["standard_error"] = spread / len(values) ** 0.5
            rows.append(summary)
        table[reward] = sorted(rows, key=lambda row: -row["final"])
    return table


def curve_of(curves, cells, reward, estimator, prices, settings):
    """(seconds, means, standard errors) over the seeds of an estimator's training rewards."""
    # A run that was stopped before its row was written has been run again: of its curve there are two, the same.
    own = {(row["step"], row["seed"]): row["reward_mean"] for row in finals_of(curves, reward, estimator, cells)}
    steps = sorted({step for step, _ in own})
    by_step = [[mean for (step, _), mean in own.items() if step == wanted] for wanted in steps]
    means = [statistics.mean(values) for values in by_step]
    errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in by_step]
    price = step_price(reward, estimator, prices, settings)
    return [step * price for step in steps], means, errors


def seconds_to(level, seconds, means):
    """When a curve first reaches a level, between its points linearly; `None` if it never does."""
    for i, (now, mean) in enumerate(zip(seconds, means)):
        if mean >= level:
            if i == 0:
                return now
            before, low = seconds[i - 1], means[i - 1]
            return before + (now - before) * (level - low) / (mean - low)
    return None


def figure_of(rows, estimator):
    """An estimator's final reward with its standard error in Markdown, that of the first row bold."""
    for row in rows:
        if row["estimator"] == estimator:
            digits = 2 if abs(row["final"]) > 2 else 3
            figure = f"{row['final']:.{digits}f}"
            if estimator == "base":
                return figure
            bold = "**" if row is rows[0] else ""
            return f"{bold}{figure}{bold} ± {row['standard_error']:.{digits}f}"
    return "–"


def print_tables(table):
    """A table for each reward, and the final rewards of all in one, in Markdown."""
    for reward, rows in table.items():
        print(
            f"\n**{reward}**: `{REWARDS[reward][0].replace(SINE, 'fast_sine')}`; held out: `{REWARDS[reward][1]}`\n\n"
            "| | learning rate | steps | final reward | held out | diversity | distance to real digits |\n"
            "|---|---|---|---|---|---|---|"
        )
        for row in rows:
            runs = row["estimator"] != "base"
            final = f"{row['final']:.3f}" + (f" ± {row['standard_error']:.3f}" if runs else "")
            shown = [f"{row['learning_rate']:g}", f"{row['steps']}"] if runs else ["", ""]
            shown += [final, f"{row['other']:.3f}", f"{row['diversity']:.4f}", f"{row['nearest_real']:.2f}"]
            print(f"| {row['estimator']} | {' | '.join(shown)} |")
    print(f"\n| | {' | '.join(table)} |\n|{'---|' * (len(table) + 1)}")
    for estimator in ("base", *ESTIMATORS):
        shown = " | ".join(figure_of(rows, estimator) for rows in table.values())
        print(f"| {'base model' if estimator == 'base' else f'`{estimator}`'} | {shown} |")


def judge(table, curves, cells, prices, settings):
    """What the study was to show, a line each."""
    lines = []
    rows = {reward: {row["estimator"]: row for row in table[reward]} for reward in REWARDS}

    def difference(first, second):
        error = (first["standard_error"] ** 2 + second["standard_error"] ** 2) ** 0.5
        gap = first["final"] - second["final"]
        return f"{first['estimator']} is {gap:+.4f} of {second['estimator']}, {gap / error:+.1f} standard errors"

    for reward, own in rows.items():
        first = [row["estimator"] for row in table[reward][:1]]
        for other in dict.fromkeys([*first, "full_bp", "alignprop", "ddpo"]):
            if {"rlr", other} <= own.keys() and other != "rlr" and own["rlr"]["seeds"] > 1:
                lines.append(f"{reward}: {difference(own['rlr'], own[other])}")
    if {"rlr", "ddpo"} <= rows["smooth"].keys():
        found = {}
        for name in ("rlr", "ddpo"):
            found[name] = curve_of(curves, cells, "smooth", name, prices, settings)[:2]
        reached = seconds_to(found["ddpo"][1][-1], *found["rlr"])
        share = "never" if reached is None else f"after {reached / settings.budget:.3f} of its compute"
        lines.append(f"smooth: rlr is where ddpo's training pictures end {share}")
    for row in (row for rows in table.values() for row in rows if row["estimator"] != "base"):
        reward, name = row["reward"], row["estimator"]
        spent = statistics.mean(
            step_price(reward, name, prices, settings, (run["swept"], run["predicted"])) * run["steps"]
            for run in finals_of(cells, reward, name, cells)
        )
        if spent > 1.02 * step_price(reward, name, prices, settings) * row["steps"]:
            lines.append(f"{reward}: {name} has overspent, {spent:.1f} of {settings.budget:g} seconds")
    return lines


def plot(table, curves, cells, prices, settings, path):
    """Above, training reward against compute with bands of a standard error; below, final reward against the held-out
    one: up and to the right is better, up and to the left is a reward that is exploited."""
    rewards = [reward for reward in REWARDS if len(table[reward]) > 1] or list(REWARDS)
    figure = Figure(figsize=(4 * len(rewards) + 3, 8.5), layout="constrained")
    grid = figure.subplots(2, len(rewards), squeeze=False)
    for reward, (above, below) in zip(rewards, grid.T):
        by_name = {row["estimator"]: row for row in table[reward]}
        if "base" in by_name:
            below.plot(by_name["base"]["other"], by_name["base"]["final"], "k*", ms=14, label="base model")
        for marker, (name, color) in zip("os8^Dv<>pP*hXd", COLORS.items()):
            if name not in by_name:
                continue
            row = by_name[name]
            seconds, means, errors = curve_of(curves, cells, reward, name, prices, settings)
            low, high = ([m + side * e for m, e in zip(means, errors)] for side in (-1, 1))
            above.fill_between(seconds, low, high, color=color, alpha=0.15, lw=0)
            above.plot(seconds, means, color=color, lw=2.5 if name == "rlr" else 1.2, label=name)
            below.errorbar(
                row["other"], row["final"], row["standard_error"], fmt=marker, color=color, ms=8, label=name
            )
        above.set(title=reward, xlabel="seconds of bare calls", ylabel="reward of the training pictures")
        below.set(xlabel=f"{REWARDS[reward][1]}, held out", ylabel=f"final reward: {reward}")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    for row, where in zip(grid, ("upper", "lower")):
        # Not every estimator has a row for each reward.
        found = {name: handle for axes in row for handle, name in zip(*axes.get_legend_handles_labels())}
        names = [name for name in ("base model", *ESTIMATORS) if name in found]
        figure.legend([found[name] for name in names], names, loc=f"outside right {where}", fontsize=9)
    figure.savefig(path, dpi=100)


def run(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Run nothing; table and plot of what is there.")
    parser.add_argument("--budget", type=float, default=50.0, help="Seconds of bare calls of a run.")
    parser.add_argument("--batch_size", type=int, default=16, help="Pictures of an optimizer step.")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS), help="Those to go on with.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, of one thread each.")
    args = parse_benchmark(parser, input_args)
    settings = Settings(args.budget, args.batch_size, num_steps=20, num_images=64)
    if args.quick:
        settings = Settings(0.0, 2, num_steps=3, num_images=8)
    study = (
        f"python benchmarks/study.py{' --quick' if args.quick else ''} --budget {settings.budget:g} --batch_size"
        f" {settings.batch_size}, rates {', '.join(f'{rate:g}' for rate in LEARNING_RATES)}, T = {settings.num_steps}"
    )
    header = f"{study}, {platform.machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}, one thread a run"
    table_file, curve_file, price_file = (
        os.path.join(args.out, f"study_{name}.csv") for name in ("cells", "curves", "prices")
    )
    headers = {}
    for path in (table_file, curve_file, price_file):
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                headers[path] = file.readline().strip("# \n")
        elif args.report:
            sys.exit(f"study.py: error: there is no {path!r} to report of")
    if args.report and headers[table_file].startswith(f"{study}, "):
        header = headers[table_file]  # a report may be made on another machine
    for path, found in headers.items():
        if found != header:
            sys.exit(f"study.py: error: {path!r} is of another study than «{header}»: name another --out")
    if not os.path.isfile(price_file):
        measured = measure_prices(settings, rounds=1 if args.quick else 15)
        rows = [{"call": name, "seconds": value} for name, value in measured.items()]
        append_rows(price_file, rows, ["call", "seconds"], header)
    prices = {row["call"]: row["seconds"] for row in read_rows(price_file)}

    if not args.report:
        done = {cell_of(row) for row in read_rows(table_file)}

        def finish(*cells):
            run_missing(cells, done, settings, prices, table_file, curve_file, header, args.workers)

        chosen = {reward: estimators_of(reward, prices) for reward in args.rewards}
        if args.quick:
            chosen = {"rough": ["rlr, predicted_x0"]}
        for reward, names in chosen.items():
            tuning = [Cell(reward, name, rate, TUNING_SEED) for name in names for rate in LEARNING_RATES]
            finish(Cell(reward, "base", 0.0, 0), *tuning)
            rows = read_rows(table_file)
            best = {name: best_learning_rate(rows, reward, name) for name in names}
            final = [Cell(reward, name, rate, seed) for seed in SEEDS for name, rate in best.items()]
            finish(*(final[:2] if args.quick else final))

    cells, curves = read_rows(table_file), read_rows(curve_file)
    table = summarize(cells)
    rows = [row for reward in REWARDS for row in table[reward]]
    print_tables(table)
    print("", *judge(table, curves, cells, prices, settings), sep="\n")
    write_csv(rows, os.path.join(args.out, "study.csv"), header)
    plot(table, curves, cells, prices, settings, os.path.join(args.out, "study.png"))
    return table


if __name__ == "__main__":
    run()
