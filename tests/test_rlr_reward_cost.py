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
import pytest
import reward_sizes
from reward_cost import main


def test_quick_reward_cost_measures_every_reward(tmp_path, capsys):
    rows = main(["--quick", "--out", str(tmp_path)])
    names = {"aesthetic", "clip_score", "pickscore", "hpsv2", "imagereward"}
    assert {(row["reward"], row["what"]) for row in rows} == {
        (n, w) for n in names for w in ("score", "score + gradient")
    }
    assert all(row["ratio"] > 0 and row["reward_seconds"] > 0 and row["reward_mib"] >= 0 for row in rows)
    assert "imagereward" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"reward_cost.csv", "reward_cost.png"}


def test_sizes_are_those_of_the_classes_that_are_loaded(tmp_path):
    """A published CLIP ViT-L/14 has 427,616,513 parameters."""
    (row,) = reward_sizes.run(["--quick", "--out", str(tmp_path)])
    assert row["reward"] == "aesthetic" and row["million_parameters"] == 427.6
    assert row["gib"] == pytest.approx(427_616_513 * 4 / 2**30, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"reward_sizes.csv"}
