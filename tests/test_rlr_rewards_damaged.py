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
"""Every file of a reward's folder is damaged in every way: loading ends in one line that names the file or its folder."""

import json
import os
import shutil

import pytest
from reward_models import load_reward
from rlr_tiny_rewards import save_tiny_rewards, split_tokenizer


TOWER = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
TEXT = [f"text_config.{key}" for key in (*TOWER, "vocab_size", "max_position_embeddings", "eos_token_id")]
VISION = [f"vision_config.{key}" for key in (*TOWER, "image_size", "patch_size")]
CLIP = ["projection_dim", *TEXT, *VISION]
TOKENIZER = ["added_tokens", "model", "model.merges"]
OPEN_CLIP_TEXT = [f"model_cfg.text_cfg.{key}" for key in ("context_length", "vocab_size", "width", "heads", "layers")]
OPEN_CLIP_VISION = [f"model_cfg.vision_cfg.{key}" for key in ("image_size", "layers", "width", "patch_size")]
OPEN_CLIP = ["model_cfg", "model_cfg.embed_dim", "model_cfg.vision_cfg", "model_cfg.text_cfg"]
BERT = [*TOWER, "vocab_size", "max_position_embeddings", "hidden_act", "layer_norm_eps"]
VIT = ["hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"]

# {reward: {file: entries without which it cannot be read}}
FILES = {
    "aesthetic": {
        "aesthetic_head.safetensors": [],
        "clip/model.safetensors": [],
        "clip/config.json": ["projection_dim", *VISION],
    },
    "clip_score": {
        **{"config.json": CLIP, "model.safetensors": []},
        **{"tokenizer.json": TOKENIZER, "tokenizer_config.json": []},
    },
    "clip_score with merges": {"vocab.json": [], "merges.txt": []},
    "pickscore": {
        **{"config.json": ["projection_dim"], "model.safetensors": []},
        **{"tokenizer.json": TOKENIZER, "tokenizer_config.json": []},
    },
    "hpsv2": {
        "HPS_v2_compressed.pt": [],
        "open_clip_config.json": [*OPEN_CLIP, *OPEN_CLIP_TEXT, *OPEN_CLIP_VISION],
        **{"tokenizer.json": TOKENIZER, "tokenizer_config.json": []},
    },
    "imagereward": {"ImageReward.pt": [], "med_config.json": BERT, "vit_config.json": VIT, "vocab.txt": []},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{reward: folder}, to be left as they are found."""
    paths = save_tiny_rewards(tmp_path_factory.mktemp("originals"))
    paths["clip_score with merges"] = paths["clip_score"]
    copies = tmp_path_factory.mktemp("copies")
    folders = {name: shutil.copytree(paths[name], copies / name) for name in FILES}
    split_tokenizer(folders["clip_score with merges"])
    return folders


def without(content, key):
    """A copy of nested dicts without the entry "a.b.c"."""
    first, dot, rest = key.partition(".")
    if not dot:
        return {name: value for name, value in content.items() if name != first}
    return {**content, first: without(content[first], rest)}


def damages(name, content, required):
    """Yield (description, bytes) of the damaged file."""
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    if name.endswith(".json"):
        for value in ([1, 2], 3, "text"):
            yield f"{value!r}", json.dumps(value).encode()
        for key in required:
            yield f"without {key}", json.dumps(without(json.loads(content), key)).encode()


def failure(reward, folder):
    try:
        load_reward(reward, path=str(folder))
    except ValueError as error:
        return str(error)
    return "it loads"


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_damaged_file_is_named(name, file, folders):
    folder, reward = folders[name], name.split()[0]
    content = (folder / file).read_bytes()
    load_reward(reward, path=str(folder))
    parts = (str(folder / file), os.path.dirname(folder / file))
    try:
        for damage, damaged in damages(file, content, FILES[name][file]):
            (folder / file).write_bytes(damaged)
            message = failure(reward, folder)
            assert message.startswith(f"reward '{reward}' cannot be loaded: "), f"{damage}: {message}"
            assert any(repr(part) in message for part in parts) and "\n" not in message, f"{damage}: {message}"
    finally:
        (folder / file).write_bytes(content)
