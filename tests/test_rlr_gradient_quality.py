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
import os
import signal
import subprocess
import sys
import time

import gradient_quality
import pytest
from gradient_quality import KINDS, estimators_for, main, measure_toy
from rlr_testing import ROOT


def test_bias_and_variance_on_the_closed_form():
    """Unbiased estimators pass a z-test that truncated ones fail. Baselines and mixing reduce the variance of REINFORCE."""
    rows = {row["estimator"]: row for row in measure_toy(0, batches=256, batch_size=128)}
    biased = ("truncated_bp 1", "truncated_bp 5", "alignprop")
    for name, row in rows.items():
        assert row["max_z"] > 20 if name in biased else row["max_z"] < 5, row
    variance = {name: row["variance"] for name, row in rows.items()}
    reinforce = variance["ddpo, leave-one-out"]
    assert variance["ddpo, no baseline"] > 3 * reinforce
    assert reinforce > 6 * variance["rlr .9, leave-one-out"]
    assert variance["rlr_paper, zeroth order"] > 100 * reinforce


def test_quick_gradient_quality_measures_all_rewards(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gradient_quality, "QUICK", {**gradient_quality.QUICK, "draws": 2, "truth_draws": 1})
    toy, rows = main(["--quick", "--workers", "0", "--out", str(tmp_path)])
    names = [(kind, name) for kind in KINDS for name in estimators_for(4, kind)]
    assert [(row["reward"], row["estimator"]) for row in rows] == names
    printed = capfd.readouterr().out
    assert all(row["estimator"] in printed for row in toy + rows)
    with open(tmp_path / "gradient_quality.csv") as file:
        assert next(file).startswith("# python benchmarks/gradient_quality.py --quick")
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "gradient_quality.png").stat().st_size > 10_000


def test_costs_are_the_calls_of_the_network_and_the_scored_images():
    """Forward passes of a chain of 20 steps; a swept step takes 2.23, and here an image takes as long as two."""
    costs = {kind: {name: one.cost(2.0) for name, one in estimators_for(20, kind).items()} for kind in KINDS}
    smooth, black_box = costs["smooth"], costs["black box"]
    everything = pytest.approx(20 + 2.23 * 20)
    assert smooth["full_bp"] == smooth["ddpo, no baseline"] == smooth["rlr_paper, likelihood ratio"] == everything
    assert smooth["rlr, predicted x0"] == black_box["ddpo, predicted x0"] == pytest.approx(20 + 2.23 * 20 + 20 * 2)
    assert smooth["rlr, sweep_fraction 0.5"] == pytest.approx(20 + 2.23 * (3 + 17 / 2))
    assert smooth["rlr_paper, zeroth order"] == pytest.approx(20 + 2.23 * 3)
    assert (smooth["truncated_bp 1"], smooth["truncated_bp 5"]) == pytest.approx((20 + 2.23, 20 + 2.23 * 5))
    assert smooth["alignprop"] == pytest.approx(20 + 2.23 * 21 / 2)
    assert smooth["draft_lv 2"] == pytest.approx(20 + 2.23 * 2)
    assert black_box["branches 2"] == pytest.approx(20 + 1 + 2 * 19 + 2.23 + 2 * 2 * 2)


def test_workers_end_when_the_benchmark_is_killed(tmp_path):
    code = (
        "import os, time\n"
        "from bench_common import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    pool = worker_pool(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    script = tmp_path / "long_work.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "benchmarks")}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlives the benchmark")
