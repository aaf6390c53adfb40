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
"""LoRA files of every layout: the update of each layer is (alpha / rank) B A of the file."""

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.adapters import load_adapter, load_lora, save_lora
from diffusion_models.lora_files import LORA_FILE, find_lora, read_lora
from diffusion_models.original_names import original_names
from peft import LoraConfig, get_peft_model
from rlr_loras import LAYERS, assert_updates, config_of, expected_updates, in_diffusers, in_kohya, matrices_of, save
from rlr_models import FOLDERS, plain_pipeline
from rlr_testing import tiny_model, tiny_pipeline


ENCODER_LAYERS = {"encoder.layers.0.self_attn.q_proj": (4, 2.0), "encoder.layers.1.mlp.fc1": (2, 4.0)}


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request):
    return FOLDERS[request.param]()


@pytest.fixture(scope="module")
def pipeline():
    """One that no test changes."""
    return tiny_pipeline()


LAYOUTS = {
    "kohya": lambda unet, matrices: (in_kohya(matrices), None),
    "kohya with original names": lambda unet, matrices: (
        in_kohya(matrices, lambda name: original_names(unet)[name]),
        None,
    ),
    "diffusers": lambda unet, matrices: (
        in_diffusers(matrices, ".lora.down.weight", ".lora.up.weight"),
        config_of(matrices),
    ),
    "peft in diffusers": lambda unet, matrices: (
        in_diffusers(matrices, ".lora_A.weight", ".lora_B.weight"),
        config_of(matrices),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_has_the_scale_that_its_file_gives_it(tmp_path, folder, layout):
    """When trained further, when evaluated, and when a plain pipeline reads what is saved."""
    model = load_model(folder)
    matrices = matrices_of(model.network)
    tensors, config = LAYOUTS[layout](model.network, matrices)
    path, expected = save(tensors, tmp_path / "lora.safetensors", config), expected_updates(matrices)
    load_lora(model, path)
    save_lora(model, tmp_path / "saved")
    assert_updates(model.network, expected)
    evaluated, plain = plain_pipeline(folder), plain_pipeline(folder)
    load_adapter(evaluated, path, "one")
    assert_updates(evaluated.unet, expected)
    plain.load_lora_weights(tmp_path / "saved")
    assert_updates(plain.unet, expected)


def test_one_scale_of_all_layers_is_kept_and_the_matrices_are_those_of_the_file(tmp_path):
    model = tiny_model()
    layers = {name: (rank, 0.5 * rank) for name, (rank, _) in LAYERS.items()}
    matrices = matrices_of(model.network, layers)
    load_lora(model, save(in_kohya(matrices), tmp_path / "lora.safetensors"))
    for name, (A, B, alpha) in matrices.items():
        module = model.network.get_submodule(name)
        assert torch.equal(module.lora_A["default"].weight, A) and torch.equal(module.lora_B["default"].weight, B)
        assert module.scaling["default"] == 0.5
    config = model.network.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 2)


def test_a_layer_without_an_alpha_has_the_scale_one(tmp_path, pipeline):
    matrices = matrices_of(pipeline.unet)
    tensors = in_kohya(matrices)
    name = next(iter(LAYERS))
    del tensors["lora_unet_" + name.replace(".", "_") + ".alpha"]
    read = read_lora(save(tensors, tmp_path / "lora.safetensors"), pipeline)["unet"]
    scales = {key: alpha / rank for key, (rank, alpha) in LAYERS.items()}
    assert {key: layer.scale for key, layer in read.items()} == {**scales, name: 1.0}


def test_the_scale_of_rslora_is_alpha_by_the_root_of_the_rank(tmp_path, pipeline):
    matrices = matrices_of(pipeline.unet)
    tensors = in_diffusers(matrices, ".lora_A.weight", ".lora_B.weight")
    path = save(tensors, tmp_path / "lora.safetensors", config_of(matrices, use_rslora=True))
    evaluated = tiny_pipeline()
    load_adapter(evaluated, path, "one")
    assert_updates(evaluated.unet, expected_updates(matrices, lambda alpha, rank: alpha / rank**0.5))


@pytest.mark.parametrize("names", [(".lora.down.weight", ".lora.up.weight"), (".lora_A.weight", ".lora_B.weight")])
def test_without_a_configuration_the_scale_is_one(tmp_path, pipeline, names):
    matrices = matrices_of(pipeline.unet)
    read = read_lora(save(in_diffusers(matrices, *names), tmp_path / "lora.safetensors"), pipeline)["unet"]
    assert {layer.scale for layer in read.values()} == {1.0} and read.keys() == matrices.keys()


def test_the_names_of_old_diffusers_are_read(tmp_path, pipeline):
    matrices = matrices_of(pipeline.unet, {name: LAYERS[name] for name in LAYERS if ".attn" in name})
    tensors = {}
    for name, (A, B, _) in matrices.items():
        attention, layer = name.split(".to_")
        key = f"unet.{attention}.processor.to_{layer.removesuffix('.0')}_lora"
        tensors |= {f"{key}.down.weight": A, f"{key}.up.weight": B}
    plain = tiny_pipeline()
    plain.load_lora_weights(save(tensors, tmp_path / "lora.safetensors"))
    read = read_lora(str(tmp_path / "lora.safetensors"), pipeline)["unet"]
    assert read.keys() == matrices.keys()
    for name, layer in read.items():
        module = plain.unet.get_submodule(name)
        assert torch.equal(module.lora_A["default_0"].weight, layer.A)
        assert torch.equal(module.lora_B["default_0"].weight, layer.B)


def test_matrices_of_a_1x1_convolution_may_have_two_dimensions(tmp_path, pipeline):
    name = "up_blocks.0.attentions.0.proj_in"
    matrices = matrices_of(pipeline.unet, {name: (4, 2.0)})
    tensors = {key: value.flatten(1) if value.ndim else value for key, value in in_kohya(matrices).items()}
    layer = read_lora(save(tensors, tmp_path / "lora.safetensors"), pipeline)["unet"][name]
    assert torch.equal(layer.A, matrices[name][0]) and torch.equal(layer.B, matrices[name][1])


def test_layers_of_text_encoders_are_evaluated(tmp_path, folder):
    """In kohya's layout, with alphas that differ. Two adapters of different components do not mix."""
    pipeline = plain_pipeline(folder)
    names = {"text_encoder": ["lora_te1_" if hasattr(pipeline, "text_encoder_2") else "lora_te_"]}
    if hasattr(pipeline, "text_encoder_2"):
        names["text_encoder_2"] = ["lora_te2_"]
    tensors, expected = {}, {}
    for component, (prefix,) in names.items():
        encoder = getattr(pipeline, component)
        start = "text_model." if hasattr(encoder, "text_model") else ""
        matrices = matrices_of(encoder, {start + name: value for name, value in ENCODER_LAYERS.items()})
        expected[component] = expected_updates(matrices)
        tensors |= in_kohya(matrices, lambda name: f"text_model.{name.removeprefix('text_model.')}", prefix)
    load_adapter(pipeline, save(tensors, tmp_path / "text.safetensors"), "text")
    unet = matrices_of(pipeline.unet)
    load_adapter(pipeline, save(in_kohya(unet), tmp_path / "unet.safetensors"), "unet")
    pipeline.set_adapters(["text"], [1.0])
    for component, weights in expected.items():
        assert_updates(getattr(pipeline, component), weights)
    pipeline.set_adapters(["unet"], [1.0])
    assert_updates(pipeline.unet, expected_updates(unet))
    name, weight = next(iter(expected["text_encoder"].items()))
    module, x = pipeline.text_encoder.get_submodule(name), torch.randn(3, weight.shape[1], dtype=torch.float64)
    assert torch.equal(module(x), module.base_layer(x))


def test_several_adapters_are_evaluated_side_by_side(tmp_path, folder):
    """With original names, where the layers of the second have the first already."""
    pipeline, expected = plain_pipeline(folder), {}
    for name in ("first", "second"):
        matrices = matrices_of(plain_pipeline(folder).unet)
        originals = original_names(pipeline.unet)
        path = save(in_kohya(matrices, originals.get), tmp_path / f"{name}.safetensors")
        load_adapter(pipeline, path, name)
        expected[name] = expected_updates(matrices)
    for name, updates in expected.items():
        pipeline.set_adapters([name], [1.0])
        assert_updates(pipeline.unet, updates)


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"to_q": 9}}]
)
def test_a_folder_of_peft_is_read(tmp_path, changes):
    """As its own `save_pretrained` writes it."""
    peft_model = get_peft_model(
        tiny_pipeline().unet, LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], **changes)
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path / "peft")
    trained, evaluated = tiny_model(), tiny_pipeline()
    load_lora(trained, str(tmp_path / "peft"))
    load_adapter(evaluated, str(tmp_path / "peft"), "one")
    x, timestep = torch.randn(2, 4, 8, 8), torch.tensor(500)
    embeds = torch.randn(2, 16, 64)
    with torch.no_grad():
        base, wanted, *found = (
            network(x, timestep, encoder_hidden_states=embeds).sample
            for network in (tiny_pipeline().unet, peft_model, trained.network, evaluated.unet)
        )
    assert (wanted - base).abs().max() > 0.1
    for prediction in found:
        torch.testing.assert_close(prediction, wanted, rtol=1e-4, atol=1e-4)


def test_a_dora_is_evaluated_and_not_trained_further(tmp_path):
    """peft's gradient of a DoRA holds the norm of the weights fixed."""
    model = tiny_model()
    model.network.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1", "to_out.0"], use_dora=True)
    )
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    save_lora(model, tmp_path)
    pipeline = tiny_pipeline()
    load_adapter(pipeline, str(tmp_path), "one")
    own = {name: value for name, value in model.network.state_dict().items() if "lora_" in name}
    read = {
        name.replace(".one", ".default"): value
        for name, value in pipeline.unet.state_dict().items()
        if "lora_" in name
    }
    assert own.keys() == read.keys() and any("magnitude" in name for name in own)
    assert all(torch.equal(own[name], read[name]) for name in own)
    with pytest.raises(
        ValueError, match="cannot be loaded: it is a DoRA, whose gradient peft approximates: use a LoRA"
    ):
        load_lora(tiny_model(), str(tmp_path))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([LORA_FILE, "adapter_model.safetensors", "other.safetensors"], LORA_FILE),
        (["adapter_model.safetensors", "other.safetensors"], "adapter_model.safetensors"),
        (["other.safetensors", "optimizer.bin", "optimizer.safetensors", "old.bin"], "other.safetensors"),
        (["old.bin", "optimizer.bin"], "old.bin"),
    ],
)
def test_the_file_of_a_folder_is_found(tmp_path, names, found):
    for name in names:
        (tmp_path / name).touch()
    assert find_lora(str(tmp_path)) == str(tmp_path / found)
    assert find_lora(str(tmp_path / names[-1])) == str(tmp_path / names[-1])
