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
"""Sums that behave: normalized rewards, and floors."""

import json
import math

import pytest
import torch
from reward_models import Floor, load_rewards, parse_reward, parse_reward_floors
from reward_models.base import WeightedSum
from rlr_testing import TINY_AESTHETIC, TINY_CLIP, same_adapter, train
from rlr_training.units import DECAY, RewardUnits
from train_rlr_sd import parse_args


PATHS = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP}
PROMPTS = ["a red seven", "a blue two", "a cyan nine"]


def a_sum(text="aesthetic:2,clip_score:3,jpeg_compressibility"):
    return load_rewards(parse_reward(text), PATHS, size=(32, 32))


def test_the_sum_and_its_gradient_are_those_of_the_formula():
    rewards, images = a_sum(), torch.rand(3, 3, 32, 32)
    plain = rewards(images, PROMPTS, with_gradient=True)
    a, c, j = plain.members.values()
    rewards.normalized, rewards.units = True, {"aesthetic": 0.5, "clip_score": 4.0, "jpeg_compressibility": 0.1}
    middle = c.median().item()  # one image is above it
    rewards.floors = {"clip_score": Floor(middle, 7.0), "jpeg_compressibility": Floor(j.max().item() + 1, 2.0)}
    result = rewards(images, PROMPTS, with_gradient=True)
    below = middle - c.clamp(max=middle)
    expected = 2 * a / 0.5 + 3 * c / 4 - 7 * below / 4
    torch.testing.assert_close(result.differentiable, expected)
    torch.testing.assert_close(result.black_box, j / 0.1 - 2 * (j.max() + 1 - j) / 0.1)
    assert all(torch.equal(result.members[name], plain.members[name]) for name in plain.members)
    gradients = [a_sum(one)(images, PROMPTS, with_gradient=True).gradient for one in ("aesthetic", "clip_score")]
    slope = 3 / 4 + 7 / 4 * (c < middle)
    expected = 2 / 0.5 * gradients[0] + slope.view(-1, 1, 1, 1) * gradients[1]
    torch.testing.assert_close(result.gradient, expected, rtol=1e-4, atol=1e-7)
    assert 0 < (c < middle).sum() < 3


def test_floors_make_a_random_chunk_of_frames_no_estimate():
    rewards = load_rewards(parse_reward("aesthetic"), PATHS, size=(32, 32, 3))
    assert rewards.mean_over_frames
    rewards.floors = {"aesthetic": Floor(1.0, 1.0)}
    assert not rewards.mean_over_frames


def test_units_are_running_deviations_of_earlier_steps():
    rewards = WeightedSum({"a": (1.0, None), "b": (1.0, None)})
    units = RewardUnits(rewards, [])
    assert rewards.units == {"a": 1.0, "b": 1.0}
    batches = [torch.randn(8, generator=torch.Generator().manual_seed(i)) * 3 + i for i in range(4)]
    mean, variance = batches[0].mean().item(), batches[0].var(correction=0).item()
    for i, batch in enumerate(batches):
        line = {
            "num_images": 8,
            "a_mean": batch.mean().item(),
            "a_std": batch.std().item(),
            "b_mean": 5.0,
            "b_std": 0.0,
        }
        units.update(line)
        if i:
            difference = batch.mean().item() - mean
            mean += (1 - DECAY) * difference
            variance = DECAY * variance + (1 - DECAY) * (batch.var(correction=0).item() + difference**2)
        assert rewards.units["a"] == pytest.approx(math.sqrt(variance), rel=1e-5)
        assert rewards.units["b"] == 1.0  # all alike so far
    again = RewardUnits(WeightedSum({"a": (1.0, None), "b": (1.0, None)}), [])
    again.load_state_dict(json.loads(json.dumps(units.state_dict())))
    assert again.rewards.units == rewards.units


@pytest.mark.parametrize(
    ("entry", "floor"),
    [
        ("clip_score:.25", {"clip_score": (0.25, 10.0)}),
        ("hpsv2.1:-0.5:3", {"hpsv2.1": (-0.5, 3.0)}),
        ("a/b.py:sharp:1e-3", {"a/b.py:sharp": (0.001, 10.0)}),
        ("a/b.py:sharp:1:2", {"a/b.py:sharp": (1.0, 2.0)}),
    ],
)
def test_floors_are_parsed(entry, floor):
    assert parse_reward_floors([entry]) == floor


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (["clip_score"], "'clip_score' is not of the form NAME:VALUE or NAME:VALUE:WEIGHT"),
        (["clip_score:high"], "is not of the form"),
        (["clip_score:nan"], "is not of the form"),
        (["clip_score:1:0"], "the weight must be above 0"),
        (["clip_score:1", "clip_score:2"], "repeat a name"),
    ],
)
def test_bad_floors_are_refused(entries, problem):
    with pytest.raises(ValueError, match=problem):
        parse_reward_floors(entries)


def test_a_floor_of_a_reward_that_is_not_scored_is_refused(capsys):
    for flags in (
        ["--reward_floor", "clip_score:1"],
        ["--reward_floor", "pickscore:1", "--heldout_reward", "clip_score"],
    ):
        with pytest.raises(SystemExit):
            parse_args(flags)
        assert "is neither in --reward nor in --heldout_reward" in capsys.readouterr().err


FLAGS = [
    *("--reward", "aesthetic,jpeg_compressibility:0.5", "--reward_normalize", "--reward_floor", "clip_score:0.2:5"),
    *(
        "--heldout_reward",
        "clip_score",
        "--num_heldout_images",
        "4",
        "--heldout_steps",
        "10",
        "--feature_model",
        TINY_CLIP,
    ),
    *("--checkpointing_steps", "2"),
]


def test_units_are_kept_in_checkpoints_and_the_held_out_floor_is_a_member(tmp_path):
    """The resumed run ends in the adapter of the run in one go; the first step has units of its own images' kind."""
    whole = train(tmp_path / "whole", *FLAGS, "--max_train_steps", "4")
    train(tmp_path / "parts", *FLAGS, "--max_train_steps", "2")
    parts = train(tmp_path / "parts", *FLAGS, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert same_adapter(tmp_path / "whole", tmp_path / "parts")
    assert [line["reward_mean"] for line in whole] == [line["reward_mean"] for line in parts]
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "rlr_state.json").read_text())["reward_units"]
    assert set(state["variance"]) == {"aesthetic", "jpeg_compressibility", "clip_score"}
    line = whole[2]  # of which the units are those after two steps
    unit = {name: math.sqrt(value) for name, value in state["variance"].items()}
    sums = (
        line["aesthetic_mean"] / unit["aesthetic"]
        + 0.5 * line["jpeg_compressibility_mean"] / unit["jpeg_compressibility"]
    )
    if line["clip_score_mean"] + line["clip_score_std"] < 0.2:  # all are below the floor
        assert line["reward_mean"] == pytest.approx(
            sums - 5 * (0.2 - line["clip_score_mean"]) / unit["clip_score"], rel=1e-4
        )
    assert line["reward_mean"] <= sums + 1e-6
    assert (tmp_path / "whole" / "reward_curve.png").stat().st_size > 20_000


@pytest.mark.parametrize("value", [0.1, 5.3, 0.9, 1e4])
def test_the_rounding_of_equal_scores_is_no_unit(value):
    rewards = WeightedSum({"a": (1.0, None)})
    scores = torch.full((16,), value)
    RewardUnits(rewards, []).update({"num_images": 16, "a_mean": scores.mean().item(), "a_std": scores.std().item()})
    assert rewards.units == {"a": 1.0}


def test_held_out_figures_and_the_comparison_are_of_the_plain_sum(tmp_path):
    """Whose values do not move with the units, nor with a floor."""
    flags = [*FLAGS[:-8], "--heldout_reward", "clip_score", "--num_heldout_images", "4", "--heldout_steps", "1"]
    flags += [
        "--feature_model",
        TINY_CLIP,
        "--learning_rate",
        "1e-12",
        "--max_train_steps",
        "3",
        "--num_eval_images",
        "4",
    ]
    lines = train(tmp_path / "out", *flags)
    first, *others = (line["heldout_trained_mean"] for line in lines)
    assert others == pytest.approx([first] * 2, rel=1e-5)
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    members = results["members"]
    plain = members["aesthetic"]["base"]["mean"] + 0.5 * members["jpeg_compressibility"]["base"]["mean"]
    assert results["base"]["mean"] == pytest.approx(plain, rel=1e-5) and "clip_score" in members


def test_a_held_out_reward_with_a_floor_is_loaded_once():
    rewards, held = a_sum("aesthetic"), a_sum("clip_score:2")
    rewards.set_floor("clip_score", Floor(0.5, 3.0), held)
    rewards.set_floor("aesthetic", Floor(1.0, 2.0))
    assert rewards.members["clip_score"] == (0.0, held.members["clip_score"][1])
    assert rewards.floors == {"clip_score": (0.5, 3.0), "aesthetic": (1.0, 2.0)} and rewards.units["clip_score"] == 1.0
