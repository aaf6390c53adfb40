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
"""The commands of the documents run, on local folders of the same layout: those of the README, and those of the paper's table."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import evaluate_rlr
import huggingface_hub.constants
import pytest
import train_rlr_flow
import train_rlr_sd
import train_rlr_video
from bench_common import as_flags
from rlr_flow_models import tiny_flux, tiny_sd35
from rlr_hub import LoopbackHub
from rlr_models import tiny_sdxl
from rlr_testing import DIGITS, LORA, ROOT, TINY_CLIP, TINY_SD, forget_accelerator
from rlr_tiny_rewards import save_tiny_rewards
from rlr_video_models import tiny_wan
from test_rlr_docs import command_words, commands_of_scripts, fenced_blocks


SCRIPTS = {script.parse_args: script for script in (train_rlr_sd, train_rlr_flow, train_rlr_video, evaluate_rlr)}
# {model of a command: (a local folder of the same layout, sizes)}
SMALL = ["--height", "32", "--width", "32"]
MODELS = {
    "CompVis/stable-diffusion-v1-4": (lambda: TINY_SD, []),
    "stabilityai/stable-diffusion-xl-base-1.0": (tiny_sdxl, SMALL),
    "stabilityai/stable-diffusion-3.5-medium": (tiny_sd35, SMALL),
    "black-forest-labs/FLUX.1-dev": (tiny_flux, SMALL),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (tiny_wan, [*SMALL, "--num_frames", "9"]),
}
SHORT = {"num_inference_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 1}
SHORT |= {"num_eval_images": 2, "num_heldout_images": 4, "decode_batch_size": 2, "report_to": "none"}
OTHERS = {"quantize": "int8"}  # nf4 needs a GPU


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags that name local folders of the rewards."""
    paths = save_tiny_rewards(tmp_path_factory.mktemp("rewards"))
    return [
        "--feature_model",
        TINY_CLIP,
        *(word for item in paths.items() for word in ("--reward_path", "=".join(item))),
    ]


def run(parse, arguments, flags):
    """Run a command of the documents with the flags that make it short and local; returns its output folder."""
    args = parse(arguments)
    folder, sizes = MODELS[args.pretrained_model_name_or_path]
    changes = {"pretrained_model_name_or_path": folder()}
    changes |= {name: value for name, value in OTHERS.items() if getattr(args, name, None) is not None}
    if getattr(args, "pretrained_vae_model_name_or_path", None) is not None:
        changes["pretrained_vae_model_name_or_path"] = os.path.join(folder(), "vae")
    if parse is not evaluate_rlr.parse_args:
        changes |= SHORT
    else:
        changes |= {"num_inference_steps": 2, "batch_size": 4, "num_prompts": 2, "images_per_prompt": 2}
    forget_accelerator()
    SCRIPTS[parse].main(parse([*arguments, *flags, *as_flags(changes), *sizes]))
    return Path(args.output_dir)


def commands_of_readme():
    return commands_of_scripts((Path(ROOT) / "README.md").read_text(encoding="utf-8"))


def test_every_training_command_of_the_readme_runs_and_its_evaluation(tmp_path, monkeypatch, flags):
    readme = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
    (code,) = [code for _, code in fenced_blocks(readme) if "def sharpness" in code]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sharp.py").write_text(code)
    (tmp_path / "my_prompts.txt").write_text("a red seven\na blue two\na green one\na yellow six\n")
    models = []
    for parse, arguments in commands_of_readme():
        if "..." in arguments or "--help" in arguments or not any(word == "--reward" for word in arguments):
            continue
        out = run(
            parse,
            [*arguments, *([] if "--output_dir" in arguments else ["--output_dir", f"out-{len(models)}"])],
            flags,
        )
        assert (out / ("results.json" if parse is evaluate_rlr.parse_args else LORA)).is_file()
        models.append(parse(arguments).pretrained_model_name_or_path)
    assert set(models) == set(MODELS) and len(models) >= 8


# The table of the paper


def lines_of_paper():
    """The shell lines of docs/results.md that fill the paper's table, without the Python between them."""
    text = (Path(ROOT) / "docs" / "results.md").read_text(encoding="utf-8")
    blocks = [
        code for language, code in fenced_blocks(text) if language == "bash" and "sd14" in code or "hpd_train" in code
    ]
    return "\n".join(blocks)


def test_the_lines_that_fill_the_papers_table_run(tmp_path, monkeypatch, flags):
    """The very lines, in bash, with functions in the place of the programs that note what they are called with."""
    prompts, script = re.fullmatch(
        r"python - <<'END'\n(.*?)^END\n(.*)", lines_of_paper(), re.DOTALL | re.MULTILINE
    ).groups()
    monkeypatch.chdir(tmp_path)
    pages = {
        f"benchmark/{style}.json": [f"a {style} {i}" for i in range(120)]
        for style in ("anime", "concept-art", "paintings", "photo")
    }
    files = {name: json.dumps(page).encode() for name, page in pages.items()}
    with LoopbackHub({("zhwang/HPDv2", "main"): files}) as hub, monkeypatch.context() as patch:
        hub.serve_this_process(patch)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        exec(prompts, {})
    assert [len(Path(f"hpd_{part}.txt").read_text().splitlines()) for part in ("train", "test")] == [80, 400]
    (tmp_path / "docs").mkdir()
    note = 'note() { printf \'%s\\n\' "$*" >> calls; }; accelerate() { note "$@"; }; python() { note "$@"; }; cp() { note cp "$@"; }\n'
    subprocess.run(["bash", "-c", "set -eu\n" + note + "mkdir -p sd14/any\n" + script], check=True)
    calls = [command_words(line)[0] for line in Path("calls").read_text().splitlines()]
    runs = [call[2:] for call in calls if call[0] == "launch"]
    assert len(runs) == 16 and len(calls) == 18
    parsed = [train_rlr_sd.parse_args(words) for words in runs]
    first = parsed[0]
    for args, words_of_run in zip(parsed, runs):
        if args.reward == first.reward:  # each estimator once; the evaluation has all rewards
            run(train_rlr_sd.parse_args, words_of_run, [*flags, "--prompts", DIGITS])
    evaluation = calls[16]
    start = evaluation.index("--adapters") + 1
    adapters = [str(path) for path in sorted(Path("sd14").iterdir()) if (path / LORA).is_file()]
    assert len(adapters) == 4
    evaluation[start : start + 1] = adapters
    out = run(evaluate_rlr.parse_args, evaluation[1:], [*flags, "--prompts", DIGITS])
    assert calls[17] == ["cp", str(out / "results.csv"), "docs/sd14_results.csv"]
    header, expected = (
        next(csv.reader(open(file, encoding="utf-8")))
        for file in (out / "results.csv", os.path.join(ROOT, "docs", "sd14_results.csv"))
    )
    assert header == expected and re.fullmatch(r"[\w-]+", header[0])
