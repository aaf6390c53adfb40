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
"""report.html of a run: one file of valid HTML that shows what the run has done."""

import base64
import json
import os
import re
from types import SimpleNamespace

import pytest
from rlr_reports import Page, pixels_of
from rlr_testing import ASSETS, ROOT, TINY_CLIP, train

from diffusers.utils import load_image


FLAGS = [
    "--reward",
    "aesthetic,clip_score:5",
    "--num_eval_images",
    "4",
    "--max_train_steps",
    "3",
    "--negative_prompt",
    "<b>",
]
HELD_OUT = ["--heldout_reward", "clip_score", "--heldout_steps", "1", "--num_heldout_images", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train(out, *FLAGS, *HELD_OUT, "--feature_model", TINY_CLIP)
    text = (out / "report.html").read_text(encoding="utf-8")
    return SimpleNamespace(folder=out, text=text, page=Page(text))


def test_the_report_is_valid_html(run):
    Page(run.text)  # refuses what is not
    assert 'lang="en"' in run.text and 'name="viewport"' in run.text


def test_it_needs_no_other_file_and_every_image_has_a_text(run):
    assert not run.page.links and len(run.page.images) == 2
    for image, name in zip(run.page.images, ("before_after.png", "reward_curve.png")):
        data = re.fullmatch("data:image/png;base64,(.+)", image["src"])[1]
        assert base64.b64decode(data) == (run.folder / name).read_bytes()
        assert len(image["alt"]) > 20


def test_its_table_has_the_results_of_the_comparison(run):
    results = json.loads((run.folder / "evaluation.json").read_text())
    rows = {row[0]: row[1:] for row in run.page.rows}
    assert list(rows) == ["reward", "aesthetic,clip_score:5", "held-out clip_score", "aesthetic", "clip_score"]
    expected = [results["base"]["mean"], results["tuned"]["mean"]]
    assert list(map(float, rows["aesthetic,clip_score:5"][:2])) == pytest.approx(expected, rel=1e-2)


def test_it_shows_command_and_settings_without_folders_of_this_machine(run):
    assert (
        "train_rlr_sd.py --reward aesthetic,clip_score:5 --gradient_estimator rlr" in run.text
        and "learning_rate: " in run.text
    )
    assert "y the held-out reward the last" in run.text or "the held-out reward scored" in run.text
    assert "--negative_prompt &#x27;&lt;b&gt;&#x27;" in run.text and "3 optimizer steps" in run.text
    assert ROOT not in run.text and ASSETS not in run.text and os.path.dirname(run.folder) not in run.text


def test_the_curves_have_the_members_and_the_held_out_reward(run):
    """Five panels: the sum, its two members, the held-out reward, and diversity."""
    height = load_image(str(run.folder / "reward_curve.png")).height
    assert height == pytest.approx(120 * (1.4 + 2.6 * 5), abs=2)


def test_a_run_without_a_comparison_has_its_curve(tmp_path):
    train(tmp_path, "--num_eval_images", "0", "--max_train_steps", "1")
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.images) == 1 and not page.rows


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_within_the_width_of_a_phone_and_of_a_desktop(tmp_path, run, width):
    pixels = pixels_of(run.folder / "report.html", tmp_path, width)
    assert (pixels.max(2) < 30).mean() > 0.01  # digits are drawn on black
    assert (pixels[:, -10:] > 250).all()  # nothing reaches the edge, where a page too wide is cut off
