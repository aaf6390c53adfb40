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
"""Custom rewards: importing them, testing them on two random images, and the errors they can cause."""

import logging

import pytest
import torch
from reward_models import WeightedSum, load_reward, load_rewards, parse_reward


CUSTOM = """
import torch

def red(images, prompts):
    return images[:, 0].mean((1, 2))

def array(images, prompts):
    return torch.tensor(images.numpy().mean((1, 2, 3)))

def rounded(images, prompts):
    return images.round().mean((1, 2, 3))

def detached(images, prompts):
    return red(images, prompts).detach()
detached.differentiable = True

def declared(images, prompts):
    return red(images, prompts)
declared.differentiable = False

def writes(images, prompts):
    return images.mul_(0).sum((1, 2, 3))
writes.differentiable = False

class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

def without_backward(images, prompts):
    return NoBackward.apply(images).mean((1, 2, 3))

def mean(images, prompts):
    return images.mean()

def fails(images, prompts):
    return {}["key"]

def large(images, prompts):
    if images.requires_grad:
        raise torch.OutOfMemoryError("none left")
    return red(images, prompts)

def larger(images, prompts):
    raise torch.OutOfMemoryError("none left")

class Brightness(torch.nn.Linear):
    def forward(self, images, prompts):
        return super().forward(images.mean((2, 3)))[:, 0]

brightness = Brightness(3, 1)
number = 3
"""


def load(entry):
    """Load one custom reward. Returns its weight and the reward."""
    (member,) = load_rewards(parse_reward(entry), {}, size=(16, 16)).members.values()
    return member


@pytest.fixture
def file(tmp_path):
    (tmp_path / "my_rewards.py").write_text(CUSTOM)
    return str(tmp_path / "my_rewards.py")


@pytest.mark.parametrize(
    ("name", "differentiable"),
    [
        ("red", True),
        ("array", False),
        ("rounded", False),
        ("declared", False),
        ("brightness", True),
        ("red:2", True),
        ("without_backward", False),
    ],
)
def test_the_gradient_of_a_custom_reward_is_detected(name, differentiable, file, caplog):
    with caplog.at_level(logging.INFO):
        weight, reward = load(f"{file}:{name}")
    assert weight == (2 if name == "red:2" else 1)
    assert reward.differentiable is differentiable
    assert ("tried on two random images" in caplog.text) == (name != "declared")
    images = torch.rand(2, 3, 16, 16)
    scores = WeightedSum({"mine": (weight, reward)})(images, ["", ""], with_gradient=differentiable)
    assert (scores.gradient is not None) == differentiable
    if name.startswith("red"):
        torch.testing.assert_close(scores.total, weight * images[:, 0].mean((1, 2)))
    assert not any(p.requires_grad for p in reward.parameters())


@pytest.mark.parametrize("name", ["large", "larger"])
def test_running_out_of_memory_is_not_mistaken_for_a_black_box(name, file):
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        load(f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mean", r"is not a reward: it returned a tensor of shape \(\) instead of \(2,\)"),
        ("fails", r"fails on two random images: KeyError: 'key' \(my_rewards.py, line 3\d\)"),
        ("detached", "says it is differentiable, but its scores have no gradient"),
        ("number", "has no callable 'number'"),
        ("missing:2", "has no callable 'missing'"),
        ("Brightness", "fails on two random images: TypeError"),
    ],
)
def test_invalid_custom_rewards_are_refused_when_loaded(name, problem, file):
    with pytest.raises(ValueError, match=problem) as error:
        load(f"{file}:{name}")
    assert repr(f"{file}:{name}") in str(error.value)


def test_modules_are_imported_and_import_errors_are_explained(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import not_there\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_module.py").write_text(CUSTOM)
    assert load("by_module:red")[1].differentiable
    for entry, problem in (
        ("os:system", "fails on two random images: TypeError"),
        ("os:getcwd", "fails on two random images: TypeError"),
        ("no_such_module:f:2", r"there is no module 'no_such_module' \(for a file, write no_such_module.py:f\)"),
        (f"{tmp_path}/no.py:f", "there is no file"),
        ("leaves:f", "cannot be imported: SystemExit: 0"),
        ("broken:f", r"No module named 'not_there' \(broken.py, line 1\)"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            load(entry)
        assert repr(entry) in str(error.value)


def test_in_place_changes_do_not_reach_the_images(file):
    _, writes = load(f"{file}:writes")
    images = torch.rand(2, 3, 16, 16)
    kept = images.clone()
    WeightedSum({"writes": (1.0, writes), "jpeg": (1.0, load_reward("jpeg_compressibility"))})(images, ["", ""])
    assert torch.equal(images, kept)


def test_a_failure_during_training_names_the_reward_and_the_line(tmp_path):
    (tmp_path / "later.py").write_text(
        "calls = []\n\ndef f(images, prompts):\n    calls.append(1)\n    assert len(calls) < 3, 'no more'\n"
        "    return images.mean((1, 2, 3))\n"
    )
    rewards = load_rewards(parse_reward(f"{tmp_path}/later.py:f"), {}, size=(16, 16))
    with pytest.raises(ValueError, match=r"reward '.*later.py:f' fails: AssertionError: no more \(later.py, line 5\)"):
        rewards(torch.rand(2, 3, 16, 16), ["", ""])
