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

import pytest
from frontier import WIDEST, run, wider
from frontier_report import Cell, area, best_rate, score_at, summarize, work_to_reach


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
    assert work_to_reach(rows, 3.5) == math.inf


def test_the_grid_grows_where_the_best_rate_is_at_its_end():
    assert wider([1e-3, 3e-3, 1e-2], 3e-3) == [1e-3, 3e-3, 1e-2]
    assert wider([1e-3, 3e-3, 1e-2], 1e-2) == [1e-3, 3e-3, 1e-2, 3e-2]
    assert wider([1e-3, 3e-3, 1e-2], 1e-3) == [1e-3, 3e-3, 1e-2, 3e-4]
    for end in WIDEST:
        assert wider([1e-3, end], end) == [1e-3, end]


def test_the_table_is_of_seeds_that_nothing_was_chosen_on():
    rows = []
    for rate, seed, end in ((1e-3, 100, 2.0), (1e-2, 100, 4.0), (1e-2, 0, 3.0), (1e-2, 1, 5.0), (1e-3, 0, 9.0)):
        rows += rows_of(Cell("smooth", "rlr", rate, seed), [(0, 1.0, 1.0), (8, end, 1.0)])
    rows += rows_of(Cell("smooth", "ddpo", 1e-2, 100), [(0, 1.0, 1.0), (8, 2.0, 1.0)])
    rows += rows_of(Cell("smooth", "ddpo", 1e-2, 0), [(0, 1.0, 1.0), (8, 2.0, 1.0)])
    assert best_rate(rows, "smooth", "rlr") == 1e-2 and best_rate(rows, "text", "rlr") is None
    first, second = summarize(rows, ["smooth", "text"], ["ddpo", "rlr"])
    assert (first["estimator"], first["score_at_95"], first["seeds"]) == ("rlr", 4.0, 2)
    assert first["error"] == pytest.approx(1.0) and second["estimator"] == "ddpo"
    assert first["work_to_ddpo"] == pytest.approx(3.0)  # the mean of 4 and 2 is of two runs


def test_quick_frontier_writes_points_table_and_plot(tmp_path, capsys):
    table = run(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert [row["estimator"] for row in table] == ["rlr"]
    assert {path.name for path in tmp_path.iterdir()} == {"frontier_points.csv", "frontier.csv", "frontier.png"}
    again = run(["--report", "--quick", "--out", str(tmp_path)])
    assert again[0]["score_at_95"] == table[0]["score_at_95"]
    assert "at 95 %" in capsys.readouterr().out
