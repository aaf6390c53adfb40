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
"""The LoRA of a model: what is written is what diffusers reads, and is read as it was written."""

import json
import os

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.adapters import (
    LORA_FILE,
    add_lora,
    load_lora,
    lora_disabled,
    restore_lora,
    save_lora,
)
from peft.utils import get_peft_model_state_dict
from rlr_models import FOLDERS, PROMPTS, plain_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file


LAYERS = ("to_k", "to_v")
# Layers in the names of other trainers, which are told apart by the U-Net's configuration for SDXL.
STABILITY = {
    "down_blocks.1.attentions.0": "input_blocks_3_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.0": "output_blocks_0_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
}


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request):
    return FOLDERS[request.param]()


@pytest.fixture
def tuned(folder):
    """A model with a LoRA of rank 2 and alpha 8 whose weights are random."""
    model = load_model(folder)
    add_lora(model, rank=2, alpha=8, layers=LAYERS)
    for parameter in trainable(model):
        parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def trainable(model):
    return [p for p in model.network.parameters() if p.requires_grad]


def predict(model):
    """The network's prediction for fixed latents."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.call(model.network, x, 500, model.embed(PROMPTS), model.static((64, 64))).float()


def layers_of(model):
    """The weights of a LoRA by the names of diffusers."""
    found = get_peft_model_state_dict(model.network)
    names = {key: f"unet.{key}".replace("lora_A", "lora.down").replace("lora_B", "lora.up") for key in found}
    return {names[key]: value.clone() for key, value in found.items()}


def assert_same_layers(found, expected):
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(value, expected[key]) and value.dtype == torch.float32 for key, value in found.items())


# A new LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_lora_changes_nothing_and_is_trained_in_float32(folder, dtype):
    model = load_model(folder, dtype=dtype)
    before = predict(model)
    names = [name for name, _ in model.network.named_modules() if name.rpartition(".")[2] in LAYERS]
    add_lora(model, rank=3, alpha=6, layers=LAYERS)
    assert torch.equal(predict(model), before)
    assert len(trainable(model)) == 2 * len(names) > 0 and {p.dtype for p in trainable(model)} == {torch.float32}
    assert all("lora_" in name for name, p in model.network.named_parameters() if p.requires_grad)
    config = model.network.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, set(LAYERS))
    assert model.network.dtype == dtype


@pytest.mark.parametrize("layer", ["to_nothing", "o_k", "to_"])
def test_a_layer_that_the_network_lacks_is_refused(folder, layer):
    model = load_model(folder)
    with pytest.raises(ValueError, match=f"the unet has no layer '{layer}'"):
        add_lora(model, rank=2, alpha=2, layers=["to_k", layer])
    assert not trainable(model)


# Saving and loading


def test_diffusers_loads_what_is_saved(tmp_path, folder, tuned):
    save_lora(tuned, tmp_path)
    assert os.listdir(tmp_path) == [LORA_FILE]
    layers = load_file(tmp_path / LORA_FILE)
    assert_same_layers(layers, layers_of(tuned))
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 2 and metadata["unet.lora_alpha"] == 8
    pipeline = plain_pipeline(folder)
    pipeline.load_lora_weights(tmp_path)
    base = load_model(folder)
    before = predict(base)
    base.pipeline.unet = pipeline.unet
    torch.testing.assert_close(predict(base), predict(tuned), rtol=1e-4, atol=1e-4)
    assert (before - predict(tuned)).abs().max() > 0.01


def test_diffusers_reads_all_layers_that_are_saved(tmp_path, folder):
    """Of layers in different names it would take those of the first name only."""
    model = load_model(folder)
    add_lora(model, rank=2, alpha=4, layers=["conv_in", "to_k", "ff.net.0.proj"])
    save_lora(model, tmp_path)
    pipeline = plain_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, adapter_name="default")
    own = get_peft_model_state_dict(model.network)
    read = get_peft_model_state_dict(pipeline.unet)
    assert own.keys() == read.keys() and len({key.rpartition(".lora_")[0].rpartition(".")[2] for key in own}) == 3
    assert all(torch.equal(own[key], read[key]) for key in own if "lora_A" in key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_lora_is_trained_further_as_it_was_written(tmp_path, folder, tuned, dtype):
    save_lora(tuned, tmp_path / "first")
    model = load_model(folder, dtype=dtype)
    load_lora(model, str(tmp_path / "first"))
    assert_same_layers(layers_of(model), layers_of(tuned))
    assert len(trainable(model)) == len(trainable(tuned)) and model.network.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(predict(model), predict(tuned), rtol=1e-4, atol=1e-4)
    save_lora(model, tmp_path / "second")
    assert_same_layers(load_file(tmp_path / "second" / LORA_FILE), layers_of(tuned))
    with safe_open(tmp_path / "second" / LORA_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 8


def test_a_lora_is_found_in_a_folder_and_under_other_names(tmp_path, folder, tuned):
    """An output folder holds others in best/ and ema/, too."""
    out, other = tmp_path / "out", tmp_path / "other"
    for place in (out, out / "best", out / "ema", other):
        save_lora(tuned, place)
        with torch.no_grad():
            trainable(tuned)[0].add_(1)
    expected = {name: load_file(path / LORA_FILE) for name, path in (("out", out), ("other", other))}
    os.rename(other / LORA_FILE, other / "mine.safetensors")
    for source, name in (
        (out, "out"),
        (out / LORA_FILE, "out"),
        (other, "other"),
        (other / "mine.safetensors", "other"),
    ):
        model = load_model(folder)
        load_lora(model, str(source))
        assert_same_layers(layers_of(model), expected[name])


def in_other_names(layers, blocks):
    """The layers in the layout of kohya-ss, with an alpha each, and with other names for some blocks."""
    renamed = {}
    for key, value in layers.items():
        name, _, end = key.removeprefix("unet.").rpartition(".lora.")
        for block, other in blocks.items():
            name = name.replace(block, other)
        name = "lora_unet_" + name.replace(".", "_")
        renamed[f"{name}.lora_{end}"] = value
        renamed[f"{name}.alpha"] = torch.tensor(8.0)
    return renamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_in_the_names_of_other_trainers_is_loaded_in_full_precision(tmp_path, folder, tuned, dtype):
    """Those of diffusers, and for SDXL those of Stability's code."""
    ours, is_xl = layers_of(tuned), len(tuned.text_encoders) == 2
    for blocks in [{}, STABILITY] if is_xl else [{}]:
        save_file(in_other_names(ours, blocks), tmp_path / "theirs.safetensors")
        model = load_model(folder, dtype=dtype)
        load_lora(model, str(tmp_path / "theirs.safetensors"))
        assert_same_layers(layers_of(model), ours)
        if dtype == torch.float32:
            torch.testing.assert_close(predict(model), predict(tuned), rtol=1e-4, atol=1e-4)


# What is refused


def test_layers_of_a_text_encoder_are_refused(tmp_path, folder, tuned):
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    names = f"{name}.lora_linear_layer.down.weight", f"{name}.lora_linear_layer.up.weight"
    save_file({**layers_of(tuned), names[0]: torch.ones(2, 64), names[1]: torch.ones(256, 2)}, tmp_path / LORA_FILE)
    model = load_model(folder)
    message = "cannot be loaded: it has layers of the text_encoder, and only the unet is trained"
    with pytest.raises(ValueError, match=message) as error:
        load_lora(model, str(tmp_path))
    assert str(tmp_path) in str(error.value) and not trainable(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, value: (key, value.repeat(1, 2)), "do not fit a weight of the shape"),
        (lambda key, value: (key.replace("attn1", "attn9"), value), "attn9.*: the base model has no such linear"),
    ],
    ids=["sizes", "layers"],
)
def test_a_lora_of_another_network_is_refused(tmp_path, folder, tuned, change, message):
    save_file(dict(change(key, value) for key, value in layers_of(tuned).items()), tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
        load_lora(load_model(folder), str(tmp_path))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_source_that_cannot_be_read_is_named(tmp_path, content):
    source = tmp_path / "lora"
    if content is not None:
        source.mkdir()
        (source / LORA_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="lora' cannot be loaded: .+"):
        load_lora(load_model(FOLDERS["StableDiffusionPipeline"]()), str(source))


# The weights of a LoRA that is there


def test_a_lora_gets_back_the_weights_that_were_saved(tmp_path, tuned):
    saved, before = layers_of(tuned), predict(tuned)
    save_lora(tuned, tmp_path)
    with torch.no_grad():
        for parameter in trainable(tuned):
            parameter.add_(1)
    assert not torch.equal(predict(tuned), before)
    kept = trainable(tuned)
    restore_lora(tuned, tmp_path)
    assert_same_layers(layers_of(tuned), saved)
    # The optimizer holds the same parameters.
    assert all(a is b for a, b in zip(kept, trainable(tuned))) and torch.equal(predict(tuned), before)


@pytest.mark.parametrize(
    ("rank", "layers", "message"),
    [
        (4, LAYERS, "size mismatch"),
        (2, [*LAYERS, "to_q"], "the adapter has no layer '.*to_q"),
        (2, LAYERS[:1], "the adapter has the layer '.*to_v"),
    ],
)
def test_the_weights_of_another_lora_are_refused(tmp_path, folder, tuned, rank, layers, message):
    other = load_model(folder)
    add_lora(other, rank=rank, alpha=8, layers=layers)
    save_lora(other, tmp_path)
    with pytest.raises(ValueError, match=message):
        restore_lora(tuned, tmp_path)


def test_a_checkpoint_without_its_lora_is_named(tmp_path, tuned):
    with pytest.raises(ValueError, match=f"'{tmp_path}.{LORA_FILE}' cannot be loaded: No such file"):
        restore_lora(tuned, tmp_path)


# The base model


def test_a_disabled_lora_leaves_the_base_model(folder, tuned):
    with_lora, base = predict(tuned), predict(load_model(folder))
    with lora_disabled(tuned):
        assert torch.equal(predict(tuned), base)
    assert torch.equal(predict(tuned), with_lora) and not torch.equal(with_lora, base)
    with pytest.raises(KeyError):
        with lora_disabled(tuned):
            raise KeyError
    assert torch.equal(predict(tuned), with_lora) and len(trainable(tuned)) > 0
