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
"""`pip install .`: the packages, the scripts and their entry points work from any directory."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlr_utils", "diffusion_models", "reward_models", "rlr_training")
SCRIPTS = {
    "rlr-train-sd": "train_rlr_sd",
    "rlr-train-flow": "train_rlr_flow",
    "rlr-train-video": "train_rlr_video",
    "rlr-evaluate": "evaluate_rlr",
}
# Runs an installed script. Afterwards says where its modules are from, and which heavy ones have been imported.
RUN_SCRIPT = """
import json, runpy, sys

path, module = sys.argv[1:3]
sys.argv[:] = [path, "--help"]
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as stop:
    code = stop.code
names = (module, "rlr_training")
heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "matplotlib"} & sys.modules.keys()
print(json.dumps({"code": code, "files": [sys.modules[name].__file__ for name in names], "heavy": sorted(heavy)}))
"""


def project():
    import tomllib  # not above, where ruff would sort it by whether its target version of Python knows it

    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def requirements(name):
    """The lines of a requirements file, without comments."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def normalized(requirement):
    """A requirement as it can be compared: metadata order the versions and add the name of the extra."""
    name, versions, marker = re.fullmatch(r"([\w-]+)([^;]*)(;.*)?", requirement.replace(" ", "")).groups()
    marker = re.sub(r"(and)?extra==.*", "", (marker or "").lstrip(";").replace("'", '"'))
    return name, frozenset(filter(None, versions.split(","))), marker


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A folder into which a copy of the project is installed, without its dependencies."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("install")
    source, target = folder / "source", folder / "target"
    # The build writes beside its source.
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "assets", "*-output", "*.png")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--no-compile", "--target", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert built.returncode == 0, built.stderr
    return target


def test_all_modules_and_nothing_else_are_installed(target):
    modules = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    modules |= {Path(f"{script}.py") for script in SCRIPTS.values()}
    assert {path.relative_to(target) for path in target.rglob("*.py")} == modules
    names = {name.split("-")[0] for name in os.listdir(target)}
    assert names == {*PACKAGES, *(f"{script}.py" for script in SCRIPTS.values()), "bin", "rlr_diffusion"}


def test_the_metadata_are_complete(target):
    (distribution,) = importlib.metadata.distributions(path=[str(target)])
    metadata, declared = distribution.metadata, project()["project"]
    assert metadata["Name"] == "rlr-diffusion" and metadata["Version"] == declared["version"]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"] == declared["description"] and "# RLR" in metadata.get_payload()
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "ocr", "quantize", "serve", "wandb"}
    required = {extra: set() for extra in ("", "dev", "ocr", "quantize", "serve", "wandb")}
    for requirement in distribution.requires:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        required[extra[1] if extra else ""].add(normalized(requirement))
    assert required[""] == set(map(normalized, requirements("requirements.txt")))
    assert required["dev"] == set(map(normalized, declared["optional-dependencies"]["dev"]))
    assert required["quantize"] == {normalized("torchao>=0.15")}
    assert required["wandb"] == {normalized("wandb")}
    assert (target / f"rlr_diffusion-{declared['version']}.dist-info" / "licenses" / "LICENSE").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_entry_points_answer_from_another_directory_without_heavy_imports(target, tmp_path, script):
    command = [sys.executable, "-c", RUN_SCRIPT, str(target / "bin" / script), SCRIPTS[script]]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    text, _, report = run.stdout.strip().rpartition("\n")
    report = json.loads(report)
    assert report["code"] == 0 and report["heavy"] == []
    assert all(Path(file).is_relative_to(target) for file in report["files"])
    others = {"rlr-train-flow": "stabilityai/stable-diffusion-3.5-medium"}
    others["rlr-train-video"] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    model = others.get(script, "CompVis/stable-diffusion-v1-4")
    # Lines are also broken after a hyphen.
    assert "--pretrained_model_name_or_path" in text and f"Default:{model}" in "".join(text.split())


def test_the_dev_extra_is_requirements_dev():
    include, *added = requirements("requirements-dev.txt")
    assert include == "-r requirements.txt"
    extras = project()["project"]["optional-dependencies"]
    assert sorted(added) == sorted(extras["dev"])
    assert all(set(extra) <= set(extras["dev"]) for extra in extras.values())


def test_pyproject_names_all_packages_and_scripts():
    declared = project()
    assert declared["tool"]["setuptools"]["packages"] == list(PACKAGES)
    assert sorted(declared["tool"]["setuptools"]["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert declared["project"]["scripts"] == {name: f"{module}:cli" for name, module in SCRIPTS.items()}
