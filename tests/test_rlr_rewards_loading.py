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
"""Loading checkpoints: missing, damaged, unsafe and unsuitable files, and the Hub."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from reward_models import load_reward
from reward_models.features import load_features
from rlr_hub import LoopbackHub
from rlr_testing import ROOT, TINY_AESTHETIC, TINY_CLIP
from rlr_tiny_rewards import save_tiny_rewards, split_tokenizer
from safetensors.torch import load_file, save_file
from transformers import CLIPModel


HPS = "HPS_v2_compressed.pt"
HEAD = os.path.join(TINY_AESTHETIC, "aesthetic_head.safetensors")


@pytest.fixture(scope="module")
def tiny_paths(tmp_path_factory):
    return save_tiny_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def aesthetic_folder(tmp_path):
    """A folder with the CLIP of the aesthetic reward, but without its head."""
    shutil.copytree(TINY_CLIP, tmp_path / "clip")
    return tmp_path


def test_unknown_rewards_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown reward 'beauty', known are: aesthetic, clip_score"):
        load_reward("beauty")
    with pytest.raises(ValueError, match="'aesthetic=/no/such/folder': no such folder"):
        load_reward("aesthetic", path="/no/such/folder")
    with pytest.raises(ValueError, match="'jpeg_compressibility=.*': this reward has no files"):
        load_reward("jpeg_compressibility", path=str(tmp_path))
    with pytest.raises(ValueError, match="'jpeg_compressibility@v1': this reward has no files"):
        load_reward("jpeg_compressibility", revision="v1")
    with pytest.raises(ValueError, match="'aesthetic@v1': the folder .* has no revisions"):
        load_reward("aesthetic", path=str(tmp_path), revision="v1")
    with pytest.raises(ValueError, match="holds no aesthetic_head.safetensors or aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))


def test_a_clip_with_missing_tokenizer_or_truncated_weights_is_refused(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY_CLIP, folder)
    (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    with pytest.raises(ValueError, match="holds no tokenizer.json or vocab.json"):
        load_reward("clip_score", path=str(folder))
    (folder / "elsewhere.json").rename(folder / "tokenizer.json")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="reward 'clip_score' cannot be loaded"):
        load_reward("clip_score", path=str(folder))


def test_a_clip_that_does_not_fit_is_described(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY_CLIP, folder)
    state = load_file(folder / "model.safetensors")
    state["vision_model.extra.weight"] = state.pop("visual_projection.weight")
    state["text_projection.weight"] = torch.zeros(3, 4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("clip_score", "pickscore"):
        with pytest.raises(
            ValueError,
            match=r"missing \['visual_projection.weight'\], unexpected \['vision_model.extra.weight'\], wrong shape"
            r" \['text_projection.weight \(3, 4\) instead of \(768, 64\)'\]",
        ):
            load_reward(name, path=str(folder))


def test_the_aesthetic_head_may_be_a_pth_file(aesthetic_folder):
    torch.save(load_file(HEAD), aesthetic_folder / "aesthetic_head.pth")
    images = torch.rand(2, 3, 32, 32)
    scores, expected = (
        load_reward("aesthetic", path=str(path))(images, ["", ""]) for path in (aesthetic_folder, TINY_AESTHETIC)
    )
    torch.testing.assert_close(scores, expected)


def test_an_aesthetic_head_that_does_not_fit_is_described(aesthetic_folder):
    state = load_file(HEAD)
    state["layers.7.weight"] = torch.zeros(1, 8)
    state["layers.9.bias"] = state.pop("layers.0.bias")
    file = aesthetic_folder / "aesthetic_head.safetensors"
    save_file(state, file)
    with pytest.raises(
        ValueError, match=r"missing \['layers.0.bias'\].*\['layers.9.bias'\].*\['layers.7.weight \(1, 8"
    ):
        load_reward("aesthetic", path=str(aesthetic_folder))
    file.write_bytes(b"truncated")
    with pytest.raises(ValueError, match="aesthetic_head.safetensors"):
        load_reward("aesthetic", path=str(aesthetic_folder))


def save_narrow_clip(folder, width):
    """A CLIP like that of assets/tiny-aesthetic with embeddings of another width."""
    clip = CLIPModel.from_pretrained(TINY_CLIP)
    clip.config.projection_dim = width
    clip.visual_projection.weight.data = clip.visual_projection.weight.data[:width].clone()
    clip.text_projection.weight.data = clip.text_projection.weight.data[:width].clone()
    clip.save_pretrained(folder)


def test_an_aesthetic_head_fits_the_embeddings_of_its_clip(aesthetic_folder):
    save_narrow_clip(aesthetic_folder / "clip", 512)
    file = aesthetic_folder / "aesthetic_head.safetensors"
    shutil.copy(HEAD, file)
    with pytest.raises(ValueError, match="head.safetensors' takes embeddings of 768 numbers, .*clip' makes 512 "):
        load_reward("aesthetic", path=str(aesthetic_folder))
    state = load_file(HEAD)
    state["layers.0.weight"] = state["layers.0.weight"][:, :512].contiguous()
    save_file(state, file)
    reward, images = load_reward("aesthetic", path=str(aesthetic_folder)), torch.rand(2, 3, 32, 32)
    expected = load_features(str(aesthetic_folder / "clip"))(images)
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    torch.testing.assert_close(reward(images, ["", ""]), expected[:, 0], rtol=1e-4, atol=1e-5)


def test_the_tokenizer_may_be_a_vocabulary_and_merges(tmp_path):
    split_tokenizer(shutil.copytree(TINY_CLIP, tmp_path / "clip"))
    images, prompts = torch.rand(2, 3, 32, 32), ["A red  seven!", "zebra blue"]
    scores, expected = (
        load_reward("clip_score", path=path)(images, prompts) for path in (tmp_path / "clip", TINY_CLIP)
    )
    assert torch.equal(scores, expected)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


NEW_TOKEN = {"content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
NEW_TOKEN = {"id": 566, **NEW_TOKEN, "special": True}


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (
            "tokenizer.json",
            lambda c: c["added_tokens"].append(NEW_TOKEN),
            "567 tokens do not have the ids from 0 on of the text encoder's 566",
        ),
        (
            "tokenizer.json",
            lambda c: c["model"]["vocab"].pop("!</w>"),
            "565 tokens do not have the ids from 0 on of the text encoder's 566",
        ),
        ("tokenizer.json", lambda c: c["model"]["merges"].pop(), "has no merges for 1 of its tokens, such as"),
        ("config.json", lambda c: c["text_config"].update(eos_token_id=7), "with the token 565, .* for the token 7"),
        ("config.json", lambda c: c.update(model_type="siglip"), "of type 'siglip', not 'clip'"),
        ("config.json", lambda c: c["vision_config"].update(hidden_size=65), "hidden size"),
    ],
)
def test_parts_of_a_clip_that_do_not_fit_one_another_are_named(file, change, problem, tmp_path):
    folder = shutil.copytree(TINY_CLIP, tmp_path / "clip")
    edit_json(folder / file, change)
    for name in ("clip_score", "pickscore"):
        with pytest.raises(ValueError, match=f"reward '{name}' cannot be loaded: .*clip'.*{problem}"):
            load_reward(name, path=str(folder))


def test_older_configurations_look_for_the_highest_token(tmp_path):
    """Their eos_token_id is 2, whatever the tokenizer's."""
    folder = shutil.copytree(TINY_CLIP, tmp_path / "clip")
    edit_json(folder / "config.json", lambda content: content["text_config"].update(eos_token_id=2))
    images, prompts = torch.rand(2, 3, 32, 32), ["a red seven", "a blue two"]
    scores, expected = (load_reward("clip_score", path=path)(images, prompts) for path in (folder, TINY_CLIP))
    assert torch.equal(scores, expected)


def test_an_imagereward_whose_parts_do_not_fit_one_another_is_refused(tmp_path, tiny_paths):
    folder = shutil.copytree(tiny_paths["imagereward"], tmp_path / "imagereward")
    words = (folder / "vocab.txt").read_text()
    (folder / "vocab.txt").write_text(words + "\nfox")
    with pytest.raises(ValueError, match="imagereward'.* vocabulary of 58 tokens does not fit a text tower of 57"):
        load_reward("imagereward", path=str(folder))
    (folder / "vocab.txt").write_text(words)
    edit_json(folder / "med_config.json", lambda content: content.update(max_position_embeddings=16))
    with pytest.raises(ValueError, match="med_config.json'.*max_position_embeddings is below 35"):
        load_reward("imagereward", path=str(folder))
    (folder / "med_config.json").write_text("[]")
    with pytest.raises(ValueError, match="med_config.json' does not hold a JSON object"):
        load_reward("imagereward", path=str(folder))


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"layers.0.weight": 3}, {"state_dict": 3}])
def test_checkpoints_that_are_no_state_dict_are_refused(content, tmp_path, tiny_paths):
    for name, file in (("aesthetic", "aesthetic_head.pth"), ("imagereward", "ImageReward.pt"), ("hpsv2", HPS)):
        folder = shutil.copytree(tiny_paths[name], tmp_path / name)
        (folder / "aesthetic_head.safetensors").unlink(missing_ok=True)
        torch.save(content, folder / file)
        with pytest.raises(ValueError, match=f"reward '{name}' cannot be loaded: .*{file}'"):
            load_reward(name, path=str(folder))


@pytest.mark.parametrize(("name", "file"), [("hpsv2", HPS), ("imagereward", "ImageReward.pt")])
def test_checkpoints_with_unknown_keys_or_truncated_files_are_described(name, file, tmp_path, tiny_paths):
    folder = shutil.copytree(tiny_paths[name], tmp_path / name)
    checkpoint = torch.load(folder / file, weights_only=True)
    state = checkpoint.get("state_dict", checkpoint)
    state["something.else"] = state.pop(next(key for key in state if key.endswith("weight")))
    torch.save(checkpoint, folder / file)
    problem = f"reward '{name}' cannot be loaded: .*{file}'"
    with pytest.raises(ValueError, match=f"{problem} does not fit: .*something.else"):
        load_reward(name, path=str(folder))
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=problem):
        load_reward(name, path=str(folder))
    if name == "hpsv2":
        torch.save({}, folder / file)
        with pytest.raises(ValueError, match="has no entry 'state_dict'"):
            load_reward(name, path=str(folder))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aesthetic", "aesthetic_head.pth"),
        ("hpsv2", HPS),
        ("imagereward", "ImageReward.pt"),
        ("clip_score", "pytorch_model.bin"),
    ],
)
def test_pickles_that_would_run_code_are_refused(name, file, tmp_path, tiny_paths):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = shutil.copytree(tiny_paths[name], tmp_path / name)
    for safe_file in ("aesthetic_head.safetensors", "model.safetensors"):
        (folder / safe_file).unlink(missing_ok=True)
    for content in ({"state_dict": Bomb(), "weight": Bomb()}, Bomb()):
        torch.save(content, folder / file)
        with pytest.raises(ValueError, match="it would run code") as error:
            load_reward(name, path=str(folder))
        assert str(folder) in str(error.value)
    if name == "aesthetic":
        (folder / file).write_bytes(pickle.dumps(Bomb()))  # a plain pickle, not a torch file
        with pytest.raises(ValueError, match=file):
            load_reward(name, path=str(folder))
    assert not (tmp_path / "ran").exists()


HUB_SESSION = """
import huggingface_hub.constants
from reward_models import load_rewards, parse_reward

def attempt(entry):
    try:
        load_rewards(parse_reward(entry), {})
        print(f"{entry} loaded")
    except ValueError as error:
        print(error)

for entry in (
    "clip_score", "clip_score@v7", "aesthetic@v7", "aesthetic@v8", "pickscore", "imagereward", "hpsv2"
):
    attempt(entry)
huggingface_hub.constants.HF_HUB_OFFLINE = True
attempt("clip_score")
attempt("hpsv2.1")
"""


def test_rewards_are_loaded_from_the_hub_and_its_refusals_are_explained(tmp_path):
    """The real client talks to a server on this machine. It reads the server's address when it is imported."""
    clip = {file: open(os.path.join(TINY_CLIP, file), "rb").read() for file in os.listdir(TINY_CLIP)}
    head = io.BytesIO()
    torch.save(load_file(HEAD), head)
    files = {
        ("openai/clip-vit-large-patch14", "main"): clip,
        ("openai/clip-vit-large-patch14", "v7"): clip,
        ("trl-lib/ddpo-aesthetic-predictor", "v7"): {"aesthetic-model.pth": head.getvalue()},
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "main"): clip,
        ("xswu/HPSv2", "main"): {"README.md": b""},
    }
    refused = {"yuvalkirstain/PickScore_v1": (403, "GatedRepo"), "THUDM/ImageReward": (401, "RepoNotFound")}
    with LoopbackHub(files, refused) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": ROOT}
        command = [sys.executable, "-c", HUB_SESSION]
        session = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = session.stdout.splitlines()
    expected = (
        r"clip_score loaded",
        r"clip_score@v7 loaded",
        r"aesthetic@v7 loaded",
        r"reward 'aesthetic@v8' cannot be loaded: 'trl-lib/.*': the repository has no such revision",
        r"reward 'pickscore' .* 'yuvalkirstain/PickScore_v1': the repository is gated: accept its terms .*",
        r"reward 'imagereward' .* 'THUDM/ImageReward': there is no such repository, or it is private: .*",
        r"reward 'hpsv2' .* 'xswu/HPSv2': the repository has no such file",
        r"clip_score loaded",  # from the cache
        r"reward 'hpsv2.1' .* 'xswu/HPSv2': the Hub cannot be reached and the files are not in the cache: .*",
    )
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line)
