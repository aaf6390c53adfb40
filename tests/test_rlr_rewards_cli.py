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
"""Scoring image files: `python -m reward_models` and `reward_models.images`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import REWARDS, load_reward
from reward_models.__main__ import main, parse_args
from reward_models.images import read_image
from rlr_testing import ROOT, TINY_AESTHETIC, TINY_CLIP


@pytest.fixture
def image_files(tmp_path):
    paths = []
    for i, size in enumerate(((40, 32), (32, 32))):
        pixels = (np.random.default_rng(i).random((*size, 3)) * 255).astype(np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_images_are_scored_as_json_or_as_a_table(tmp_path, image_files, capsys):
    flags = ["--reward", "clip_score:2,aesthetic", "--reward_path", f"clip_score={TINY_CLIP}"]
    flags += ["--reward_path", f"aesthetic={TINY_AESTHETIC}"]
    (tmp_path / "prompts.txt").write_text("a red seven\na blue two\n")
    main(parse_args([*flags, *image_files, "--prompts", str(tmp_path / "prompts.txt"), "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["a red seven", "a blue two"]
    assert [row["image"] for row in rows] == image_files
    clip_score = load_reward("clip_score", path=TINY_CLIP)
    for row in rows:
        assert row.keys() == {"image", "prompt", "scores", "total"}
        pixels = torch.from_numpy(np.array(Image.open(row["image"]))).permute(2, 0, 1)[None] / 255
        score = clip_score(pixels, [row["prompt"]]).item()
        assert row["scores"]["clip_score"] == pytest.approx(score, rel=1e-5)
        assert row["total"] == pytest.approx(2 * score + row["scores"]["aesthetic"], rel=1e-5)
    main(parse_args([*flags, *image_files, "--prompt", "a red seven"]))
    header, first, *_, mean, deviation = capsys.readouterr().out.splitlines()
    assert header.split() == ["clip_score", "aesthetic", "total"]
    assert first.split()[:2] == [image_files[0], f"{rows[0]['scores']['clip_score']:.4f}"]
    assert mean.startswith("mean") and deviation.startswith("standard deviation")


def test_errors_are_one_line(tmp_path, image_files):
    (tmp_path / "prompts.txt").write_text("one\n")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with open(image_files[0], "rb") as file:
        content = file.read()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not an image")
    main(parse_args(["--reward", "jpeg_compressibility", *image_files]))  # needs no prompt
    for flags, problem in (
        (["--reward", "clip_score", *image_files], "'clip_score' may read the prompt: give --prompt or --prompts"),
        (["--reward", "clip_score", *image_files, "--prompts", str(tmp_path / "prompts.txt")], "1 lines for 2 images"),
        (["--reward", "jpeg_compressibility", image_files[0], "no.png"], "'no.png' cannot be opened as an image"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "text.png")], "text.png' cannot be opened as an image"),
        (["--reward", "beauty", *image_files], "unknown reward 'beauty'"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "deep.png")], "has more than 8 bits per channel (I;16)"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "half.png")], "half.png' cannot be read: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(parse_args(flags))
        message = stop.value.code
        assert message.startswith("python -m reward_models: error: ") and problem in message and "\n" not in message


def test_images_are_read_as_rgb_and_rotated_by_exif(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: display rotated by 90 degrees clockwise
    image.save(tmp_path / "gray.png", exif=exif)
    result = read_image(str(tmp_path / "gray.png"))
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()) / 255
    torch.testing.assert_close(result, expected.expand(1, 3, 3, 2))


def test_help_lists_the_rewards_without_heavy_imports():
    """The same process also checks that importing the package imports nothing heavy."""
    code = """if True:
        import runpy, sys
        sys.argv = ["reward_models", "--help"]
        try:
            runpy.run_module("reward_models", run_name="__main__")
        finally:
            heavy = {"transformers", "diffusers", "accelerate", "huggingface_hub", "safetensors", "PIL"}
            print("imported:", *sorted(heavy & sys.modules.keys()))
    """
    environment = {**os.environ, "PYTHONPATH": ROOT}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(name in run.stdout and known.meaning in run.stdout for name, known in REWARDS.items())
    assert run.stdout.splitlines()[-1] == "imported:"
