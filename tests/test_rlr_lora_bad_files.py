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
"""LoRA files that are damaged, or hold something else than a LoRA for the model: refused by name, in one line."""

import json
import os

import pytest
import torch
from diffusion_models.adapters import load_adapter
from diffusion_models.lora_files import LORA_FILE, find_lora, read_lora
from rlr_loras import METADATA, config_of, in_diffusers, in_kohya, matrices_of, save
from rlr_testing import tiny_pipeline
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def pipeline():
    """One that no test changes."""
    return tiny_pipeline()


FIRST = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_" + FIRST.replace(".", "_")


def changed(part, change):
    """Rows that change one tensor of a file."""
    return lambda tensors: {**tensors, f"{KEY}.{part}": change(tensors[f"{KEY}.{part}"])}


def added(key, *shape):
    return lambda tensors: {**tensors, key: torch.ones(*shape)}


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if key != f"{KEY}.{part}"}


BAD_TENSORS = {
    "nan": (
        changed("lora_down.weight", lambda value: value * float("nan")),
        f"'{KEY}.lora_down.weight' has numbers that",
    ),
    "infinite": (
        changed("lora_up.weight", lambda value: value.double() * 1e300),
        f"'{KEY}.lora_up.weight' has numbers th",
    ),
    "integers": (changed("lora_up.weight", torch.Tensor.int), f"'{KEY}.lora_up.weight' has no floating-point numbers"),
    "vector": (changed("lora_down.weight", torch.Tensor.flatten), f"'{KEY}.lora_down.weight' is no matrix"),
    "empty": (changed("lora_down.weight", lambda value: value[:0]), f"'{KEY}.lora_down.weight' is no matrix"),
    "three dimensions": (changed("lora_down.weight", lambda value: value[None]), "lora_down.weight' is no matrix"),
    "no second": (without("lora_up.weight"), f"'{KEY}.*' is without the second matrix of its layer"),
    "no first": (without("lora_down.weight"), f"'{KEY}.*' is without the first matrix of its layer"),
    "alpha alone": (added("lora_unet_conv_out.alpha", 1), "'lora_unet_conv_out.alpha' is without the first matrix"),
    "no alpha": (changed("alpha", lambda value: value * 0), f"'{KEY}.alpha' is not one number other than 0"),
    "two alphas": (changed("alpha", lambda value: value.repeat(2)), f"'{KEY}.alpha' is not one number other than 0"),
    "nan alpha": (
        changed("alpha", lambda value: value * float("nan")),
        f"'{KEY}.alpha' has numbers that are not finite",
    ),
    "ranks": (changed("lora_up.weight", lambda value: value[:, :2]), f"'{KEY}.* do not fit a weight of the shape"),
    "size": (changed("lora_down.weight", lambda value: value[:, 1:]), f"'{KEY}.* do not fit a weight of the shape"),
    "transposed": (changed("lora_up.weight", lambda value: value.T), f"'{KEY}.* do not fit a weight of the shape"),
    "two layouts": (
        added(f"unet.{FIRST}.lora_A.weight", 4, 64),
        f"'{KEY}.lora_down.weight' and 'unet.{FIRST}.lora_A.weight' are the same matrix in two layouts",
    ),
    "unknown layer": (
        added("lora_unet_down_blocks_9_conv.lora_up.weight", 2, 2),
        "'lora_unet_down_blocks_9_conv.* has no",
    ),
    "norm": (
        added("unet.conv_norm_out.lora_A.weight", 2, 64),
        "'unet.conv_norm_out.*: the base model has no such linear",
    ),
    "embedding": (
        added("bundle_emb.my.string_to_param", 2, 64),
        "'bundle_emb.my.string_to_param' is no matrix of a LoRA",
    ),
    "LoHa": (
        added(f"{KEY}.hada_w1_a", 2, 2),
        f"'{KEY}.hada_w1_a' is no matrix of a LoRA, and other kinds of adapters",
    ),
    "LoKr": (added(f"{KEY}.lokr_w1", 2, 2), f"'{KEY}.lokr_w1' is no matrix of a LoRA"),
    "OFT": (added(f"{KEY}.oft_blocks", 2, 2, 2), f"'{KEY}.oft_blocks' is no matrix of a LoRA"),
    "Tucker": (added(f"{KEY}.lora_mid.weight", 2, 2, 3, 3), f"'{KEY}.lora_mid.weight' is no matrix of a LoRA"),
    "DoRA of kohya": (added(f"{KEY}.dora_scale", 64, 1), f"'{KEY}.dora_scale' is no matrix of a LoRA"),
    "bias": (added(f"unet.{FIRST}.lora_B.bias", 64), f"'unet.{FIRST}.lora_B.bias' is no matrix of a LoRA"),
    "whole weight": (added(f"unet.{FIRST}.weight", 64, 64), f"'unet.{FIRST}.weight' is no matrix of a LoRA"),
    "difference": (added(f"{KEY}.diff", 64, 64), f"'{KEY}.diff' is no matrix of a LoRA"),
    "magnitudes": (added(f"unet.{FIRST}.lora_magnitude_vector", 3), f"'{KEY}.*': its layer is without 64 magnitudes"),
    "nothing": (lambda tensors: {}, "it holds no tensors"),
}


@pytest.mark.parametrize("row", BAD_TENSORS)
def test_a_tensor_that_is_not_of_a_lora_for_the_model_is_named(tmp_path, pipeline, row):
    change, message = BAD_TENSORS[row]
    tensors = in_kohya(matrices_of(pipeline.unet))
    path = save(change(tensors), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, pipeline)
    assert "\n" not in str(error.value)


BAD_ENTRIES = {
    "unknown": ({"nonsense": 1}, "its configuration has the key 'nonsense', which peft does not know"),
    "bias": ({"bias": "all"}, "its configuration has bias 'all', which is not supported"),
    "lora_bias": ({"lora_bias": True}, "its configuration has lora_bias True, which is not supported"),
    "modules_to_save": ({"modules_to_save": ["conv_in"]}, r"modules_to_save \['conv_in'\], which is not supported"),
    "LoHa": ({"peft_type": "LOHA"}, "its configuration has peft_type 'LOHA', which is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base model"),
    "dora": ({"use_dora": True}, "'unet.conv_in.lora_A.weight': its layer is without 64 magnitudes"),
    "no rank": ({"r": ...}, "its configuration has no 'r'"),
    "no alpha": ({"lora_alpha": ...}, "its configuration has no 'lora_alpha'"),
    "text": ({"lora_alpha": "4"}, "its configuration has lora_alpha '4', not a number other than 0"),
    "zero": ({"r": 0}, "its configuration has r 0, not a number other than 0"),
    "nan": ({"lora_alpha": float("nan")}, "its configuration has lora_alpha nan, not a number"),
    "pattern": ({"rank_pattern": [4]}, r"its configuration has rank_pattern \[4\], not numbers by layer"),
    "in a pattern": (
        {"alpha_pattern": {"to_q": None}},
        "its configuration has alpha_pattern of 'to_q' None, not a number",
    ),
    "rank": ({"r": 7}, "its configuration has rank 7 for '.*', and the file 4"),
}


@pytest.mark.parametrize("row", BAD_ENTRIES)
def test_an_entry_of_the_configuration_that_is_not_of_a_lora_is_named(tmp_path, pipeline, row):
    changes, message = BAD_ENTRIES[row]
    matrices = matrices_of(pipeline.unet)
    config = {key: value for key, value in {**config_of(matrices), **changes}.items() if value is not ...}
    path = save(in_diffusers(matrices, ".lora_A.weight", ".lora_B.weight"), tmp_path / "lora.safetensors", config)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, pipeline)
    assert "\n" not in str(error.value)


def test_an_entry_without_a_value_that_peft_does_not_know_is_ignored(tmp_path, pipeline):
    matrices = matrices_of(pipeline.unet)
    config = {**config_of(matrices), "from_the_future": None, "lora_dropout": 0.1, "inference_mode": True}
    path = save(in_diffusers(matrices, ".lora_A.weight", ".lora_B.weight"), tmp_path / "lora.safetensors", config)
    assert read_lora(path, pipeline)["unet"].keys() == matrices.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "its metadata 'lora_adapter_metadata' is no JSON"),
        ('{"unet.r": 4', "its metadata 'lora_adapter_metadata' is no JSON"),
        ("[4]", "its metadata 'lora_adapter_metadata' is not a JSON object"),
        ("4", "its metadata 'lora_adapter_metadata' is not a JSON object"),
        ('"r"', "its metadata 'lora_adapter_metadata' is not a JSON object"),
        ("null", "its metadata 'lora_adapter_metadata' is not a JSON object"),
        ('{"transformer.r": 4}', "its metadata has the key 'transformer.r', of no component of the base model"),
        (
            '{"text_encoder.r": 4, "text_encoder.lora_alpha": 4}',
            "it has layers of the unet, and no configuration of them",
        ),
    ],
)
def test_metadata_that_are_no_configuration_are_refused(tmp_path, pipeline, content, message):
    tensors = in_diffusers(matrices_of(pipeline.unet), ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"format": "pt", METADATA: content})
    with pytest.raises(ValueError, match=message):
        read_lora(str(tmp_path / "lora.safetensors"), pipeline)


def test_an_alpha_in_the_file_and_another_in_the_metadata_are_refused(tmp_path, pipeline):
    matrices = matrices_of(pipeline.unet)
    path = save(in_kohya(matrices), tmp_path / "lora.safetensors", config_of(matrices))
    with pytest.raises(ValueError, match="'lora_unet_conv_in.alpha': its layer has another alpha in the metadata"):
        read_lora(path, pipeline)


def test_magnitudes_of_some_layers_only_are_refused(tmp_path):
    pipeline = tiny_pipeline()
    tensors = {**in_kohya(matrices_of(pipeline.unet)), f"unet.{FIRST}.lora_magnitude_vector": torch.ones(64)}
    with pytest.raises(ValueError, match="some of its layers have the magnitudes of a DoRA, and some do not"):
        load_adapter(pipeline, save(tensors, tmp_path / "lora.safetensors"), "one")


# Damaged files


def cut(content):
    return content[: len(content) // 2]


DAMAGES = {
    "empty": lambda content: b"",
    "half": cut,
    "list": lambda content: b"[]",
    "number": lambda content: b"1",
    "text": lambda content: b'"x"',
    "null": lambda content: b"null",
    "object": lambda content: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", LORA_FILE, "pytorch_lora_weights.bin"]
)
def test_a_damaged_file_is_an_error_of_one_line_that_names_the_source(tmp_path, pipeline, name, damage):
    matrices = matrices_of(pipeline.unet)
    tensors = in_diffusers(matrices, ".lora_A.weight", ".lora_B.weight")
    if name.startswith("adapter_"):
        tensors = {key.replace("unet.", "base_model.model."): value for key, value in tensors.items()}
        save(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config_of(matrices)))
    elif name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save(tensors, tmp_path / name)
    assert read_lora(find_lora(str(tmp_path)), pipeline)["unet"].keys() == matrices.keys()
    (tmp_path / name).write_bytes(DAMAGES[damage]((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"^'{tmp_path}' cannot be loaded: .") as error:
        load_adapter(pipeline, str(tmp_path), "one")
    assert "\n" not in str(error.value)


def test_a_folder_of_peft_without_its_configuration_is_refused(tmp_path, pipeline):
    tensors = in_diffusers(matrices_of(pipeline.unet), ".lora_A.weight", ".lora_B.weight")
    save(
        {key.replace("unet.", "base_model.model."): value for key, value in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="it is in PEFT's layout, and there is no adapter_config.json beside it"):
        read_lora(find_lora(str(tmp_path)), pipeline)


def test_code_in_a_file_is_not_run(tmp_path, pipeline):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"unet.conv_in.lora_A.weight": Code()}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="cannot be loaded: .*Weights only load failed"):
        load_adapter(pipeline, str(tmp_path), "one")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it holds no file of weights, such as 'pytorch_lora_weights.safetensors'"),
        (
            ["a.safetensors", "b.safetensors"],
            "it holds 2 files, such as 'a.safetensors' and 'b.safetensors': give the path",
        ),
    ],
)
def test_a_folder_without_one_file_of_weights_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        find_lora(str(tmp_path))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        find_lora(str(tmp_path / "nowhere"))
