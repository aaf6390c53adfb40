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
"""benchmarks/flow_estimators.py."""

import csv

from flow_estimators import QUICK, main


def test_quick_flow_estimators_run_once_and_report(tmp_path, capsys):
    rows = main(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert [row["estimator"] for row in rows] == QUICK
    printed = capsys.readouterr().out
    assert "1 optimizer steps of 16 images, T = 2" in printed and all(f"\n{name} " in printed for name in QUICK)
    with open(tmp_path / "flow_estimators.csv", encoding="utf-8") as file:
        assert next(file).startswith("# python benchmarks/flow_estimators.py --quick, ")
        assert [row["estimator"] for row in csv.DictReader(file)] == QUICK
    assert (tmp_path / "flow_estimators.png").stat().st_size > 5000
    # A second call finds all runs in the file.
    lines = (tmp_path / "flow_estimators.jsonl").read_text()
    assert main(["--quick", "--workers", "0", "--out", str(tmp_path)]) == rows
    assert (tmp_path / "flow_estimators.jsonl").read_text() == lines
