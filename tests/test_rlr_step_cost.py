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
import re

import memory
import pytest
import step_cost
import torch
from accelerate import Accelerator
from bench_networks import bundle
from rlr_testing import widened_norms
from rlr_training.memory import LiveBytes
from step_cost import Case, Step


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# python benchmarks/")
        return list(csv.DictReader(file))


def test_quick_step_cost_counts_calls_and_measures_time_and_memory(tmp_path, capsys, monkeypatch):
    all_groups, kept = step_cost.groups_of, ("estimators", "steps T")
    monkeypatch.setattr(step_cost, "groups_of", lambda args: {title: all_groups(args)[title] for title in kept})
    estimators = ["rlr", "full_bp", "truncated_bp", "draft_lv"]
    groups = step_cost.main(["--quick", "--out", str(tmp_path), "--estimators", *estimators])
    rows = {row["estimator"]: row for row in groups["estimators"][1]}
    assert list(rows) == estimators
    assert {name: row["unet_vjps_per_image"] for name, row in rows.items()} == {
        **{"rlr": 4, "full_bp": 4},
        **{"truncated_bp": 1, "draft_lv": 2},
    }
    assert all(row["ratio"] > 0.5 and 0 < row["utilisation"] for row in rows.values())
    # The work grows with the number of calls.
    assert (
        rows["rlr"]["tflop_per_image"] > rows["draft_lv"]["tflop_per_image"] > rows["truncated_bp"]["tflop_per_image"]
    )
    assert rows["draft_lv"]["step_mib"] > rows["truncated_bp"]["step_mib"] > 1
    printed = capsys.readouterr().out
    assert "memory of full_bp / memory of truncated_bp with K = 1, batch 2" in printed
    assert "at T = 8 / at T = 4" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"step_cost.csv", "step_cost.png"}
    assert len(rows_of(tmp_path / "step_cost.csv")) == sum(len(cases) for _, cases in groups.values())


def test_step_and_bare_calls_sweep_the_same_steps():
    networks = bundle(Accelerator(cpu=True), checkpointing=False)
    step = Step(networks, Case("rlr, sweep_fraction .5", 12, 4, 2, 32))
    seen = []
    hook = networks.unet.register_forward_pre_hook(
        lambda unet, args: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    step.run()
    own = seen[12:]  # after the rollout
    seen.clear()
    step.bare()
    hook.remove()
    assert sorted(own) == sorted(seen[12:])
    assert len(step.swept) == len(own) == 8  # 3, and of the other 9 on average 4.5


def test_bytes_are_counted_from_creation_to_release():
    with LiveBytes() as live:
        x = torch.zeros(1000, requires_grad=True)
        y = (x * 2).view(10, 100)  # a view takes no memory
        assert live.now == 8000
        z = y.exp()  # kept for its own backward
        del y
        assert live.now == 8000
        z.add_(1).detach_()
        del z
        assert (live.now, live.peak) == (4000, 12000)


def test_normalisations_under_autocast_are_float32_as_on_a_gpu():
    norm, x = torch.nn.GroupNorm(2, 4), torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        with widened_norms():
            assert norm(x).dtype == torch.float32
    with widened_norms():
        assert norm.bfloat16()(x).dtype == torch.bfloat16  # without autocast, as the decoder runs


def test_quick_memory_counts_every_phase(tmp_path, capsys, monkeypatch):
    # What is measured needs a process of its own, what is counted does not.
    elsewhere = memory.in_own_process
    monkeypatch.setattr(
        memory, "in_own_process", lambda call, *args: call(*args) if call is memory.count else elsewhere(call, *args)
    )
    rows = memory.main(["--quick", "--measure", "--num_inference_steps", "3", "--out", str(tmp_path)])
    assert [row["batch_size"] for row in rows] == [1, 2]
    one, two = rows
    assert two["sweep_gib"] == pytest.approx(2 * one["sweep_gib"], rel=0.1) and one["decode_gib"] == two["decode_gib"]
    assert one["sweep_truncated_gib"] < one["sweep_gib"] < 1.3 * one["sweep_truncated_gib"]
    assert one["rollout_gib"] < one["sweep_gib"] < one["peak_gib"]
    printed = capsys.readouterr().out
    measured, counted = re.search(r"full_bp, 3 steps.*: ([\d.]+) GiB measured, ([\d.]+) counted", printed).groups()
    assert 0.01 <= float(counted) <= float(measured) < 0.03  # the kernels have buffers of their own
    assert "12 GB" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"memory.csv", "memory.png"}
    assert len(rows_of(tmp_path / "memory.csv")) == 2
