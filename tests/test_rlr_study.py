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
import csv

import pytest
import torch
from bench_common import read_csv
from study import run
from study_plan import (
    ESTIMATORS,
    LEARNING_RATES,
    SEEDS,
    TUNING_SEED,
    Cell,
    Settings,
    best_learning_rate,
    cell_of,
    cost_of_run,
    estimators_of,
    fast_sine,
    planned_cost,
    price_of,
)
from study_report import findings, seconds_to, summarize


PRICES = {"forward": 1.0, "vjp": 2.0, "score smooth": 0.5, "gradient smooth": 1.5, "score black box": 0.25}
PRICES.update({"score rough": 0.5, "gradient rough": 1.5})


def test_quick_study_continues_and_reports(tmp_path, capsys):
    table = run(["--quick", "--workers", "0", "--out", str(tmp_path)])
    files = {"study_prices.csv", "study_cells.csv", "study_curves.csv", "study.csv", "study.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    cells = read_csv(tmp_path / "study_cells.csv")
    tuned = [("rough", "rlr, predicted_x0", rate, TUNING_SEED) for rate in LEARNING_RATES]
    best = best_learning_rate(cells, "rough", "rlr, predicted_x0")
    final = [("rough", "rlr, predicted_x0", best, seed) for seed in SEEDS[:2]]
    assert {cell_of(row) for row in cells} == {("rough", "base", 0.0, 0), *tuned, *final}
    assert all(row["predicted"] == row["swept"] == (3 if row["steps"] else 0) for row in cells)
    assert {row["estimator"]: row["seeds"] for row in table["rough"]} == {"base": 1, "rlr, predicted_x0": 2}
    assert not table["smooth"]
    assert "fast_sine:0.5" in capsys.readouterr().out

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if "png" not in path.name}
    # Only a missing run is run; the others stay.
    lines = before["study_cells.csv"].splitlines(keepends=True)
    (tmp_path / "study_cells.csv").write_bytes(b"".join(lines[:-1]))
    run(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert (tmp_path / "study_cells.csv").read_bytes() == before["study_cells.csv"]
    assert (tmp_path / "study.csv").read_bytes() == before["study.csv"]

    # A report may be made on another machine, but the study cannot be continued there.
    for name in ("prices", "cells", "curves"):
        path = tmp_path / f"study_{name}.csv"
        path.write_bytes(before[path.name].replace(b", torch ", b", torch 0.", 1))
    run(["--quick", "--report", "--out", str(tmp_path)])
    assert (tmp_path / "study.csv").read_bytes() == before["study.csv"].replace(b", torch ", b", torch 0.", 1)
    for flags in (["--quick"], ["--report"]):
        with pytest.raises(SystemExit, match="is of another study than"):
            run([*flags, "--out", str(tmp_path)])


def test_price_of_an_image():
    def price(estimator, reward="smooth", num_steps=20):
        return price_of(reward, estimator, PRICES, planned_cost(reward, estimator, num_steps))

    # With the rollout's graphs kept, a swept step has the price of its product and takes no other forward pass.
    assert price("full_bp") == 20 * 2 + 1.5
    # With a smooth reward, rlr sweeps three steps and on average half of the others.
    assert price("rlr") == 20 + 3 + 17 / 2 + 1.5
    assert price("rlr, predicted_x0") == price("rlr") + 20 * 0.5
    # With a rough one it sweeps all steps, and predicts where the likelihood ratio has a share in the last half: not at k = 1.
    assert price("rlr", "rough") == price("rlr, leave_one_out", "rough") + 9 * 0.5 == 20 * 2 + 1.5 + 9 * 0.5
    assert price("rlr", "black box") == price("rlr, leave_one_out", "black box") + 20 * 0.25 == 20 * 2 + 21 * 0.25
    assert price("ddpo") == 20 * 2 + 0.5
    assert price("truncated_bp 5") == 15 + 5 * 2 + 1.5
    assert price("truncated_bp 5", num_steps=5) == 5 * 2 + 1.5
    assert price("alignprop") == pytest.approx(9.5 + 10.5 * 2 + 1.5)
    assert price("draft_lv") == 20 + 2 * 2 + 0.5 + 2 * 1.5
    assert price("rlr_paper, zeroth_order") == 20 + 3 * 2 + 1.5
    assert price("rlr, no baseline", "black box") == price("ddpo", "black box") == 20 * 2 + 0.25
    assert all(price(name) > 20 for name in ESTIMATORS)
    run_of_12_steps = cost_of_run("smooth", "rlr", 20, swept=12, predicted=2)
    assert price_of("smooth", "rlr", PRICES, run_of_12_steps) == 8 + 12 * 2 + 1.5 + 2 * 0.5
    run_of_zeroth_order = cost_of_run("smooth", "rlr_paper, zeroth_order", 20, swept=3, predicted=0)
    assert price_of("smooth", "rlr_paper, zeroth_order", PRICES, run_of_zeroth_order) == 20 + 3 * 2 + 1.5


def test_runs_over_budget_are_named_and_failed_runs_rank_last():
    """A run that swept more steps than planned has spent more than its budget."""
    rows = [
        {**Cell("smooth", name, LEARNING_RATES[0], seed)._asdict(), "steps": 2, "predicted": 0.0, "swept": swept}
        for name, swept in (("rlr", 12.5), ("rlr, per_prompt", 11.5), ("ddpo", 20.0))
        for seed in (TUNING_SEED, *SEEDS[:2])
    ]
    for row in rows:
        row.update(final=float(row["seed"]), other=0.0, diversity=0.0, nearest_real=0.0)
    rows[-1]["final"] = -float("inf")
    settings = Settings(budget=65.0, batch_size=1, num_steps=20, num_images=4)
    table = summarize(rows)
    assert [row["estimator"] for row in table["smooth"]] == ["rlr", "rlr, per_prompt", "ddpo"]
    assert table["smooth"][0]["standard_error"] == 0.5
    curves = [{**row, "step": step, "reward_mean": step} for row in rows for step in (0.5, 1.5)]
    lines = findings(table, curves, rows, PRICES, settings)
    assert [line for line in lines if "over budget" in line] == ["smooth: rlr is over budget, 68.0 of 65 seconds"]
    reached = "smooth: rlr reaches the last training reward of ddpo after 0.762 of the compute"
    assert reached in lines  # step 1.5 at a price of 33


def test_findings_are_differences_with_standard_errors():
    finals = {"rlr": (2.0, 4.0), "full_bp": (1.0, 1.0), "alignprop": (5.0, 5.0)}
    row = {"learning_rate": LEARNING_RATES[0], "steps": 1, "predicted": 0.0, "swept": 1.0}
    row.update(other=0.0, diversity=0.0, nearest_real=0.0)
    rows = [
        {"reward": "rough", "estimator": name, "seed": seed, **row, "final": final}
        for name, values in finals.items()
        for seed, final in ((TUNING_SEED, 0.0), *zip(SEEDS, values))
    ]
    table = summarize(rows)
    assert [one["estimator"] for one in table["rough"]] == ["alignprop", "rlr", "full_bp"]
    assert findings(table, [], rows, PRICES, Settings(1e9, 1, 20, 4)) == [
        "rough: rlr minus alignprop is -2.0000, -2.0 standard errors",
        "rough: rlr minus full_bp is +2.0000, +2.0 standard errors",
    ]


def test_no_estimator_runs_under_two_names():
    """The default baseline has no row of its own; black boxes have no rows of estimators that need a gradient."""
    smooth, rough, black_box = (estimators_of(reward) for reward in ("smooth", "rough", "black box"))
    need_gradient = {"full_bp", "alignprop", "truncated_bp 1", "truncated_bp 5", "draft_lv"}
    assert set(ESTIMATORS) - set(smooth) == {"rlr, leave_one_out"} and set(rough) == set(ESTIMATORS)
    assert set(ESTIMATORS) - set(black_box) == {"rlr, predicted_x0", *need_gradient}


def test_seconds_until_a_curve_reaches_a_level():
    assert seconds_to(2.5, [1, 2, 3], [1.0, 2.0, 4.0]) == 2.25
    assert seconds_to(0.5, [1, 2, 3], [1.0, 2.0, 4.0]) == 1
    assert seconds_to(5.0, [1, 2, 3], [1.0, 2.0, 4.0]) is None


def test_the_sine_is_rough_and_its_mean_vanishes():
    images = torch.rand(512, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    values = fast_sine(images, None)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert values.mean().abs() < 0.1 and values.std().item() == pytest.approx(0.5**0.5, abs=0.05)
    slopes = gradient.flatten(1).norm(dim=1)
    assert 500 < slopes.mean() < 1000  # of the largest 1200, the mean of |cos| is .64
    signed = (gradient.flatten(1) @ gradient[0].flatten()).sign()
    assert signed.mean().abs() < 0.15  # the direction changes from image to image


def test_numbers_of_a_csv_file_are_read_exactly(tmp_path):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        file.write("# a header\n")
        csv.writer(file).writerows([("reward", "final"), ("smooth", repr(0.1 + 0.2))])
    assert read_csv(path) == [{"reward": "smooth", "final": 0.1 + 0.2}]


def test_the_learning_rate_is_the_best_on_the_tuning_seed():
    low, middle, high = LEARNING_RATES
    tried = [
        (low, 100, 1.0),
        (middle, 100, 3.0),
        (high, 100, 2.0),
        (2 * high, 100, 8.0),
        (high, 101, 9.0),
        (high, 0, 9.0),
    ]
    rows = [{**Cell("smooth", "rlr", *cell)._asdict(), "final": final} for *cell, final in tried]
    rows += [{**rows[0], "reward": "text"}]
    assert best_learning_rate(rows, "smooth", "rlr") == middle  # 2 * high is none of the three
    assert best_learning_rate(rows[4:], "smooth", "rlr") is None
    rows[1]["final"] = -float("inf")  # a failed run
    assert best_learning_rate(rows, "smooth", "rlr") == high
