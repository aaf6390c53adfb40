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
"""The notebook runs from its first cell to its last, here with one short step."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from rlr_testing import ROOT, forget_accelerator


NOTEBOOK = Path(ROOT, "notebooks", "quickstart.ipynb")
SIZES = {"num_inference_steps=20": "num_inference_steps=2", '"20"': '"2"', '"16"': '"2"'}


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code_of(cells):
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def shorter(code, folder):
    """A cell with fewer steps and images, that writes into another folder."""
    code = re.sub(r"STEPS, NUM_IMAGES, OUTPUT = .*", f"STEPS, NUM_IMAGES, OUTPUT = 4, 2, {str(folder)!r}", code)
    code = code.replace("FLAGS = [", 'FLAGS = [*("--num_heldout_images", "4"),')
    for long, short in SIZES.items():
        code = code.replace(long, short)
    return code


def run(code, scope):
    """Run a cell; returns the value of its last line if that is an expression, as a notebook shows it."""
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), scope)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), scope) if last else None


def test_the_notebook_has_eight_cells_that_a_reader_can_follow(cells):
    assert len(cells) == 8 and cells[0]["cell_type"] == "markdown"
    assert all(code.startswith("# ") and max(map(len, code.splitlines())) <= 130 for code in code_of(cells))


def test_the_notebook_runs(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.join(ROOT, "notebooks"))  # where Jupyter starts
    forget_accelerator()
    scope, shown = {}, []
    for code in code_of(cells):
        shown.append(run(shorter(code, tmp_path / "out"), scope))
    images = [value for value in shown if isinstance(value, Image.Image)]
    assert len(images) == 5 and images[0].size == (512, 128)
    assert images[0].tobytes() != images[3].tobytes()  # the adapter changes them
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4
    assert len((tmp_path / "out-colors" / "metrics.jsonl").read_text().splitlines()) == 1
