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
"""The study of frontiers: the reward that can be had while images stay what they are."""

import math
from pathlib import Path

import pytest
import torch
from bench_common import read_csv
from study import WIDEST, run, wider
from study_plan import COMPARISONS, ESTIMATORS, QUICK, fast_sine, work_of_image
from study_report import Cell, area, best_rates, findings, markdown, runs_of, score_at, summarize, work_to_reach


def rows_of(cell, run_points, scale_points=()):
    """Rows of points (work or scale, score, accuracy)."""
    rows = [("run", *point) for point in run_points] + [("scale", *point) for point in scale_points]
    keys = ("kind", "at", "score", "accuracy")
    return [{**cell._asdict(), **dict(zip(keys, row))} for row in rows]


CELL = Cell("smooth", "rlr", 1e-3, 0)


def test_the_score_is_the_highest_reward_with_the_accuracy_kept():
    """Between two points it is interpolated, where the accuracy falls and where it comes back."""
    rows = rows_of(CELL, [(0, 1.0, 1.0), (1, 3.0, 0.9), (2, 9.0, 0.1)])
    assert score_at(rows, 0.95) == pytest.approx(2.0)
    assert score_at(rows, 0.5) == pytest.approx(6.0)
    assert score_at(rows, 0.05) == 9.0 and score_at(rows, 1.0) == 1.0
    assert score_at(rows_of(CELL, [(0, 1.0, 1.0), (1, 5.0, 0.9), (2, 4.0, 1.0)]), 0.95) == pytest.approx(4.5)
    assert score_at(rows_of(CELL, [(0, 2.0, 0.8), (1, 1.0, 0.9)]), 0.95) == 2.0  # a run that only harms


def test_scales_of_the_adapter_count_between_the_base_model_and_beyond_the_end():
    along = [(0, 1.0, 1.0), (1, 9.0, 0.0)]
    rows = rows_of(CELL, along, [(1.25, 10.0, 0.0), (0.5, 6.0, 0.96)])
    assert score_at(rows, 0.95) == pytest.approx(6.0 + 0.01 / 0.96 * 3.0)
    assert score_at(rows, 0.0) == 10.0


def test_the_area_is_the_mean_of_the_frontier():
    rows = rows_of(CELL, [(0, 0.0, 1.0), (1, 10.0, 0.0)])
    assert area(rows) == pytest.approx(1.0)  # from 0 at 100 % to 2 at 80 %


def test_the_work_to_reach_a_reward_is_interpolated():
    rows = rows_of(CELL, [(0, 1.0, 1.0), (10, 3.0, 1.0), (20, 2.0, 1.0)])
    assert work_to_reach(rows, 2.0) == pytest.approx(5.0)
    assert work_to_reach(rows, 3.5) == math.inf and work_to_reach(rows, 1.0) == 0.0
    assert work_to_reach(rows_of(CELL, [(0, 1.0, 1.0), (10, 1.0, 1.0)]), 1.0) == 0.0
    assert work_to_reach(rows_of(CELL, [(0, 1.0, 1.0), (10, 0.5, 1.0)]), 1.0) == 0.0


def test_the_grid_grows_where_the_best_rate_is_at_its_end():
    assert wider([1e-3, 3e-3, 1e-2], 3e-3) == [1e-3, 3e-3, 1e-2]
    assert wider([1e-3, 3e-3, 1e-2], 1e-2) == [1e-3, 3e-3, 1e-2, 3e-2]
    assert wider([1e-3, 3e-3, 1e-2], 1e-3) == [1e-3, 3e-3, 1e-2, 3e-4]
    for end in WIDEST:
        assert wider([1e-3, end], end) == [1e-3, end]


def runs(estimator, ends, comparison="smooth"):
    """Rows of runs that end at these rewards {(rate, seed): reward}, with the accuracy kept."""
    return [
        row
        for (rate, seed), end in ends.items()
        for row in rows_of(Cell(comparison, estimator, rate, seed), [(0, 1.0, 1.0), (8, end, 1.0)])
    ]


def test_no_seed_has_a_part_in_the_choice_of_its_learning_rate():
    """Of the two best rates on the tuning seed, each seed takes the one that is better on the others."""
    ends = {(1e-3, 100): 1.5, (3e-3, 100): 3.0, (1e-2, 100): 4.0}
    ends |= {(3e-3, 0): 3.0, (1e-2, 0): 9.0, (3e-3, 1): 3.0, (1e-2, 1): 1.0, (1e-3, 0): 99.0}
    rows = runs("rlr", ends)
    assert best_rates(rows, "smooth", "rlr") == [1e-2, 3e-3, 1e-3] and best_rates(rows, "text", "rlr") == []
    # Without seed 0: 1e-2 has (4 + 1) / 2, 3e-3 has 3. Without seed 1: 1e-2 has (4 + 9) / 2.
    assert [(own[0]["learning_rate"], own[-1]["score"]) for own in runs_of(rows, "smooth", "rlr")] == [
        (3e-3, 3.0),
        (1e-2, 1.0),
    ]
    rows += runs("rlr", {(1e-2, 2): 5.0})  # its other run has not ended
    (line,) = summarize(rows, COMPARISONS)
    assert (line["score_at_95"], line["seeds"], line["learning_rate"]) == (2.0, 2, "0.003 or 0.01")
    assert line["error"] == pytest.approx(1.0)


def test_the_work_to_reach_a_rival():
    rows = runs("rlr", {(1e-2, 100): 4.0, (1e-2, 0): 3.0, (1e-2, 1): 5.0}) + runs(
        "ddpo", {(1e-2, 100): 2.0, (1e-2, 0): 2.0}
    )
    first, second = summarize(rows, COMPARISONS)
    assert (first["estimator"], second["estimator"]) == ("rlr", "ddpo")
    assert first["work_to_ddpo"] == pytest.approx(3.0)  # the mean of 4 and 2 is of two runs


def test_findings_are_differences_with_standard_errors():
    scores = {"rlr": (2.0, 4.0), "full_bp": (1.0, 1.0), "alignprop": (5.0, 5.0)}
    rows = []
    for name, ends in scores.items():
        for seed, end in ((100, 9.0), *enumerate(ends)):
            rows += rows_of(Cell("rough", name, 1e-3, seed), [(0, 1.0, 1.0), (8, end, 1.0)])
    table = summarize(rows, COMPARISONS)
    assert [row["estimator"] for row in table] == ["alignprop", "rlr", "full_bp"]
    assert findings(table) == [
        "rough: rlr minus alignprop is -2, -2.0 standard errors",
        "rough: rlr minus full_bp is +2, +2.0 standard errors",
    ]
    assert table[1]["work_to_alignprop"] == math.inf and table[0]["work_to_alignprop"] == 8.0


PRICES = {"forward": 1.0, "swept": 3.0, "score": 0.5, "gradient": 1.5}


@pytest.mark.parametrize(
    ("name", "estimator", "work"),
    [
        ("smooth", "full_bp", 20 + 20 * 3 + 1.5),
        # With a smooth reward, rlr sweeps three steps and on average half of the others.
        ("smooth", "rlr", 20 + (3 + 17 / 2) * 3 + 1.5),
        # With a rough one all, and it predicts where the likelihood ratio has a share in the last half: not at k = 1.
        ("rough", "rlr", 20 + 20 * 3 + 1.5 + 9 * 0.5),
        ("smooth", "ddpo", 20 + 20 * 3 + 0.5),
        ("smooth", "truncated_bp 5", 20 + 5 * 3 + 1.5),
        ("smooth", "alignprop", 20 + 10.5 * 3 + 1.5),
        ("terms", "rlr_paper", 20 + 3 * 3 + 1.5),
        ("terms", "neither", 20 + 3 + 1.5),
        ("T = 50", "ddpo", 50 + 50 * 3 + 0.5),
    ],
)
def test_work_of_an_image(name, estimator, work):
    assert work_of_image(name, estimator, PRICES, QUICK) == pytest.approx(work)


def test_work_of_a_black_box():
    prices = {**PRICES, "gradient": None}
    assert work_of_image("decision", "rlr", prices, QUICK) == 20 + 20 * 3 + 21 * 0.5
    assert work_of_image("decision", "ddpo", prices, QUICK) == 20 + 20 * 3 + 0.5


def test_comparisons_name_estimators_and_no_black_box_goes_to_one_that_needs_a_gradient():
    for name, comparison in COMPARISONS.items():
        assert set(comparison.estimators) <= set(ESTIMATORS)
        is_black_box = comparison.reward in (COMPARISONS[one].reward for one in ("decision", "file size"))
        prices = {**PRICES, "gradient": None if is_black_box else 1.5}
        for estimator in comparison.estimators:  # refused otherwise
            assert work_of_image(name, estimator, prices, QUICK) > comparison.num_steps


def test_the_fast_sine_is_nearly_all_of_the_gradient_and_none_of_the_mean():
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values = fast_sine(images, None)
    values.sum().backward()
    assert values.mean().abs() < 0.3 and images.grad.flatten(1).norm(dim=1).mean() > 100


def test_the_tables_of_the_documents_are_those_of_the_committed_figures():
    root = Path(__file__).resolve().parent.parent
    table = read_csv(root / "benchmarks" / "results" / "study.csv")
    text = (root / "docs" / "results.md").read_text(encoding="utf-8")
    for name in dict.fromkeys(row["comparison"] for row in table):
        assert "\n".join(markdown([row for row in table if row["comparison"] == name])) in text
    rows = read_csv(root / "benchmarks" / "results" / "study_points.csv")
    again = summarize(rows, COMPARISONS)
    for row, made in zip(table, again, strict=True):
        assert row["score_at_95"] == pytest.approx(made["score_at_95"]) and row["estimator"] == made["estimator"]


def test_quick_study_writes_points_table_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(COMPARISONS, "decision", COMPARISONS["decision"]._replace(num_steps=3))
    table = run(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert [row["estimator"] for row in table] == ["rlr"]
    assert {path.name for path in tmp_path.iterdir()} == {"study_points.csv", "study.csv", "study.png"}
    again = run(["--report", "--quick", "--out", str(tmp_path)])
    assert again[0]["score_at_95"] == table[0]["score_at_95"]
    assert "| `rlr` | 0.001 |" in capsys.readouterr().out
