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
"""The Hub and the model card, with the real client against a server on this machine; and the tracker wandb."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from diffusion_models import load_model
from diffusion_models.adapters import add_lora, load_lora, save_lora
from diffusion_models.lora_files import find_lora
from huggingface_hub import ModelCard
from rlr_hub import LoopbackHub
from rlr_testing import ASSETS, BASE, LORA, ROOT, TINY_CLIP, TINY_SD, same_adapter, tiny_model, train
from rlr_training.hub import command_of, license_of, save_model_card, typed_flags, without_folders
from train_rlr_sd import parse_args


TOKEN = "hf_nobodysbusiness"
PUSH = ["--push_to_hub", "--hub_model_id", "someone/fox", "--hub_token", TOKEN]


@pytest.fixture
def output(capfd, caplog):
    """`output()` is all that has been printed and logged so far."""

    def read():
        captured = capfd.readouterr()
        return captured.out + captured.err + caplog.text

    return read


def holds_token(folder, text):
    """Whether the token stands in a file of the folder or in the text."""
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return any(TOKEN.encode() in content for content in [*written, text.encode()])


def test_a_run_is_uploaded_with_its_card_images_and_metrics(tmp_path, monkeypatch, output):
    out = tmp_path / "out"
    flags = ["--push_every", "2", "--max_train_steps", "3", "--num_eval_images", "4", "--report_to", "tensorboard"]
    with LoopbackHub(token=TOKEN) as hub:
        hub.serve_this_process(monkeypatch)
        train(out, *PUSH, *flags)
    summaries = [(repository, summary) for repository, summary, _ in hub.commits]
    assert summaries == [("someone/fox", "Step 2"), ("someone/fox", "End of training")]
    for _, _, files in hub.commits:
        assert {LORA, "README.md", "metrics.jsonl", "training_args.json", "reward_curve.png"} <= files.keys()
        assert not any(name.startswith(("checkpoint-", "partial-")) for name in files)
        assert not any(TOKEN.encode() in content for content in files.values())
    first, last = (files for _, _, files in hub.commits)
    assert first[LORA] != last[LORA] == (out / LORA).read_bytes()
    assert (out / "checkpoint-2").exists()  # what is uploaded can be resumed from
    assert {"before_after.png", "evaluation.json"} <= last.keys() and len(last["metrics.jsonl"].splitlines()) == 3
    assert "load_lora_weights('someone/fox'" in last["README.md"].decode()
    assert not holds_token(out, output())


def test_a_wrong_token_is_reported_before_training(tmp_path, monkeypatch, output):
    with LoopbackHub(token="another") as hub, pytest.raises(SystemExit) as stop:
        hub.serve_this_process(monkeypatch)
        train(tmp_path / "out", *PUSH)
    message = stop.value.code
    assert message.startswith("train_rlr_sd.py: error: --push_to_hub: cannot create 'someone/fox' on the Hub: ")
    assert "401" in message and "\n" not in message
    assert not (tmp_path / "out").exists() and TOKEN not in message + output()


def test_a_failed_upload_loses_nothing_and_says_how_to_upload_later(tmp_path, monkeypatch, output):
    out = tmp_path / "out"
    with LoopbackHub(token=TOKEN, broken_commits=1000) as hub:
        hub.serve_this_process(monkeypatch)
        with pytest.raises(SystemExit) as stop:
            train(out, *PUSH, "--push_every", "1")
        message, printed = stop.value.code, output()
        failure = "the upload to 'someone/fox' has failed"
        assert message.count(failure) == 1 and "\n" not in message
        assert printed.count(failure) >= 1  # after the first step, and training goes on
        assert not hub.commits and (out / LORA).exists() and len((out / "metrics.jsonl").read_text().splitlines()) == 2
        assert not holds_token(out, message + printed)
        # The command of the message, as a user would run it.
        command = re.search(r"to upload it later: (hf upload .*)", message)[1]
        hub.broken_commits = 0
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        folder = os.path.dirname(sys.executable)
        later = subprocess.run(f"{folder}/{command}", shell=True, env=environment, cwd=tmp_path, capture_output=True)
    assert later.returncode == 0, later.stderr
    assert hub.commits[0][2][LORA] == (out / LORA).read_bytes()
    assert not any(name.startswith("checkpoint-") for name in hub.commits[0][2])


def test_the_card_is_enough_to_use_the_adapter_and_to_repeat_the_run(tmp_path, monkeypatch):
    """Beside the folders that it names, of which it has the last part only."""
    out = tmp_path / "out"
    for folder in (ASSETS, TINY_CLIP):
        for name in os.listdir(folder):
            (tmp_path / name).symlink_to(os.path.join(folder, name))
    flags = ["--reward", "aesthetic,clip_score:5", "--num_eval_images", "4", "--negative_prompt", "-a 'blue' one"]
    train(out, *flags, "--reward_offload", "--learning_rate", "1e-2", "--cache_dir", str(tmp_path))
    card = ModelCard.load(out / "README.md")
    assert ROOT not in card.text and str(tmp_path) not in card.text
    monkeypatch.chdir(tmp_path)
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers" and "lora" in card.data.tags
    results = json.loads((out / "evaluation.json").read_text())
    for name, row in {"aesthetic,clip_score:5": results, **results["members"]}.items():
        number = r"(\S+) \(deviation (\S+)\)"
        figures = re.search(rf"\| `{name}` \| {number} \| {number} \|", card.text).groups()
        expected = [row[model][key] for model in ("base", "tuned") for key in ("mean", "std")]
        assert list(map(float, figures)) == pytest.approx(expected, rel=1e-2)
    for text in ("--reward aesthetic,clip_score:5", "Seed 0", "torch ", "`rlr`"):
        assert text in card.text
    scope, example = {}, re.search(r"```py\n(.*?)```", card.text, re.DOTALL)[1]
    exec(example, scope)
    assert ", negative_prompt=\"-a 'blue' one\"" in example  # a pipeline would take any name
    assert scope["image"].size == (32, 32)
    weights = [p for name, p in scope["pipeline"].unet.named_parameters() if "lora_B" in name]
    assert weights and any(weight.abs().max() > 0 for weight in weights)
    # The command of the card is that of the run.
    command = shlex.split(re.search(r"```bash\n(.*?)```", card.text, re.DOTALL)[1])
    assert command[:5] == ["accelerate", "launch", "--num_processes", "1", "train_rlr_sd.py"]
    again, typed = vars(parse_args(command[5:])), vars(parse_args([*BASE, *flags, "--output_dir", "out"]))
    folders = {"pretrained_model_name_or_path": "tiny-sd", "prompts": "digits.txt", "cache_dir": None}
    folders["reward_path"] = ["aesthetic=tiny-aesthetic", "clip_score=clip"]
    assert again == {**typed, **folders, "reward_offload": True, "learning_rate": 1e-2}
    for word in ("--height", "--resolution", "--mixed_precision"):  # what the run has set itself
        assert word not in command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("stabilityai/sdxl", "stabilityai/sdxl"),
        ("assets/tiny-sd", "assets/tiny-sd"),
        ("/home/me/models/sd/", "sd"),
        ("aesthetic=/home/me/rewards/aesthetic", "aesthetic=aesthetic"),
        ("/home/me/sharp.py:f:10,aesthetic:1,/home/me/other.py:g", "sharp.py:f:10,aesthetic:1,other.py:g"),
        ("aesthetic, /home/me/sharp.py:f", "aesthetic, sharp.py:f"),
    ],
)
def test_of_absolute_paths_the_card_shows_the_last_part(text, shown):
    assert without_folders(text) == shown


def test_the_command_has_the_flags_that_were_typed_whatever_they_look_like():
    """And the precision of accelerate's configuration, which belongs to its launcher."""
    texts = ["/not/a/path, $HOME", "it's", '"quoted"', "`x`", "a\nb"]
    flags = ["--negative_prompt=-x", "--validation_prompts", *texts, "--hub_token", "hf_x", "--cache_dir", "/tmp"]
    args = parse_args([*flags, "--eta", "0.5", "--mixing", "0.5", "--push_to_hub"])
    accelerator = SimpleNamespace(num_processes=2, mixed_precision="bf16")
    words = shlex.split(command_of(args, typed_flags(args, parse_args([])), accelerator, "train_rlr_sd.py"))
    launcher = ["accelerate", "launch", "--num_processes", "2", "--mixed_precision", "bf16", "train_rlr_sd.py"]
    assert words[:7] == launcher
    assert parse_args(words[7:]) == parse_args(
        ["--negative_prompt=-x", "--validation_prompts", *texts, "--eta", "0.5", "--mixing", "0.5", "--push_to_hub"]
    )
    args = parse_args(["--mixed_precision", "no", "--validation_prompts=-y"])
    words = command_of(args, typed_flags(args, parse_args([])), accelerator, "train_rlr_sd.py").split()
    always = ["--reward", "aesthetic", "--gradient_estimator", "rlr"]  # what a run is
    assert words[4:] == ["train_rlr_sd.py", *always, "--validation_prompts=-y", "--mixed_precision", "no"]


def test_the_card_of_a_model_in_a_single_file_loads_it_with_from_single_file(tmp_path):
    """Of which it knows no license: such files have no card."""
    (tmp_path / "sd.safetensors").write_bytes(bytes(8))
    args = parse_args(["--pretrained_model_name_or_path", f"{tmp_path}/sd.safetensors", "--output_dir", str(tmp_path)])
    assert license_of(args.pretrained_model_name_or_path, None) is None
    save_model_card(args, tiny_model(), "the command", "a red one", None, None, 3)
    card = ModelCard.load(tmp_path / "README.md")
    assert "StableDiffusionPipeline.from_single_file('sd.safetensors')" in card.text
    assert card.data.base_model is None


def test_the_card_does_not_make_up_a_license(tmp_path, monkeypatch):
    """The folder of a model without a card is no repository that has one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_SD, "model", ignore=shutil.ignore_patterns("README.md"))
    with LoopbackHub({("model/README.md", "main"): {"README.md": b"---\nlicense: mit\n---\n"}}) as hub:
        hub.serve_this_process(monkeypatch)
        assert license_of(TINY_SD, None) == "apache-2.0" and license_of("model", None) is None
    args = parse_args(["--pretrained_model_name_or_path", "model", "--output_dir", str(tmp_path)])
    save_model_card(args, load_model("model"), "the command", "a red one", None, None, 3)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None and "is not known to this card" in card.text


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


def test_an_adapter_of_the_hub_is_trained_further_also_without_the_hub(tmp_path, monkeypatch):
    """Without the Hub from the cache. Of one that cannot be loaded the reason is given in one line."""
    model = tiny_model()
    add_lora(model, rank=4, alpha=4, layers=["to_q", "to_v"])
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_lora(model, tmp_path / "first")
    adapter = (tmp_path / "first" / LORA).read_bytes()
    files = {("someone/fox", "main"): {LORA: adapter, f"best/{LORA}": adapter}, ("someone/wolf", "main"): {"x": b""}}
    cache = str(tmp_path / "cache")
    flags = ["--cache_dir", cache, "--max_train_steps", "1", "--adapter_path"]
    with LoopbackHub(files) as hub:
        hub.serve_this_process(monkeypatch)
        train(tmp_path / "with", *flags, "someone/fox")
        with pytest.raises(
            SystemExit, match="^train_rlr_sd.py: error: --adapter_path 'someone/wolf' cannot be loaded: .*$"
        ):
            train(tmp_path / "wolf", *flags, "someone/wolf")
    train(tmp_path / "without", *flags, "someone/fox")
    assert same_adapter(tmp_path / "with", tmp_path / "without")
    assert not same_adapter(tmp_path / "with", tmp_path / "first")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'someone/never-asked-for' cannot be loaded: .*offline"):
        load_lora(tiny_model(), "someone/never-asked-for", cache)
    assert os.path.basename(find_lora("someone/fox", cache)) == LORA
    model = tiny_model()
    load_lora(model, "someone/fox", cache)
    save_lora(model, tmp_path / "offline")
    assert same_adapter(tmp_path / "offline", tmp_path / "first")
