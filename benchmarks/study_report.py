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
"""Tables and plots of study.py, from its rows of runs and of training rewards."""

import statistics

import torch
from matplotlib.figure import Figure
from study_plan import ESTIMATORS, REWARDS, SINE, cost_of_run, rows_of_seeds, step_price


# Variants of rlr are blue, those of the paper purple, those that truncate orange to red.
COLORS = dict(
    zip(
        ESTIMATORS,
        (
            *("#08306b", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#54278f", "#807dba", "#bcbddc"),
            *("black", "green", "gold", "orange", "orangered", "darkred"),
        ),
    )
)


def summarize(cells):
    """{reward: rows, the highest final reward first}, a row for each estimator over the seeds.

    Args:
        cells: rows of runs.
    """
    table = {}
    for reward in REWARDS:
        rows = []
        for estimator in ("base", *ESTIMATORS):
            own = rows_of_seeds(cells, reward, estimator, cells)
            if own:
                rows.append({"reward": reward, "estimator": estimator, **_summary(own)})
        table[reward] = sorted(rows, key=lambda row: -row["final"])
    return table


def _summary(own):
    summary = {"learning_rate": own[0]["learning_rate"], "seeds": len(own), "steps": int(own[0]["steps"])}
    for name in ("final", "other", "diversity", "nearest_real"):
        values = [row[name] for row in own]
        summary[name] = statistics.mean(values)
        if name == "final":
            # NaN for a single seed, and where a run has failed.
            spread = torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else float("nan")
            summary["standard_error"] = spread / len(values) ** 0.5
    return summary


def curve_of(curves, cells, reward, estimator, prices, settings):
    """(seconds, means, standard errors) over the seeds of an estimator's training rewards."""
    # A run that was stopped before its row was written has been run again: its curve is there twice, with equal rows.
    own = {(row["step"], row["seed"]): row["reward_mean"] for row in rows_of_seeds(curves, reward, estimator, cells)}
    steps = sorted({step for step, _ in own})
    by_step = [[mean for (step, _), mean in own.items() if step == wanted] for wanted in steps]
    means = [statistics.mean(values) for values in by_step]
    errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in by_step]
    price = step_price(reward, estimator, prices, settings)
    return [step * price for step in steps], means, errors


def seconds_to(level, seconds, means):
    """When a curve first reaches a level, linear between its points, or `None` if it never does."""
    for i, (now, mean) in enumerate(zip(seconds, means)):
        if mean >= level:
            if i == 0:
                return now
            before, low = seconds[i - 1], means[i - 1]
            return before + (now - before) * (level - low) / (mean - low)
    return None


def print_tables(table):
    """A table for each reward, and one with the final rewards of all, in Markdown."""
    for reward, rows in table.items():
        print(
            f"\n**{reward}**: `{REWARDS[reward].trained.replace(SINE, 'fast_sine')}`; held out:"
            f" `{REWARDS[reward].heldout}`\n\n"
            "| | learning rate | steps | final reward | held out | diversity | distance to real digits |\n"
            "|---|---|---|---|---|---|---|"
        )
        for row in rows:
            is_run = row["estimator"] != "base"
            final = f"{row['final']:.3f}" + (f" ± {row['standard_error']:.3f}" if is_run else "")
            shown = [f"{row['learning_rate']:g}", f"{row['steps']}"] if is_run else ["", ""]
            shown += [final, f"{row['other']:.3f}", f"{row['diversity']:.4f}", f"{row['nearest_real']:.2f}"]
            print(f"| {row['estimator']} | {' | '.join(shown)} |")
    print(f"\n| | {' | '.join(table)} |\n|{'---|' * (len(table) + 1)}")
    for estimator in ("base", *ESTIMATORS):
        shown = " | ".join(_final_reward(rows, estimator) for rows in table.values())
        print(f"| {'base model' if estimator == 'base' else f'`{estimator}`'} | {shown} |")


def _final_reward(rows, estimator):
    """An estimator's final reward with its standard error in Markdown, the highest of the rows in bold."""
    for row in rows:
        if row["estimator"] == estimator:
            digits = 2 if abs(row["final"]) > 2 else 3
            final = f"{row['final']:.{digits}f}"
            if estimator == "base":
                return final
            bold = "**" if row is rows[0] else ""
            return f"{bold}{final}{bold} ± {row['standard_error']:.{digits}f}"
    return "–"


def findings(table, curves, cells, prices, settings):
    """What the study shows, in lines: rlr against its rivals, rlr against ddpo by compute, and runs over budget."""
    return [
        *_differences(table),
        *_speed_up(table, curves, cells, prices, settings),
        *_overspent(table, cells, prices, settings),
    ]


def _differences(table):
    """The difference of rlr to the best, full_bp, alignprop and ddpo, with its standard error."""
    lines = []
    for reward, rows in table.items():
        by_name = {row["estimator"]: row for row in rows}
        best = [row["estimator"] for row in rows[:1]]
        for name in dict.fromkeys([*best, "full_bp", "alignprop", "ddpo"]):
            if {"rlr", name} <= by_name.keys() and name != "rlr" and by_name["rlr"]["seeds"] > 1:
                first, second = by_name["rlr"], by_name[name]
                gap = first["final"] - second["final"]
                error = (first["standard_error"] ** 2 + second["standard_error"] ** 2) ** 0.5
                lines.append(f"{reward}: rlr minus {name} is {gap:+.4f}, {gap / error:+.1f} standard errors")
    return lines


def _speed_up(table, curves, cells, prices, settings):
    """After how much of ddpo's compute rlr reaches the training reward at which ddpo ends."""
    if not {"rlr", "ddpo"} <= {row["estimator"] for row in table["smooth"]}:
        return []
    seconds, means, _ = curve_of(curves, cells, "smooth", "rlr", prices, settings)
    _, means_of_ddpo, _ = curve_of(curves, cells, "smooth", "ddpo", prices, settings)
    reached = seconds_to(means_of_ddpo[-1], seconds, means)
    when = "never" if reached is None else f"after {reached / settings.budget:.3f} of the compute"
    return [f"smooth: rlr reaches the last training reward of ddpo {when}"]


def _overspent(table, cells, prices, settings):
    """The estimators whose runs cost over 2 % more than planned."""
    lines = []
    for row in (row for rows in table.values() for row in rows if row["estimator"] != "base"):
        reward, name = row["reward"], row["estimator"]
        spent = []
        for run in rows_of_seeds(cells, reward, name, cells):
            cost = cost_of_run(reward, name, settings.num_steps, run["swept"], run["predicted"])
            spent.append(step_price(reward, name, prices, settings, cost) * run["steps"])
        mean = statistics.mean(spent)
        if mean > 1.02 * step_price(reward, name, prices, settings) * row["steps"]:
            lines.append(f"{reward}: {name} is over budget, {mean:.1f} of {settings.budget:g} seconds")
    return lines


def plot(table, curves, cells, prices, settings, path):
    """Above, training reward against compute, with bands of a standard error; below, final against held-out reward.

    Below, up and to the right is better, and up and to the left is a reward that is exploited.
    """
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
        above.set(title=reward, xlabel="seconds of bare calls", ylabel="reward of the training images")
        below.set(xlabel=f"{REWARDS[reward].heldout}, held out", ylabel=f"final reward: {reward}")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    for row, where in zip(grid, ("upper", "lower")):
        # Not every estimator has a row for each reward.
        handles = {name: handle for axes in row for handle, name in zip(*axes.get_legend_handles_labels())}
        names = [name for name in ("base model", *ESTIMATORS) if name in handles]
        figure.legend([handles[name] for name in names], names, loc=f"outside right {where}", fontsize=9)
    figure.savefig(path, dpi=100)
