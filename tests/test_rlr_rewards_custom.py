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

import importlib
import logging
import os
import sys

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

def meta(images, prompts):
    return red(images.to("meta"), prompts)

def leaves(images, prompts):
    import sys
    sys.exit(0)

def speechless(images, prompts):
    assert False

def in_a_library(images, prompts):
    return torch.nn.Sequential(Resize())(images)

class Resize(torch.nn.Module):
    def forward(self, images):
        return torch.nn.functional.interpolate(images, size=(8, 8, 8))

def large(images, prompts):
    if images.requires_grad:
        raise torch.OutOfMemoryError("none left")
    return red(images, prompts)

def larger(images, prompts):
    raise torch.OutOfMemoryError("none left")

class Brightness(torch.nn.Linear):
    def forward(self, images, prompts):
        return super().forward(images.mean((2, 3)))[:, 0]

class Dim(Brightness):
    def __init__(self):
        super().__init__(3, 1)

class Scale:
    def __init__(self, scale=2):
        self.scale = scale

    def __call__(self, images, prompts):
        return self.scale * red(images, prompts)

class Vague(Scale):
    differentiable = "yes"

class Unfit:
    pass

class Missing:
    def __init__(self):
        self.weights = open("/no/such/weights")

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
        ("Dim", True),
        ("Scale", True),
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
        ("fails", r"fails on two random images: KeyError: 'key' \(my_rewards.py, line 37: return {}\[\"key\"\]\)"),
        ("meta", "is not a reward: it returned a tensor on the device 'meta'"),
        ("detached", "says it is differentiable, but its scores have no gradient"),
        ("number", "has no callable 'number'"),
        ("missing:2", "has no callable 'missing'"),
        ("Brightness", "making an instance of the class without arguments fails: TypeError: .* missing 2 required"),
        ("Missing", r"without arguments fails: FileNotFoundError.*\(my_rewards.py, line \d+: self.weights = open\("),
        ("Unfit", "has no callable 'Unfit'"),
        ("Vague", "its attribute differentiable is 'yes', not True or False"),
        ("leaves", r"fails on two random images: SystemExit: 0 \(my_rewards.py, line \d+: sys.exit\(0\)\)"),
        ("speechless", r"fails on two random images: AssertionError \(my_rewards.py, line \d+: assert False\)"),
        (
            "in_a_library",
            r"ValueError: Input .* \(my_rewards.py, line \d+: return torch.nn.functional.interpolate\(images",
        ),
    ],
)
def test_invalid_custom_rewards_are_refused_when_loaded(name, problem, file):
    with pytest.raises(ValueError, match=problem) as error:
        load(f"{file}:{name}")
    assert repr(f"{file}:{name}") in str(error.value)


def test_modules_are_imported_and_import_errors_are_explained(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import not_there\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "unclosed.py").write_text("print(\n")
    (tmp_path / "two_lines.py").write_text("raise ValueError('one\\ntwo')\n")
    for package, code in (("package", ""), ("broken_package", "import not_there\n")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_module.py").write_text(CUSTOM)
    assert load("by_module:red")[1].differentiable
    for entry, problem in (
        ("os:system", "fails on two random images: TypeError"),
        ("os:getcwd", "fails on two random images: TypeError"),
        ("no_such_module:f:2", r"there is no module 'no_such_module' \(for a file, write no_such_module.py:f\)"),
        (f"{tmp_path}/no.py:f", "there is no file"),
        ("leaves:f", "cannot be imported: SystemExit: 0"),
        ("broken:f", r"No module named 'not_there' \(broken.py, line 1: import not_there\)"),
        (f"{tmp_path}/broken.py:f", r"No module named 'not_there' \(broken.py, line 1: import not_there\)"),
        ("package.inner:f", r"there is no module 'package.inner'"),
        ("broken_package.inner:f", r"No module named 'not_there' \(__init__.py, line 1: import not_there\)"),
        (
            f"{tmp_path}/unclosed.py:f",
            r"cannot be imported: SyntaxError: '\(' was never closed \(unclosed.py, line 1\)",
        ),
        (f"{tmp_path}/two_lines.py:f", "cannot be imported: ValueError: one two "),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            load(entry)
        assert repr(entry) in str(error.value) and "\n" not in str(error.value)


NEIGHBOURS = """
import helper

def f(images, prompts):
    import colorsys
    import helper as again
    from pack.inner import offset
    assert again is helper and colorsys.rgb_to_hsv(0, 0, 1)[2] == 1
    return images.mean((1, 2, 3)) * 0 + helper.value + offset
"""


def test_a_file_can_import_the_modules_beside_it(tmp_path, monkeypatch):
    """Here two files of the same name, with helpers of the same name, and a neighbour named like a module of Python."""
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    before = dict(sys.modules), list(sys.path), list(sys.meta_path)
    rewards = []
    for value in (1, 2):
        folder = tmp_path / str(value)
        (folder / "pack").mkdir(parents=True)
        (folder / "mine.py").write_text(NEIGHBOURS)
        (folder / "helper.py").write_text(f"value = {value}\n")
        (folder / "colorsys.py").write_text("raise RuntimeError('not the one of Python')\n")
        (folder / "pack" / "inner.py").write_text(f"offset = {10 * value}\n")
        rewards.append(load(f"{folder}/mine.py:f")[1])
    images = torch.rand(2, 3, 16, 16)
    for value, reward in enumerate(rewards, 1):
        assert reward(images, ["", ""]).tolist() == [11 * value] * 2
    new = sys.modules.keys() - before[0].keys()
    assert not {"helper", "pack", "pack.inner"} & new and (sys.path, sys.meta_path) == before[1:]


def test_a_failure_in_a_module_beside_the_file_names_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("import helper\n\ndef f(images, prompts):\n    return helper.f(images)\n")
    (tmp_path / "helper.py").write_text("def f(images):\n    return images.mean(7)\n")
    with pytest.raises(ValueError, match=r"IndexError: .* \(helper.py, line 2: return images.mean\(7\)\)$"):
        load(f"{tmp_path}/mine.py:f")
    (tmp_path / "bad.py").write_text("import torch\ntorch.ones(2).view(3)\n")
    (tmp_path / "other.py").write_text("import bad\n")
    with pytest.raises(ValueError, match=r"cannot be imported: .* \(bad.py, line 2: torch.ones\(2\).view\(3\)\)$"):
        load(f"{tmp_path}/other.py:f")


def test_a_file_may_be_named_by_a_relative_path(file, monkeypatch):
    monkeypatch.chdir(os.path.dirname(file))
    with pytest.raises(ValueError, match=r"KeyError: 'key' \(my_rewards.py, line 37: "):
        load("my_rewards.py:fails")
    assert load("my_rewards.py:red")[1].differentiable


BACKWARD = """
import torch

class Twice(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        from helper import factor
        Twice.calls += 1
        return grad * factor * [1, 1][Twice.calls - 1]

def f(images, prompts):
    return Twice.apply(images).mean((1, 2, 3))
"""


def test_a_failure_in_a_backward_pass_names_the_reward_and_the_line(tmp_path, caplog):
    (tmp_path / "mine.py").write_text(BACKWARD)
    with caplog.at_level(logging.INFO):
        assert not load(f"{tmp_path}/mine.py:f")[1].differentiable
    assert "fails in its backward pass on two random images: ModuleNotFoundError" in caplog.text
    assert "(mine.py, line 13: from helper import factor)" in caplog.text
    (tmp_path / "helper.py").write_text("factor = 2\n")
    importlib.invalidate_caches()  # of the folder's files
    rewards = load_rewards(parse_reward(f"{tmp_path}/mine.py:f"), {}, size=(16, 16))
    gradient = rewards(torch.rand(2, 3, 16, 16), ["", ""], with_gradient=True).gradient
    torch.testing.assert_close(gradient, torch.full((2, 3, 16, 16), 2 / (3 * 16 * 16)))
    line = r"\(mine.py, line 15: return grad \* factor \* \[1, 1\]\[Twice.calls - 1\]\)"
    with pytest.raises(ValueError, match=f"reward '.*mine.py:f' fails in its backward pass: IndexError: .* {line}"):
        rewards(torch.rand(2, 3, 16, 16), ["", ""], with_gradient=True)


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
    line = r"\(later.py, line 5: assert len\(calls\) < 3, 'no more'\)"
    with pytest.raises(ValueError, match=f"reward '.*later.py:f' fails: AssertionError: no more {line}"):
        rewards(torch.rand(2, 3, 16, 16), ["", ""])
