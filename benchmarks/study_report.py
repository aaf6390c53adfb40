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
"""The table and the plot of study.py, from its rows of points."""

import math
import statistics
from typing import NamedTuple

from matplotlib.figure import Figure


TUNING_SEED = 100
CANDIDATES = 2  # the learning rates that all seeds are run with, the best on the tuning seed
KEPT = 0.95  # of the base model's concept accuracy
# Those of estimators that are in more than one comparison; others take matplotlib's next one.
COLORS = {
    "rlr": "C0",
    "ddpo": "black",
    "alignprop": "C1",
    "full_bp": "C2",
    "truncated_bp 5": "C3",
    "truncated_bp 1": "C4",
}
COLORS["rlr_paper"] = "C5"


class Cell(NamedTuple):
    """A run of a training script."""

    comparison: str
    estimator: str
    learning_rate: float
    seed: int


def cell_of(row):
    return Cell(row["comparison"], row["estimator"], row["learning_rate"], int(row["seed"]))


def along_run(rows):
    return [row for row in rows if row["kind"] == "run"]


def paths_of(rows):
    """The points (accuracy, score) of a run, in order: along the run, and by the scale of its adapter."""
    along = along_run(rows)
    scaled = [(row["at"], row) for row in rows if row["kind"] == "scale"]
    by_scale = [row for _, row in sorted([(0.0, along[0]), *scaled, (1.0, along[-1])], key=lambda pair: pair[0])]
    return [[(row["accuracy"], row["score"]) for row in path] for path in (along, by_scale)]


def score_at(rows, kept):
    """The highest reward of a run with at least `kept` of the base model's accuracy, between two points linearly."""
    found = []
    for path in paths_of(rows):
        least = kept * path[0][0]
        for (before, low), (after, high) in zip(path, path[1:]):
            found += [score for accuracy, score in ((before, low), (after, high)) if accuracy >= least]
            if (before - least) * (after - least) < 0:
                found.append(low + (before - least) / (before - after) * (high - low))
    return max(found)


def area(rows):
    """The mean of the score over what is kept of the accuracy, from 80 to 100 %."""
    return statistics.mean(score_at(rows, 0.8 + 0.2 * i / 20) for i in range(21))


def groups_of(rows):
    """{Cell: its rows}."""
    groups = {}
    for row in rows:
        groups.setdefault(cell_of(row), []).append(row)
    return groups


def best_rates(rows, comparison, estimator):
    """The learning rates that were tried on the tuning seed, the best first."""
    scores = {
        cell.learning_rate: score_at(own, KEPT)
        for cell, own in groups_of(rows).items()
        if (cell.comparison, cell.estimator, cell.seed) == (comparison, estimator, TUNING_SEED)
    }
    return sorted(scores, key=lambda rate: -scores[rate])


def runs_of(rows, comparison, estimator):
    """The rows of each seed but the tuning one, at the candidate that is best on all other seeds.

    So no seed has a part in the choice of its own learning rate.
    """
    runs = {
        (cell.learning_rate, cell.seed): own
        for cell, own in groups_of(rows).items()
        if (cell.comparison, cell.estimator) == (comparison, estimator)
    }
    candidates = best_rates(rows, comparison, estimator)[:CANDIDATES]
    seeds = {seed for rate, seed in runs} - {TUNING_SEED}
    # A seed whose runs have not all ended is left out.
    seeds = sorted(seed for seed in seeds if all((rate, seed) in runs for rate in candidates))

    def score_without(seed, rate):
        return statistics.mean(score_at(runs[rate, s], KEPT) for s in (*seeds, TUNING_SEED) if s != seed)

    return [runs[max(candidates, key=lambda rate: score_without(seed, rate)), seed] for seed in seeds]


def work_to_reach(rows, score):
    """The work after which a run's reward is as high as a score for the first time, in TFLOP, or infinity."""
    along = along_run(rows)
    if along[0]["score"] >= score:
        return 0.0
    for before, after in zip(along, along[1:]):
        if after["score"] >= score:
            share = (score - before["score"]) / (after["score"] - before["score"])
            return before["at"] + share * (after["at"] - before["at"])
    return math.inf


def summarize(rows, comparisons):
    """A row of the table for each comparison and estimator, the best first.

    Args:
        rows: of points.
        comparisons: {name: `study_plan.Comparison`}.
    """
    table = []
    for name, comparison in comparisons.items():
        runs = {estimator: runs_of(rows, name, estimator) for estimator in comparison.estimators}
        runs = {estimator: own for estimator, own in runs.items() if own}
        best = {estimator: statistics.mean(top_of(own) for own in runs[estimator]) for estimator in runs}
        lines = [summary(own, best) for own in runs.values()]
        table += sorted(lines, key=lambda line: -line["score_at_95"])
    return table


def top_of(rows):
    """The highest reward along a run."""
    return max(row["score"] for row in along_run(rows))


def summary(runs, best):
    """The row of an estimator.

    Args:
        runs: the rows of each seed.
        best: {estimator: the highest reward along its runs, on average}.
    """
    scores, ends = [score_at(own, KEPT) for own in runs], [along_run(own)[-1] for own in runs]
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else math.nan
    mean = {key: statistics.mean(end[key] for end in ends) for key in ("score", "accuracy", "at")}
    reached = {
        f"work_to_{rival}": statistics.median(work_to_reach(own, best[rival]) for own in runs)
        if rival in best
        else math.nan
        for rival in ("ddpo", "alignprop")
    }
    cell, rates = cell_of(runs[0][0]), sorted({own[0]["learning_rate"] for own in runs})
    return {
        **{"comparison": cell.comparison, "estimator": cell.estimator},
        **{"learning_rate": " or ".join(f"{rate:g}" for rate in rates)},
        **{"seeds": len(runs), "base": runs[0][0]["score"], "score_at_95": statistics.mean(scores), "error": error},
        **{"area": statistics.mean(map(area, runs)), "end": mean["score"], "end_accuracy": mean["accuracy"]},
        **{"work": mean["at"], **reached},
    }


def findings(table):
    """rlr, or where it is not compared the first, against each other estimator, in lines."""
    lines = []
    for name in dict.fromkeys(row["comparison"] for row in table):
        rows = [row for row in table if row["comparison"] == name]
        own = next((row for row in rows if row["estimator"] == "rlr"), rows[0])
        for row in (row for row in rows if row is not own):
            gap, error = own["score_at_95"] - row["score_at_95"], math.hypot(own["error"], row["error"])
            errors = f"{gap / error:+.1f} standard errors" if error > 0 else "no error known"
            lines.append(f"{name}: {own['estimator']} minus {row['estimator']} is {gap:+.4g}, {errors}")
    return lines


def print_table(table):
    """The tables in Markdown, and the findings."""
    for name in dict.fromkeys(row["comparison"] for row in table):
        print("\n" + "\n".join(markdown([row for row in table if row["comparison"] == name])))
    print("\n" + "\n".join(findings(table)))


def markdown(rows):
    """The lines of the table of a comparison."""
    lines = [
        f"**{rows[0]['comparison']}**: base model {rows[0]['base']:.3f}, {rows[0]['work']:.3g} TFLOP a run, {int(rows[0]['seeds'])} seeds",
        "",
        "| | rate | reward at 95 % | area | at the end | concepts | work to `ddpo`'s best | to `alignprop`'s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(share(row[f"work_to_{rival}"], row["work"]) for rival in ("ddpo", "alignprop"))
        lines.append(
            f"| `{row['estimator']}` | {row['learning_rate']} | {with_error(row)} | {row['area']:.3f} | {row['end']:.3f} |"
            f" {row['end_accuracy']:.2f} | {shares} |"
        )
    return lines


def with_error(row):
    error = "one seed" if math.isnan(row["error"]) else f"{row['error']:.3f}"
    return f"{row['score_at_95']:.3f} ± {error}"


def share(work, whole):
    return "" if math.isnan(work) else "never" if math.isinf(work) else f"{work / whole:.2f}"


def plot(rows, table, path):
    """The frontier of each estimator, and the reward by work; a row for each comparison. Faint lines are seeds."""
    names = list(dict.fromkeys(row["comparison"] for row in table))
    figure = Figure(figsize=(11, 3.6 * max(1, len(names))), layout="constrained")
    for axes, name in zip(figure.subplots(max(1, len(names)), 2, squeeze=False), names):
        # Colors by name, so that an estimator has the same one in all rows.
        for row in sorted((row for row in table if row["comparison"] == name), key=lambda row: row["estimator"]):
            plot_runs(axes, row["estimator"], runs_of(rows, name, row["estimator"]))
        axes[0].axvline(KEPT, color="black", lw=0.8)
        axes[0].set(title=name, xlabel="concept accuracy kept, of the base model's", ylabel="reward")
        axes[1].set(xlabel="work, TFLOP", ylabel="reward")
        axes[0].invert_xaxis()
        axes[0].legend(fontsize=8)
        for one in axes:
            one.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_runs(axes, estimator, runs):
    """The frontier and the course of an estimator's runs."""
    color = COLORS.get(estimator)
    kept = [0.5 + 0.5 * i / 50 for i in range(51)]
    frontiers = [[score_at(own, one) for one in kept] for own in runs]
    for frontier in frontiers:
        axes[0].plot(kept, frontier, color=color, lw=0.5, alpha=0.4)
    axes[0].plot(kept, [statistics.mean(values) for values in zip(*frontiers)], color=color, label=estimator)
    courses = [[[row[key] for row in along_run(own)] for own in runs] for key in ("at", "score")]
    axes[1].plot(
        *([statistics.mean(values) for values in zip(*course)] for course in courses), color=color, marker="."
    )
