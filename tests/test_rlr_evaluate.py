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
import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from evaluate_rlr_sd import main, parse_args
from PIL import Image
from reward_models import load_reward
from reward_models.features import frechet_distance, load_features
from rlr_testing import DIGITS, ROOT, TINY_AESTHETIC, TINY_CLIP, TINY_SD, tiny_pipeline, train
from train_rlr_sd import generate

from diffusers import DDIMScheduler


FLAGS = [
    *("--pretrained_model_name_or_path", TINY_SD, "--feature_model", TINY_CLIP, "--prompts", DIGITS),
    *("--reward", "aesthetic,clip_score", "--reward_path", f"aesthetic={TINY_AESTHETIC}"),
    *("--reward_path", f"clip_score={TINY_CLIP}", "--num_inference_steps", "3", "--num_prompts", "3"),
    *("--images_per_prompt", "2", "--batch_size", "6", "--decode_batch_size", "6"),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """One trained a little, and one not at all to speak of."""
    folder = tmp_path_factory.mktemp("adapters")
    train(folder / "strong", "--learning_rate", "3e-2")
    train(folder / "weak", "--learning_rate", "1e-6")
    return [str(folder / "strong"), str(folder / "weak")]


def test_adapters_against_their_base_model(tmp_path, adapters, capsys):
    real = tmp_path / "real"
    real.mkdir()
    for i in range(3):
        Image.new("RGB", (20 + i, 30), (60 * i, 0, 90)).save(real / f"{i}.png")
    args = parse_args(
        [*FLAGS, "--adapters", *adapters, "--lora_scales", "0,1", "--real_images", str(real)]
        + ["--output_dir", str(tmp_path / "out")]
    )
    results = main(args)
    models = results["models"]
    assert list(models) == ["base", "strong", "weak"] and list(results["lora_scales"]) == ["strong", "weak"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    with open(tmp_path / "out" / "results.csv", encoding="utf-8", newline="") as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert list(table) == list(models)
    assert float(table["strong"]["aesthetic_win_rate"]) == models["strong"]["rewards"]["aesthetic"]["win_rate"]
    assert float(table["weak"]["frechet_to_real"]) == models["weak"]["frechet_to_real"]
    # The pictures are those of a plain pipeline, scored by the reward itself.
    prompts = ["a green zero"] * 2 + ["a green one"] * 2 + ["a green two"] * 2
    args.height = args.width = 32
    pipeline, reward = tiny_pipeline(), load_reward("aesthetic", path=TINY_AESTHETIC)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    base = reward(generate(pipeline, prompts, args), prompts)
    assert models["base"]["rewards"]["aesthetic"]["mean"] == pytest.approx(base.mean().item(), rel=1e-4)
    pipeline.load_lora_weights(adapters[0])
    tuned = generate(pipeline, prompts, args)
    gain = reward(tuned, prompts) - base
    found = models["strong"]["rewards"]["aesthetic"]
    assert found["gain"] == pytest.approx(gain.mean().item(), rel=1e-3)
    assert found["gain_standard_error"] == pytest.approx(gain.std().item() / 6**0.5, rel=1e-3)
    assert found["win_rate"] == pytest.approx((gain > 0).float().mean().item())
    # The base model has not drifted from itself, and a scale of zero is the base model.
    assert models["base"]["drift"] == pytest.approx(0, abs=1e-6)
    assert models["strong"]["drift"] > 10 * models["weak"]["drift"]
    scales = results["lora_scales"]["strong"]
    assert scales["0"]["drift"] == pytest.approx(0, abs=1e-6)
    assert scales["1"]["rewards"]["aesthetic"]["mean"] == pytest.approx(found["mean"], rel=1e-5)
    features = load_features(TINY_CLIP)
    colours = [torch.tensor([60.0 * i, 0.0, 90.0]).view(1, 3, 1, 1).expand(-1, -1, 30, 20 + i) / 255 for i in range(3)]
    away = frechet_distance(features(tuned), torch.cat([features(image) for image in colours]))
    assert models["strong"]["frechet_to_real"] == pytest.approx(float(away), rel=1e-3)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("strong", "weak", "clip_score | win rate", "frechet to real"))


def test_the_table_to_be_filled_in_has_the_columns_of_an_evaluation(tmp_path, adapters):
    main(parse_args([*FLAGS, "--adapters", adapters[1], "--output_dir", str(tmp_path)]))
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        columns = file.readline()
    with open(os.path.join(ROOT, "docs", "sd14_results.csv"), encoding="utf-8") as file:
        wanted = file.readline()
    # Of the two rewards here, those of the four there.
    for found, others in (("aesthetic", ("pickscore", "hpsv2", "aesthetic")), ("clip_score", ("imagereward",))):
        own = ",".join(name.replace("score", found, 1) for name in ("score", "score_standard_error", "score_win_rate"))
        columns = columns.replace(own, ",".join(own.replace(found, other) for other in others), 1)
    assert columns.strip() == wanted.strip()


def test_the_report_stands_alone(tmp_path, adapters):
    main(parse_args([*FLAGS, "--adapters", adapters[0], "--output_dir", str(tmp_path), "--lora_scales", "0,.5"]))
    report = (tmp_path / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', report)
    assert len(pictures) == 3 and "http" not in report
    for data, name in zip(pictures, ("grid.png", "gains.png", "scales.png")):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.size == Image.open(tmp_path / name).size
        assert torch.tensor(picture.convert("L").getextrema()).diff() > 100  # something is drawn
    assert "<td>base</td>" in report and "num_inference_steps: 3" in report


def test_a_prompt_is_no_formula(tmp_path):
    """Between two dollar signs matplotlib would set one, or fail to."""
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    (tmp_path / "prompts.txt").write_text("one of $5 # or $6\n")
    train(tmp_path / "trained", *prompts, "--num_eval_images", "2")
    flags = [*FLAGS, *prompts, "--adapters", str(tmp_path / "trained"), "--output_dir", str(tmp_path / "out")]
    main(parse_args(flags))
    assert (tmp_path / "trained" / "before_after.png").exists() and (tmp_path / "out" / "grid.png").exists()


def test_a_browser_shows_the_report(tmp_path, adapters):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the report with")
    main(parse_args([*FLAGS, "--adapters", adapters[0], "--output_dir", str(tmp_path)]))
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1600"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # The tuned digits are drawn on black, in colors; a page without its pictures has neither.
    assert (pixels.max(2) < 30).mean() > 0.02
    assert (np.ptp(pixels, axis=2) > 100).mean() > 0.005


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--adapters", "/nowhere"], "--adapters '/nowhere' cannot be loaded"),
        (["--adapters", "x", "--lora_scales", "0,much"], "--lora_scales '0,much'"),
        (["--adapters", "x", "--lora_scales", "0,nan"], "--lora_scales '0,nan'"),
        (["--adapters", "x", "--images_per_prompt", "1"], "--images_per_prompt 1 must be at least 2"),
        (["--adapters", "x", "--real_images", "/nowhere"], "--real_images '/nowhere' holds fewer than two pictures"),
        (["--adapters", "x", "--reward", "beauty"], "unknown reward 'beauty'"),
        (["--adapters", "x", "--eta", "2"], "--eta 2.0 must be in [0, 1]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(parse_args([*FLAGS, *flags, "--output_dir", str(tmp_path / "out")]))
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in said and said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_an_adapter_may_have_any_name_and_an_evaluation_is_not_written_over(tmp_path, adapters):
    """As of a member of the module in which peft keeps adapters by their names."""
    shutil.copytree(adapters[1], tmp_path / "train")
    flags = [*FLAGS, "--adapters", str(tmp_path / "train"), "--output_dir", str(tmp_path / "out")]
    assert list(main(parse_args(flags))["models"]) == ["base", "train-again"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="out' holds another evaluation: name another, or use --over"):
        main(parse_args(flags))
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert list(main(parse_args([*flags, "--overwrite_output_dir"]))["models"]) == ["base", "train-again"]


def test_out_of_memory_is_said_in_one_line(tmp_path, adapters):
    """By a reward that has memory for its trial alone."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef large(images, prompts):\n"
        "    if len(images) > 2:\n        raise torch.OutOfMemoryError('none left')\n    return images.mean((1, 2, 3))\n"
    )
    flags = ["--adapters", adapters[1], "--reward", f"{tmp_path}/mine.py:large", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"^evaluate_rlr_sd.py: error: out of memory: use a .*--batch_size.*none left\)$"
    ):
        main(parse_args([*FLAGS, *flags]))
