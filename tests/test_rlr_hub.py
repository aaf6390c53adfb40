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
"""Pushing to the Hub and the model card, with the real client against a server on this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from rlr_hub import LoopbackHub
from rlr_testing import BASE, LORA, ROOT, TINY_SD, same_adapter, train
from train_rlr_sd import parse_args


TOKEN = "hf_nobodysbusiness"


def push(hub, out, *flags):
    """A run in a process of its own, since the client reads the address of the Hub when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": f"{out}-home", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, os.path.join(ROOT, "train_rlr_sd.py"), *BASE, "--output_dir", str(out)]
    command += ["--push_to_hub", "--hub_model_id", "someone/fox", "--hub_token", TOKEN, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(out))


def holds_token(out, run):
    """Whether the token stands in anything that the run has written or said."""
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    return any(TOKEN.encode() in content for content in [*written, run.stdout.encode(), run.stderr.encode()])


def test_a_run_is_pushed_with_its_card_pictures_and_metrics(tmp_path):
    out = tmp_path / "out"
    flags = ["--push_every", "2", "--max_train_steps", "3", "--num_eval_images", "4"]
    with LoopbackHub(token=TOKEN) as hub:
        run = push(hub, out, *flags, "--report_to", "tensorboard")
    assert run.returncode == 0, run.stderr
    assert [(repository, summary) for repository, summary, _ in hub.commits] == [
        ("someone/fox", "Step 2"),
        ("someone/fox", "End of training"),
    ]
    for _, _, files in hub.commits:
        assert {LORA, "README.md", "metrics.jsonl", "training_args.json", "reward_curve.png"} <= files.keys()
        assert not any(name.startswith(("checkpoint-", "partial-")) for name in files)
        assert not any(TOKEN.encode() in content for content in files.values())
    first, last = (files for _, _, files in hub.commits)
    assert first[LORA] != last[LORA] == (out / LORA).read_bytes()
    assert (out / "checkpoint-2").exists()  # what has been pushed can be gone on from
    assert {"before_after.png", "evaluation.json"} <= last.keys() and len(last["metrics.jsonl"].splitlines()) == 3
    assert "load_lora_weights('someone/fox'" in last["README.md"].decode()
    assert not holds_token(out, run)


def test_a_wrong_token_is_said_before_training(tmp_path):
    out = tmp_path / "out"
    with LoopbackHub(token="another") as hub:
        run = push(hub, out)
    assert run.returncode != 0 and not out.exists()
    assert "train_rlr_sd.py: error: --push_to_hub: cannot create 'someone/fox' on the Hub: " in run.stderr
    assert "401" in run.stderr and "Traceback" not in run.stderr
    assert TOKEN not in run.stdout + run.stderr


def test_a_failing_upload_loses_nothing_and_says_how_to_push_later(tmp_path):
    out = tmp_path / "out"
    with LoopbackHub(token=TOKEN, broken_commits=1000) as hub:
        run = push(hub, out, "--push_every", "1")
        assert run.returncode != 0 and "Traceback" not in run.stderr
        failures = [line for line in run.stderr.splitlines() if "the upload to 'someone/fox' has failed" in line]
        assert len(failures) == 2  # after the first step, and at the end
        assert not hub.commits and (out / LORA).exists() and len((out / "metrics.jsonl").read_text().splitlines()) == 2
        assert not holds_token(out, run)
        # The command of the message, as a user would run it.
        command = re.search(r"to push it later: (hf upload .*)", failures[-1])[1]
        hub.broken_commits = 0
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        folder = os.path.dirname(sys.executable)
        later = subprocess.run(f"{folder}/{command}", shell=True, env=environment, cwd=tmp_path, capture_output=True)
    assert later.returncode == 0, later.stderr
    assert hub.commits[0][2][LORA] == (out / LORA).read_bytes()
    assert not any(name.startswith("checkpoint-") for name in hub.commits[0][2])


def test_the_card_is_enough_to_use_the_adapter(tmp_path):
    flags = ["--reward", "aesthetic,clip_score:5", "--num_eval_images", "4", "--negative_prompt", "a blue one"]
    train(tmp_path, *flags, "--learning_rate", "1e-2")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers" and "lora" in card.data.tags
    results = json.loads((tmp_path / "evaluation.json").read_text())
    for name, row in {"aesthetic,clip_score:5": results, **results["members"]}.items():
        assert f"| `{name}` | {row['base']['mean']:.4f} " in card.text and f"{row['tuned']['mean']:.4f}" in card.text
    for text in ("--negative_prompt 'a blue one'", "--reward aesthetic,clip_score:5", "Seed 0", "torch ", "`rlr`"):
        assert text in card.text
    scope = {}
    exec(re.search(r"```py\n(.*?)```", card.text, re.DOTALL)[1], scope)
    assert scope["image"].size == (32, 32)
    weights = [p for name, p in scope["pipeline"].unet.named_parameters() if "lora_B" in name]
    assert weights and any(weight.abs().max() > 0 for weight in weights)
    # The command of the card is the run's own.
    command = shlex.split(re.search(r"```bash\n(.*?)```", card.text, re.DOTALL)[1])
    assert command[:5] == ["accelerate", "launch", "--num_processes", "1", "train_rlr_sd.py"]
    again, config = vars(parse_args(command[5:])), json.loads((tmp_path / "training_args.json").read_text())
    assert {key: value for key, value in again.items() if key != "hub_token"} == {
        key: value for key, value in config.items() if key != "num_processes"
    }


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ["--validation_prompts", "a red one", "--validation_steps", "2", "--num_validation_images", "1"]
    train(tmp_path / "out", "--report_to", "wandb", *flags)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert list(run.rglob("media/images/*.png"))


def test_a_model_without_a_card_has_no_licence_to_state(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY_SD, model, ignore=shutil.ignore_patterns("README.md"))
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(model))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None and "is not known to this card" in card.text


ADAPTER_SESSION = """
import sys

import huggingface_hub.constants
from train_rlr_sd import main, parse_args

out, *base = sys.argv[1:]
for name in ("fox", "wolf", "offline"):
    huggingface_hub.constants.HF_HUB_OFFLINE = name == "offline"
    flags = ["--output_dir", out + name, "--adapter_path", "someone/fox" if name == "offline" else f"someone/{name}"]
    try:
        main(parse_args([*base, "--max_train_steps", "1", *flags]))
        print(name, "trained")
    except SystemExit as error:
        print(name, error)
"""


def test_an_adapter_of_the_hub_is_gone_on_from_without_the_hub(tmp_path):
    """One that is in the cache; of another the reason is said in one line."""
    train(tmp_path / "first")
    adapter = (tmp_path / "first" / LORA).read_bytes()
    files = {("someone/fox", "main"): {LORA: adapter, f"best/{LORA}": adapter}, ("someone/wolf", "main"): {"x": b""}}

    def session(name):
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ROOT}
        command = [sys.executable, "-c", ADAPTER_SESSION, str(tmp_path / name), *BASE]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        fox, wolf, offline = (line for line in run.stdout.splitlines() if line.startswith(("fox", "wolf", "offline")))
        assert (fox, offline) == ("fox trained", "offline trained")
        assert "--adapter_path 'someone/wolf' cannot be loaded: " in wolf

    with LoopbackHub(files) as hub:
        session("with")
    session("without")
    assert same_adapter(tmp_path / "withfox", tmp_path / "withoutfox")
    assert same_adapter(tmp_path / "withfox", tmp_path / "withoutoffline")
