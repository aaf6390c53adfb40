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
"""The table and the plot of frontier.py."""

import math
import statistics
from typing import NamedTuple

from matplotlib.figure import Figure


TUNING_SEED = 100
KEPT = 0.95  # of the base model's concept accuracy


class Cell(NamedTuple):
    """A run of train_rlr_sd.py."""

    reward: str
    estimator: str
    learning_rate: float
    seed: int


def cell_of(row):
    return Cell(row["reward"], row["estimator"], row["learning_rate"], int(row["seed"]))


def paths_of(rows):
    """The points (accuracy, score) of a run, in order: along the run, and by the scale of its adapter."""
    base = [row for row in rows if row["kind"] == "run"][0]
    end = [row for row in rows if row["kind"] == "run"][-1]
    scaled = [(row["at"], row) for row in rows if row["kind"] == "scale"]
    by_scale = [row for _, row in sorted([(0.0, base), *scaled, (1.0, end)], key=lambda pair: pair[0])]
    along = [row for row in rows if row["kind"] == "run"]
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


def best_rate(rows, reward, estimator):
    """The learning rate with the best score on the tuning seed."""
    scores = {
        cell.learning_rate: score_at(own, KEPT)
        for cell, own in groups_of(rows).items()
        if (cell.reward, cell.estimator, cell.seed) == (reward, estimator, TUNING_SEED)
    }
    return max(scores, key=scores.get) if scores else None


def work_to_reach(rows, score):
    """The work after which a run's reward is as high as a score for the first time, in TFLOP, or infinity."""
    along = [row for row in rows if row["kind"] == "run"]
    for before, after in zip(along, along[1:]):
        if after["score"] >= score:
            share = max(0.0, (score - before["score"]) / (after["score"] - before["score"]))
            return before["at"] + share * (after["at"] - before["at"])
    return math.inf


def summarize(rows, rewards, estimators):
    """A row of the table for each reward and estimator, the best first, of the seeds that nothing was chosen on."""
    table, groups = [], groups_of(rows)
    for reward in rewards:
        of_reward = []
        for estimator in estimators:
            rate = best_rate(rows, reward, estimator)
            runs = [
                own
                for cell, own in groups.items()
                if cell[:3] == (reward, estimator, rate) and cell.seed != TUNING_SEED
            ]
            if not runs:
                continue
            scores, areas = [score_at(own, KEPT) for own in runs], [area(own) for own in runs]
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else math.nan
            ends = [[row for row in own if row["kind"] == "run"][-1] for own in runs]
            of_reward.append({
                **{"reward": reward, "estimator": estimator, "learning_rate": rate, "seeds": len(runs)},
                **{"base": runs[0][0]["score"], "score_at_95": statistics.mean(scores), "error": error},
                **{"area": statistics.mean(areas), "end": statistics.mean(row["score"] for row in ends)},
                "end_accuracy": statistics.mean(row["accuracy"] for row in ends),
                "end_of_work": statistics.mean(row["at"] for row in ends),
            })  # fmt: skip
        best = {row["estimator"]: row["end"] for row in of_reward}
        for row in of_reward:
            runs = [
                own
                for cell, own in groups.items()
                if cell[:3] == tuple(row[k] for k in ("reward", "estimator", "learning_rate"))
            ]
            for rival in ("ddpo", "alignprop"):
                reached = (
                    [work_to_reach(own, best[rival]) for own in runs if own[0]["seed"] != TUNING_SEED]
                    if rival in best
                    else []
                )
                row[f"work_to_{rival}"] = statistics.median(reached) if reached else math.nan
        table += sorted(of_reward, key=lambda row: -row["score_at_95"])
    return table


def plot(rows, table, estimators, path):
    """The frontier of each estimator, and the reward by work; a row for each reward. Faint lines are seeds."""
    rewards = list(dict.fromkeys(row["reward"] for row in table))
    figure = Figure(figsize=(11, 3.6 * max(1, len(rewards))), layout="constrained")
    grid, groups = figure.subplots(max(1, len(rewards)), 2, squeeze=False), groups_of(rows)
    for axes, reward in zip(grid, rewards):
        for row in (one for one in table if one["reward"] == reward):
            color = f"C{estimators.index(row['estimator'])}"
            runs = [
                own for cell, own in groups.items() if cell[:3] == (reward, row["estimator"], row["learning_rate"])
            ]
            runs = [own for own in runs if own[0]["seed"] != TUNING_SEED]
            kept = [0.5 + 0.5 * i / 50 for i in range(51)]
            for own in runs:
                axes[0].plot(kept, [score_at(own, one) for one in kept], color=color, lw=0.5, alpha=0.4)
            mean = [statistics.mean(score_at(own, one) for own in runs) for one in kept]
            axes[0].plot(kept, mean, color=color, label=row["estimator"])
            along = [[one for one in own if one["kind"] == "run"] for own in runs]
            points = [
                [statistics.mean(values) for values in zip(*([one[key] for one in own] for own in along))]
                for key in ("at", "score")
            ]
            axes[1].plot(*points, color=color, marker=".", label=row["estimator"])
        axes[0].axvline(KEPT, color="black", lw=0.8)
        axes[0].set(title=reward, xlabel="concept accuracy kept, of the base model's", ylabel="reward")
        axes[1].set(xlabel="work, TFLOP", ylabel="reward")
        axes[0].invert_xaxis()
        axes[0].legend(fontsize=8)
        for one in axes:
            one.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def print_table(table):
    for row in table:
        print(
            f"{row['reward']:<10} {row['estimator']:<15} rate {row['learning_rate']:<7g} at 95 %: {row['score_at_95']:.3f} +-"
            f" {row['error']:.3f} (base {row['base']:.3f}), area {row['area']:.3f}, end {row['end']:.3f} at accuracy"
            f" {row['end_accuracy']:.2f}, work to ddpo's end {row['work_to_ddpo']:.3g} of {row['end_of_work']:.3g} TFLOP"
        )
