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
import reward_hacks
from reward_hacking import at_gain, early_stop, run


def test_quick_reward_hacking_measures_every_checkpoint(tmp_path, capsys):
    rows = run(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert [(row["variant"], row["step"]) for row in rows] == [
        (name, step) for name in ("rlr, KL .03", "truncated_bp") for step in (0, 1, 2)
    ]
    base = [row for row in rows if row["step"] == 0]
    assert base[0]["drift"] < 1e-6 and {**base[0], "variant": ""} == {**base[1], "variant": ""}
    assert all(row["nearest_real"] > 0 and row["diversity"] > 0 for row in rows)
    assert "one standard deviation of the base model's rewards" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"reward_hacking.csv", "reward_hacking.png"}


def test_variants_are_compared_at_the_same_gain():
    keys = ("diversity", "drift", "frechet_to_real", "nearest_real", "clip_score")
    rows = [{"step": 10 * i, "aesthetic": 5 + i, **dict.fromkeys(keys, 1 - i / 10)} for i in range(4)]
    figures = at_gain(rows, 1.5)
    assert figures["step"] == 15 and abs(figures["diversity"] - 0.85) < 1e-9
    assert at_gain(rows, 3.5) is None
    row, best = early_stop(rows, patience=2)
    assert row["step"] == 30 and best == 10


def test_quick_reward_hacks_draws_the_seeds_of_each_reward(tmp_path):
    (row,) = reward_hacks.run(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert row["variant"] == "aesthetic, floor" and 0 <= row["accuracy_tuned"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"reward_hacks.csv", "reward_hacks.png"}
