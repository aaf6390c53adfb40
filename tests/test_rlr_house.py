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
"""The rules of the house, read from the source: who imports whom, and how long files and functions are."""

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
# What each package may import of the other packages. Scripts may import all of them.
PACKAGES = {
    "rlr_utils": set(),
    "reward_models": set(),
    "diffusion_models": {"rlr_utils"},
    "rlr_training": {"rlr_utils", "reward_models", "diffusion_models"},
}
# Third-party packages that rlr_utils may import.
RLR_UTILS_NEEDS = {"torch", "diffusers"}
# What `pip install` leaves out.
NOT_INSTALLED = {"tests", "tools", "benchmarks"}
MAX_FUNCTION, MAX_FILE, MAX_TRAINING_SCRIPT, MAX_PARAMETERS = 60, 400, 350, 10


def scripts_of(root):
    """The names of the scripts, without .py."""
    return {path.stem for path in root.glob("*.py")}


def source_files(root):
    """Scripts and the modules of the packages."""
    files = sorted(root.glob("*.py"))
    for package in PACKAGES:
        files += sorted((root / package).rglob("*.py"))
    return files


def imports_of(tree):
    """(line, dotted name, names taken from it) of all absolute imports, also those in functions and by `import_module`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
                found.append((node.lineno, name, []))
    return found


def broken_rule(home, name, taken, root):
    """The rule that forbids the module or package `home` to import `name`, or `None`."""
    top, in_package = name.partition(".")[0], home in PACKAGES
    if top == home:
        return None
    if top in scripts_of(root):
        return "a package imports no script" if in_package else "a script imports no other script"
    if top in NOT_INSTALLED or (root / "tests" / f"{top}.py").is_file():
        return "scripts and packages import nothing of tests, tools or benchmarks"
    if in_package and top in PACKAGES and top not in PACKAGES[home]:
        return f"{home} may import of our packages only {', '.join(sorted(PACKAGES[home])) or 'itself'}"
    if home == "rlr_utils":
        if top == "diffusers" and not (taken and all(one.endswith("Scheduler") for one in taken)):
            return "rlr_utils imports the schedulers of diffusers only"
        if top not in RLR_UTILS_NEEDS | sys.stdlib_module_names or top == "argparse":
            return "rlr_utils is plain torch, without libraries of training or a command line"
    return None


def broken_import_rules(root):
    """A message for each import that the rules forbid."""
    messages = []
    for path in source_files(root):
        home = path.relative_to(root).parts[0].removesuffix(".py")
        for line, name, taken in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            rule = broken_rule(home, name, taken, root)
            if rule is not None:
                messages.append(f"{path.relative_to(root)}, line {line}: imports {name}, and {rule}")
    return messages


def is_parser(function):
    """Whether a function describes flags, one after the other, and may be long."""
    return function.name == "parse_args" or function.name.startswith("add_") and function.name.endswith("_flags")


def broken_limits(root):
    """A message for each file, function and parameter list that is too long."""
    messages = []
    for path in source_files(root):
        text, shown = path.read_text(encoding="utf-8"), path.relative_to(root)
        is_training_script = path.parent == root and path.name.startswith("train_rlr_")
        limit, lines = MAX_TRAINING_SCRIPT if is_training_script else MAX_FILE, len(text.splitlines())
        if lines > limit:
            messages.append(f"{shown} has {lines} lines: at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            where = f"{shown}, line {node.lineno}: {node.name}"
            lines = node.end_lineno - min([node.lineno, *(one.lineno for one in node.decorator_list)]) + 1
            if lines > MAX_FUNCTION and not is_parser(node):
                messages.append(f"{where} has {lines} lines: at most {MAX_FUNCTION}")
            arguments = node.args
            parameters = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            parameters += (arguments.vararg is not None) + (arguments.kwarg is not None)
            if parameters > MAX_PARAMETERS and node.name != "__init__":
                messages.append(f"{where} has {parameters} parameters: at most {MAX_PARAMETERS}")
    return messages


def test_imports_go_from_scripts_to_packages_only():
    messages = broken_import_rules(ROOT)
    assert not messages, "\n".join(messages)


def test_files_functions_and_parameter_lists_are_short():
    messages = broken_limits(ROOT)
    assert not messages, "\n".join(messages)


def test_every_package_and_script_is_covered():
    """A new package or script must be named here."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(PACKAGES)
    assert scripts_of(ROOT) >= {"train_rlr_sd", "evaluate_rlr"}
    assert all(name.startswith(("train_rlr_", "evaluate_rlr")) for name in scripts_of(ROOT))


def copy_of_source(folder):
    for path in source_files(ROOT):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    (folder / "tests").mkdir()
    (folder / "tests" / "rlr_testing.py").touch()
    return folder


LONG_FUNCTION = "def long():\n" + "    x = 1\n" * MAX_FUNCTION
WIDE_FUNCTION = f"def wide({', '.join(f'p{i}' for i in range(MAX_PARAMETERS - 1))}, *, q, **others):\n    pass\n"


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("evaluate_rlr.py", "from train_rlr_sd import main", "imports train_rlr_sd, and a script imports no other"),
        ("rlr_training/run.py", "import train_rlr_sd", "imports train_rlr_sd, and a package imports no script"),
        ("rlr_training/run.py", "def f():\n    import evaluate_rlr", "imports evaluate_rlr, and a package imports no"),
        ("rlr_training/run.py", "from rlr_testing import train", "nothing of tests, tools or benchmarks"),
        (
            "diffusion_models/base.py",
            "import reward_models.clip",
            "diffusion_models may import of our packages only rlr_u",
        ),
        (
            "diffusion_models/base.py",
            "from rlr_training import run",
            "diffusion_models may import of our packages only",
        ),
        (
            "reward_models/clip.py",
            "from diffusion_models import base",
            "reward_models may import of our packages only its",
        ),
        ("reward_models/clip.py", "import rlr_utils", "reward_models may import of our packages only itself"),
        (
            "rlr_utils/chain.py",
            "from diffusion_models import base",
            "rlr_utils may import of our packages only itself",
        ),
        (
            "rlr_utils/chain.py",
            "def f():\n    from peft import LoraConfig",
            "imports peft, and rlr_utils is plain torch",
        ),
        ("rlr_utils/chain.py", "import accelerate.utils", "imports accelerate.utils, and rlr_utils is plain torch"),
        ("rlr_utils/chain.py", "import argparse", "imports argparse, and rlr_utils is plain torch"),
        ("rlr_utils/chain.py", "__import__('transformers')", "imports transformers, and rlr_utils is plain torch"),
        (
            "rlr_utils/chain.py",
            "importlib.import_module('datasets')",
            "imports datasets, and rlr_utils is plain torch",
        ),
        ("rlr_utils/chain.py", "from diffusers import DiffusionPipeline", "schedulers of diffusers only"),
        ("rlr_utils/chain.py", "import diffusers", "schedulers of diffusers only"),
    ],
    ids=lambda value: value.splitlines()[-1].strip(),
)
def test_a_forbidden_import_is_found_and_named(tmp_path, file, line, message):
    root = copy_of_source(tmp_path)
    with open(root / file, "a", encoding="utf-8") as opened:
        opened.write(f"\n{line}\n")
    (found,) = broken_import_rules(root)
    number = len((root / file).read_text(encoding="utf-8").splitlines())
    assert found.startswith(f"{file.replace('/', os.sep)}, line {number}: ") and message in found


@pytest.mark.parametrize(
    "line",
    [
        "from diffusers import DDIMScheduler",
        "from rlr_utils.sweep import Schedule",
        "from .sweep import Schedule",
        "import math",
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path, line):
    root = copy_of_source(tmp_path)
    with open(root / "rlr_utils" / "chain.py", "a", encoding="utf-8") as opened:
        opened.write(f"\n{line}\n")
    assert broken_import_rules(root) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("rlr_utils/kl.py", LONG_FUNCTION, f"long has {MAX_FUNCTION + 1} lines: at most {MAX_FUNCTION}"),
        ("rlr_utils/kl.py", "@cached\n" + LONG_FUNCTION[:-10], f"long has {MAX_FUNCTION + 1} lines"),
        ("train_rlr_sd.py", WIDE_FUNCTION, f"wide has {MAX_PARAMETERS + 1} parameters: at most {MAX_PARAMETERS}"),
        ("reward_models/jpeg.py", "\n" * MAX_FILE, f" lines: at most {MAX_FILE}"),
        ("train_rlr_sd.py", "\n" * (MAX_TRAINING_SCRIPT - 100), f" lines: at most {MAX_TRAINING_SCRIPT}"),
    ],
    ids=["function", "decorated function", "parameters", "file", "training script"],
)
def test_what_is_too_long_is_found_and_named(tmp_path, file, text, message):
    root = copy_of_source(tmp_path)
    with open(root / file, "a", encoding="utf-8") as opened:
        opened.write(text)
    (found,) = broken_limits(root)
    assert found.startswith(file.replace("/", os.sep)) and message in found


def test_parsers_may_be_long_and_constructors_may_take_many_settings(tmp_path):
    root = copy_of_source(tmp_path)
    constructor = WIDE_FUNCTION.replace("wide", "__init__")
    text = "".join(LONG_FUNCTION.replace("long", name) for name in ("parse_args", "add_model_flags")) + constructor
    (root / "rlr_training" / "flags.py").write_text(text, encoding="utf-8")
    assert broken_limits(root) == []
