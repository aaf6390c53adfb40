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
"""benchmarks/video_estimators.py."""

import csv

import pytest
from video_estimators import CASES, main, work_of


def test_the_quick_study_runs_once_and_reports(tmp_path, capsys):
    rows = main(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert [row["estimator"] for row in rows] == ["rlr, smooth", "vader, rough"]
    assert all(
        0 <= row["digits"] <= 1 and row["motion_kept"] > 0 and len(row["rewards"]) == row["steps"] for row in rows
    )
    printed = capsys.readouterr().out
    assert "the work of 1 steps of rlr with 16 videos, T = 5" in printed and "\nvader, rough " in printed
    with open(tmp_path / "video_estimators.csv", encoding="utf-8") as file:
        assert next(file).startswith("# python benchmarks/video_estimators.py --quick, ")
        assert [row["estimator"] for row in csv.DictReader(file)] == ["rlr, smooth", "vader, rough"]
    assert (tmp_path / "video_estimators.png").stat().st_size > 5000
    # A second call finds all runs in the file.
    lines = (tmp_path / "video_estimators.jsonl").read_text()
    assert main(["--quick", "--workers", "0", "--out", str(tmp_path)]) == rows
    assert (tmp_path / "video_estimators.jsonl").read_text() == lines


def test_the_work_of_a_step_is_counted():
    """By hand at T = 10: ten forward passes, and 2.23 for each step that is swept."""
    expected = {"rlr": 10 + 2.23 * (3 + 7 / 2), "alignprop": 10 + 2.23 * 5.5, "vader": 10 + 2.23, "ddpo": 10 + 22.3}
    expected["truncated_bp 5"] = 10 + 2.23 * 5
    for case in CASES:
        assert work_of(case, 10) == pytest.approx(expected[case.rpartition(", ")[0]], rel=1e-3)
