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
"""Damaged models: refused in one line that names the component, and never loaded as another model."""

import json
import os
import shutil

import pytest
import torch
import transformers
from diffusion_models import load_model
from diffusion_models.loading import _load_part, load_vae
from rlr_models import FOLDERS, cache_repository, edit_json, plain_pipeline
from rlr_testing import TINY_SD, refused
from safetensors.torch import load_file, save_file

import diffusers
from diffusers import AutoencoderTiny


WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
FILES = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "text_encoder/config.json"),
    *("unet/config.json", "vae/config.json", "tokenizer/tokenizer_config.json", *WEIGHTS.values()),
)
DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "list": lambda content: b"[]",
    "number": lambda content: b"1",
    "text": lambda content: b'"x"',
    "null": lambda content: b"null",
    "object": lambda content: b"{}",
}
# A tokenizer is whole without its configuration: the class is in model_index.json, the length is the text encoder's.
SPARE = {("tokenizer/tokenizer_config.json", damage) for damage in ("missing", "object")}


def linked(folder, target):
    """A copy of a model's folder whose weights are links: those must be replaced, not written into."""
    for root, _, names in os.walk(folder):
        place = os.path.join(target, os.path.relpath(root, folder))
        os.makedirs(place)
        for name in names:
            put = os.symlink if name.endswith(".safetensors") else shutil.copy
            put(os.path.abspath(os.path.join(root, name)), os.path.join(place, name))
    return target


def replaced(path, content):
    os.remove(path)
    if content is not None:
        path.write_bytes(content)


def assert_refused(folder, message="."):
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded: {message}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused_with_the_name_of_its_component(tmp_path, file, damage):
    folder = linked(TINY_SD, tmp_path / "model")
    replaced(folder / file, DAMAGES[damage]((folder / file).read_bytes()))
    if (file, damage) in SPARE:
        model, whole = load_model(str(folder)), load_model(TINY_SD)
        prompts = ["a red one", "", "a blue two " * 20]
        assert torch.equal(model.embed(prompts)["prompt_embeds"], whole.embed(prompts)["prompt_embeds"])
    else:
        name = os.path.dirname(file)
        assert_refused(folder, f"{name}: ." if name else ".*model_index.json|.*model'")


@pytest.mark.parametrize("folder", [*WEIGHTS, "scheduler", "tokenizer"])
def test_an_empty_folder_is_refused(tmp_path, folder):
    """Of which transformers makes a tokenizer that knows two tokens."""
    model = linked(TINY_SD, tmp_path / "model")
    for path in (model / folder).iterdir():
        path.unlink()
    assert_refused(model, f"{folder}: .")


COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (..., "model_index.json says null, not a class of diffusers or transformers"),
        (None, "model_index.json says null, not a class of"),
        ([None, None], r"model_index.json says \[null, null\], not a class of"),
        ([], r"model_index.json says \[\], not a class of"),
        (1, "model_index.json says 1, not a class of"),
        ("UNet2DConditionModel", 'model_index.json says "UNet2DConditionModel", not a class of'),
        (["os", "system"], r'model_index.json says \["os", "system"\], not a class of'),
        (["diffusers", "Nothing"], "AttributeError: module diffusers has no attribute Nothing"),
        (["transformers", None], "TypeError: "),
        (["diffusers", "ConsistencyModelPipeline"], "."),
    ],
    ids=str,
)
def test_an_entry_of_model_index_that_is_no_component_is_refused(tmp_path, name, entry, message):
    folder = linked(TINY_SD, tmp_path / "model")
    index = {**json.loads((folder / "model_index.json").read_text()), name: entry}
    index = {key: value for key, value in index.items() if value is not ...}
    replaced(folder / "model_index.json", json.dumps(index).encode())
    assert_refused(folder, f"{name}: {message}")


@pytest.mark.parametrize("value", [..., None, 1, []])
def test_a_model_index_without_the_name_of_a_pipeline_is_refused(tmp_path, value):
    folder = linked(TINY_SD, tmp_path / "model")
    index = {**json.loads((folder / "model_index.json").read_text()), "_class_name": value}
    index = {key: value for key, value in index.items() if value is not ...}
    replaced(folder / "model_index.json", json.dumps(index).encode())
    assert_refused(folder, "its model_index.json does not name a pipeline")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_lack_a_tensor_are_refused(tmp_path, name):
    """Which the libraries would draw at random, with a warning."""
    folder = linked(TINY_SD, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS[name])
    key = sorted(tensors)[3]
    del tensors[key]
    os.remove(folder / WEIGHTS[name])
    save_file(tensors, folder / WEIGHTS[name], metadata={"format": "pt"})
    assert_refused(folder, f"{name}: its weights lack 1 tensors of .*, such as '{key.removeprefix('text_model.')}'")


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_weights_without_a_place_are_refused(tmp_path, name):
    """As where a configuration has lost its number of layers."""
    folder = linked(TINY_SD, tmp_path / "model")
    tensors = {**load_file(folder / WEIGHTS[name]), "more.weight": torch.ones(2)}
    os.remove(folder / WEIGHTS[name])
    save_file(tensors, folder / WEIGHTS[name], metadata={"format": "pt"})
    assert_refused(folder, f"{name}: its config.json has no place for 1 tensors, such as 'more.weight'")


# Entries whose loss changes nothing: of versions and names, those of no use without a loss, that of the projection, which
# this text encoder has not, what the chain sets itself, and the size, which is asked for where it is missing. The last two
# cannot be told from those of older schedulers, which did not write them.
UNUSED = ("architectures", "model_type", "transformers_version", "bos_token_id", "pad_token_id", "projection_dim")
UNUSED = {*UNUSED, "clip_sample", "sample_size", "steps_offset", "set_alpha_to_one"}


@pytest.mark.parametrize("name", ["scheduler", *WEIGHTS])
def test_an_entry_that_a_configuration_lacks_is_refused_unless_its_default_is_the_same(tmp_path, name):
    folder = linked(TINY_SD, tmp_path / "model")
    library, class_name = json.loads((folder / "model_index.json").read_text())[name]
    component_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    written = json.loads(path.read_text())

    def entries():
        config = _load_part(component_class, folder, name, torch.float32, None).config
        content = dict(config) if library == "diffusers" else config.to_dict()
        return {key: value for key, value in content.items() if not key.startswith("_") and key not in UNUSED}

    whole, refused_entries = entries(), set()
    for entry in written:
        replaced(path, json.dumps({key: value for key, value in written.items() if key != entry}).encode())
        try:
            found = entries()
        except Exception:  # of any type: `load_model` makes them one line
            refused_entries.add(entry)
        else:
            assert found == whole, entry
    expected = {
        "scheduler": {"beta_start", "beta_end", "beta_schedule", "prediction_type"},
        "unet": {"attention_head_dim", "cross_attention_dim", "norm_num_groups", "layers_per_block"},
        "vae": {"scaling_factor", "norm_num_groups", "block_out_channels"},
        "text_encoder": {"num_attention_heads", "hidden_act", "num_hidden_layers", "hidden_size", "eos_token_id"},
    }
    assert refused_entries >= expected[name]


def test_an_old_configuration_may_lack_entries_that_were_not_there_yet(tmp_path):
    """As those of Stable Diffusion 1.4 do."""
    folder = linked(TINY_SD, tmp_path / "model")
    changes = {"scheduler": ("prediction_type", "timestep_spacing"), "vae": ("scaling_factor",)}
    for name, entries in changes.items():
        path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        edit_json(path, {"_diffusers_version": "0.10.2", **dict.fromkeys(entries)})
    model = load_model(str(folder))
    assert model.pipeline.vae.config.scaling_factor == 0.18215
    assert model.pipeline.scheduler.config.prediction_type == "epsilon"


def test_a_repository_is_loaded_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache_repository(TINY_SD, "someone/tiny", tmp_path)
    model, whole = load_model("someone/tiny", cache_dir=str(tmp_path)), load_model(TINY_SD)
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), whole.network.parameters()))
    assert torch.equal(model.embed(["a red one"])["prompt_embeds"], whole.embed(["a red one"])["prompt_embeds"])


# Variants


@pytest.mark.parametrize("family", FOLDERS)
def test_a_variant_is_loaded_where_a_component_has_it(tmp_path, family):
    pipeline = plain_pipeline(FOLDERS[family]())
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    folder = linked(FOLDERS[family](), tmp_path / "model")
    pipeline.unet.save_pretrained(folder / "unet", variant="fp16")
    model = load_model(str(folder), variant="fp16")
    assert not model.network.conv_out.weight.any() and load_model(str(folder)).network.conv_out.weight.any()


def test_a_variant_that_no_component_has_is_refused(tmp_path, capsys):
    message = refused(tmp_path / "out", capsys, "--variant", "fp16")
    assert (
        f"--pretrained_model_name_or_path '{TINY_SD}' cannot be loaded: it has no files of the variant 'fp16'"
        in message
    )


# VAEs


def test_a_vae_without_a_weight_is_refused(tmp_path):
    tiny = AutoencoderTiny(
        **{"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)},
        **{"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    )
    tiny.save_pretrained(tmp_path)
    assert load_vae(str(tmp_path), "AutoencoderTiny", torch.float32).config.latent_channels == 4
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"^'{tmp_path}' cannot be loaded: its weights lack 1 tensors of AutoencoderTiny"
    ):
        load_vae(str(tmp_path), "AutoencoderTiny", torch.float32)


def test_a_vae_without_its_scale_is_refused(tmp_path):
    folder = linked(os.path.join(TINY_SD, "vae"), tmp_path / "vae")
    edit_json(folder / "config.json", {"scaling_factor": None})
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded: its configuration has no 'scaling_factor'"):
        load_vae(str(folder), "AutoencoderKL", torch.float32)
