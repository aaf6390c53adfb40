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
"""LoRAs of transformers: diffusers draws with what is saved, and every layout is read exactly or refused by name."""

import copy
import json

import pytest
import torch
from diffusion_models import as_model
from diffusion_models.adapters import add_lora, load_adapter, load_lora, lora_disabled, restore_lora, save_lora
from diffusion_models.lora_files import LORA_FILE, read_lora
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rlr_flow_models import FLOW_FOLDERS, plain_flow_pipeline
from rlr_loras import METADATA, assert_updates, expected_updates, in_kohya, save
from rlr_loras import config_of as config_by_endings
from rlr_testing import tiny_model, tiny_pipeline
from safetensors import safe_open
from safetensors.torch import load_file


NAMES = (".lora_A.weight", ".lora_B.weight")
PATTERNS = ("rank_pattern", "alpha_pattern")
CLIP_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")
# (rank, alpha) of one layer after another. Those of one scale have other ranks.
MIXED = [(4, 2.0), (4, 4.0), (2, 4.0), (3, 1.0)]
ONE_SCALE = [(4, 2.0), (2, 1.0), (4, 2.0)]


@pytest.fixture(params=FLOW_FOLDERS, scope="module")
def pipeline(request):
    """One that no test changes."""
    return plain_flow_pipeline(FLOW_FOLDERS[request.param]())


@pytest.fixture(scope="module")
def sd3():
    return plain_flow_pipeline(FLOW_FOLDERS["StableDiffusion3Pipeline"]())


@pytest.fixture(scope="module")
def flux():
    return plain_flow_pipeline(FLOW_FOLDERS["FluxPipeline"]())


def fresh(pipeline):
    """A pipeline of its own, as diffusers loads it."""
    own = {name: copy.deepcopy(getattr(pipeline, name)) for name in pipeline._lora_loadable_modules}
    made = type(pipeline)(**{**pipeline.components, **own})
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline):
    """The latents that a pipeline of diffusers draws from a fixed seed."""
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline(prompt="a red seven", generator=torch.Generator().manual_seed(0), **settings).images


def trained_model(pipeline, **settings):
    """A model with a LoRA whose weights are random; with settings of `LoraConfig`, or else with the family's layers."""
    model = as_model(fresh(pipeline))
    if settings:
        model.network.add_adapter(LoraConfig(**settings))
    else:
        add_lora(model, rank=4, alpha=8, layers=model.lora_layers.split(","))
    for name, parameter in model.network.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    return model


def layers_of(network, settings=MIXED):
    """{name: (rank, alpha)} of all linear and convolutional layers."""
    kinds = torch.nn.Linear, torch.nn.Conv2d
    names = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    return {name: settings[i % len(settings)] for i, name in enumerate(names)}


def matrices_of(network, layers):
    """{name: (A, B, alpha)} with random matrices for layers {name: (rank, alpha)}, small enough to draw with."""
    found = {}
    for name, (rank, alpha) in layers.items():
        shape = network.get_submodule(name).weight.shape
        B = 0.1 * torch.randn(shape[0], rank, *[1] * len(shape[2:]))
        found[name] = 0.1 * torch.randn(rank, *shape[1:]), B, alpha
    return found


def in_diffusers(matrices, prefix="transformer."):
    """Tensors in the layout of diffusers, whose alphas are in the metadata."""
    return {prefix + name + end: one for name, both in matrices.items() for end, one in zip(NAMES, both[:2])}


def alphas_of(matrices):
    return {f"transformer.{name}.alpha": torch.tensor(alpha) for name, (_, _, alpha) in matrices.items()}


def config_of(matrices):
    """The configuration with whole names in its patterns: the ending "proj_out" would be several layers of FLUX."""
    config = config_by_endings(matrices)
    patterns = {key: {f"^{name}": value for name, value in config[key].items()} for key in PATTERNS}
    return {**config, **patterns}


def metadata_of(folder):
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        return json.loads(file.metadata()[METADATA])


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(value, expected[key]) and value.dtype == torch.float32 for key, value in found.items())


# What is saved


def test_diffusers_draws_with_what_is_saved(tmp_path, pipeline):
    """What it draws with the adapter of training, and what it draws when the evaluation has loaded it."""
    model = trained_model(pipeline)
    save_lora(model, tmp_path)
    own = get_peft_model_state_dict(model.network)
    assert all(key.endswith(NAMES) for key in own)
    assert_same_tensors(load_file(tmp_path / LORA_FILE), {f"transformer.{key}": value for key, value in own.items()})
    metadata = metadata_of(tmp_path)
    assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == 8
    plain, evaluated, drawn = fresh(pipeline), fresh(pipeline), draw(model.pipeline)
    plain.load_lora_weights(tmp_path)
    load_adapter(evaluated, str(tmp_path), "one")
    assert torch.equal(draw(plain), drawn) and torch.equal(draw(evaluated), drawn)
    base = draw(pipeline)
    assert (base - drawn).abs().max() > 0.01
    with lora_disabled(model):
        assert torch.equal(draw(model.pipeline), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_and_saved_again_is_the_same(tmp_path, pipeline, dtype):
    """With ranks that differ and one scale, which is kept."""
    matrices = matrices_of(pipeline.transformer, layers_of(pipeline.transformer, ONE_SCALE))
    tensors, model = in_diffusers(matrices), as_model(fresh(pipeline))
    model.network.to(dtype)
    load_lora(model, save(tensors, tmp_path / "lora.safetensors", config_of(matrices), "transformer"))
    assert model.network.dtype == dtype
    weights = [weight for weight in model.network.parameters() if weight.requires_grad]
    assert len(weights) == len(tensors) and {weight.dtype for weight in weights} == {torch.float32}
    save_lora(model, tmp_path / "saved")
    assert_same_tensors(load_file(tmp_path / "saved" / LORA_FILE), tensors)
    assert {module.scaling["default"] for module in model.network.modules() if hasattr(module, "scaling")} == {0.5}
    metadata = metadata_of(tmp_path / "saved")
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 2)
    assert set(metadata["transformer.rank_pattern"].values()) == {2}
    other = as_model(fresh(pipeline))
    load_lora(other, str(tmp_path / "saved"))
    save_lora(other, tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / LORA_FILE), tensors)


def test_a_lora_gets_back_the_weights_that_were_saved(tmp_path, sd3):
    model = trained_model(sd3)
    drawn, kept = draw(model.pipeline), [weight for weight in model.network.parameters() if weight.requires_grad]
    save_lora(model, tmp_path)
    with torch.no_grad():
        for parameter in kept:
            parameter.add_(1)
    assert not torch.equal(draw(model.pipeline), drawn)
    restore_lora(model, tmp_path)
    assert torch.equal(draw(model.pipeline), drawn)
    assert all(a is b for a, b in zip(kept, (p for p in model.network.parameters() if p.requires_grad)))


# What is read


LAYOUTS = {
    "diffusers": lambda matrices: (in_diffusers(matrices), config_of(matrices), "transformer"),
    "without prefixes": lambda matrices: (in_diffusers(matrices, ""), config_of(matrices), "transformer"),
    "with alphas": lambda matrices: (in_diffusers(matrices) | alphas_of(matrices), None, None),
    "kohya": lambda matrices: (in_kohya(matrices, prefix="lora_transformer_"), None, None),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "peft"])
def test_every_layer_has_the_scale_that_its_file_gives_it(tmp_path, pipeline, layout):
    """When trained further, when evaluated, and when diffusers reads what is saved; of all layers of the transformer."""
    matrices = matrices_of(pipeline.transformer, layers_of(pipeline.transformer))
    if layout == "peft":
        path = save(in_diffusers(matrices, "base_model.model."), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config_of(matrices)))
    else:
        tensors, config, component = LAYOUTS[layout](matrices)
        path = save(tensors, tmp_path / "lora.safetensors", config, component)
    model, evaluated, plain = as_model(fresh(pipeline)), fresh(pipeline), fresh(pipeline)
    load_lora(model, path)
    save_lora(model, tmp_path / "saved")
    load_adapter(evaluated, path, "one")
    plain.load_lora_weights(tmp_path / "saved")
    for network in (model.network, evaluated.transformer, plain.transformer):
        assert_updates(network, expected_updates(matrices))


def test_ranks_and_alphas_by_layer_are_read_as_diffusers_reads_them(tmp_path, pipeline):
    matrices = matrices_of(pipeline.transformer, layers_of(pipeline.transformer))
    path = save(in_diffusers(matrices), tmp_path / "lora.safetensors", config_of(matrices), "transformer")
    plain, evaluated, fused = (fresh(pipeline) for _ in range(3))
    plain.load_lora_weights(path)
    load_adapter(evaluated, path, "one")
    with torch.no_grad():
        for name, update in expected_updates(matrices).items():
            fused.transformer.get_submodule(name).weight += update.float()
    expected = draw(fused)
    assert (expected - draw(pipeline)).abs().max() > 0.01
    for one in (plain, evaluated):
        torch.testing.assert_close(draw(one), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(evaluated), draw(plain), rtol=0, atol=1e-5)


def test_what_the_transformer_itself_saves_is_read(tmp_path, sd3):
    """Without prefixes in the keys and in the metadata."""
    model, evaluated = trained_model(sd3), fresh(sd3)
    model.network.save_lora_adapter(tmp_path)
    load_adapter(evaluated, str(tmp_path), "one")
    assert metadata_of(tmp_path)["r"] == 4 and torch.equal(draw(evaluated), draw(model.pipeline))


def test_a_layer_is_told_from_those_whose_names_end_in_its_own(tmp_path, flux):
    """FLUX has a proj_out of its own, and one in every single block."""
    names = {"proj_out": (4, 2.0), "transformer_blocks.0.attn.to_q": (4, 2.0)}
    matrices = matrices_of(flux.transformer, names)
    path = save(in_diffusers(matrices), tmp_path / "lora.safetensors", config_of(matrices), "transformer")
    model, evaluated, plain = as_model(fresh(flux)), fresh(flux), fresh(flux)
    load_lora(model, path)
    save_lora(model, tmp_path / "saved")
    load_adapter(evaluated, path, "one")
    plain.load_lora_weights(tmp_path / "saved")
    for network in (model.network, evaluated.transformer, plain.transformer):
        assert_updates(network, expected_updates(matrices))
    again = as_model(fresh(flux))
    load_lora(again, str(tmp_path / "saved"))
    assert_updates(again.network, expected_updates(matrices))


def test_a_dora_is_evaluated_and_not_trained_further(tmp_path, sd3):
    model = trained_model(sd3, r=2, lora_alpha=6, target_modules=["to_q", "to_out.0"], use_dora=True)
    save_lora(model, tmp_path)
    plain, evaluated = fresh(sd3), fresh(sd3)
    plain.load_lora_weights(tmp_path)
    load_adapter(evaluated, str(tmp_path), "one")
    assert torch.equal(draw(plain), draw(model.pipeline)) and torch.equal(draw(evaluated), draw(model.pipeline))
    with pytest.raises(ValueError, match="it is a DoRA, whose gradient peft approximates: use a LoRA"):
        load_lora(as_model(fresh(sd3)), str(tmp_path))


# Text encoders


def of_text_encoders(pipeline):
    """{component: matrices} of CLIP's layers, as diffusers adapts them."""
    found = {}
    for component in ("text_encoder", "text_encoder_2"):
        if component in pipeline._lora_loadable_modules:
            encoder = getattr(pipeline, component)
            start = "text_model." if hasattr(encoder, "text_model") else ""
            found[component] = matrices_of(encoder, {start + name: (4, 6.0) for name in CLIP_LAYERS})
    return found


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_layers_of_text_encoders_are_evaluated_as_diffusers_does(tmp_path, sd3, flux, name):
    pipeline = sd3 if name == "StableDiffusion3Pipeline" else flux
    encoders = of_text_encoders(pipeline)
    assert list(encoders) == ["text_encoder", "text_encoder_2"][: 2 if pipeline is sd3 else 1]
    parts = {**encoders, "transformer": matrices_of(pipeline.transformer, {"proj_out": (4, 6.0)})}
    tensors = {}
    for component, matrices in parts.items():
        tensors |= in_diffusers(matrices, f"{component}.")
    path = save(tensors, tmp_path / "lora.safetensors")
    read = {component: layers.keys() for component, layers in read_lora(path, pipeline).items()}
    assert read == {component: matrices.keys() for component, matrices in parts.items()}
    plain, evaluated = fresh(pipeline), fresh(pipeline)
    plain.load_lora_weights(path)
    load_adapter(evaluated, path, "one")
    assert torch.equal(draw(plain), draw(evaluated))
    plain.transformer.disable_adapters()
    assert (draw(plain) - draw(pipeline)).abs().max() > 1e-4
    model = as_model(fresh(pipeline))
    with pytest.raises(ValueError, match="it has layers of the text_encoder, and only the transformer is trained"):
        load_lora(model, path)
    assert not hasattr(model.network, "peft_config")
    model.free_text_encoders()
    with pytest.raises(ValueError, match="'text_encoder.*': the base model has no such linear or convolutional layer"):
        read_lora(path, model.pipeline)


def test_adapters_are_evaluated_side_by_side(tmp_path, flux):
    evaluated, drawn = fresh(flux), {}
    for name in ("first", "second"):
        model = trained_model(flux)
        save_lora(model, tmp_path / name)
        load_adapter(evaluated, str(tmp_path / name), name)
        drawn[name] = draw(model.pipeline)
    assert not torch.equal(drawn["first"], drawn["second"])
    for name, expected in drawn.items():
        evaluated.set_adapters([name], [1.0])
        assert torch.equal(draw(evaluated), expected)


# What is refused


BAD_KEYS = {
    "unknown layer": "transformer.transformer_blocks.7.attn.to_q.lora_A.weight",
    "norm": "transformer.transformer_blocks.0.norm1.lora_A.weight",
    "U-Net": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight",
    "U-Net in kohya": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "kohya of a transformer": "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
    "FLUX in kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "SD3 in kohya": "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
    "FLUX's original names": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "xlabs": "double_blocks.0.processor.qkv_lora1.down.weight",
    "T5 of SD3": "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    "T5 of FLUX": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    "language model": "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
    "LoKr": "transformer.transformer_blocks.0.attn.to_q.lokr_w1",
}


@pytest.mark.parametrize("row", BAD_KEYS)
def test_a_key_that_is_not_of_the_pipeline_is_named(tmp_path, pipeline, row):
    """Beside a layer that is, which is not loaded either."""
    key, (name, layer) = BAD_KEYS[row], next(iter(layers_of(pipeline.transformer).items()))
    tensors = {**in_diffusers(matrices_of(pipeline.transformer, {name: layer})), key: torch.ones(2, 32)}
    path = save(tensors, tmp_path / "lora.safetensors")
    for load in (lambda: load_adapter(pipeline, path, "one"), lambda: load_lora(as_model(pipeline), path)):
        with pytest.raises(ValueError) as error:
            load()
        message = str(error.value)
        assert message.startswith(f"{path!r} cannot be loaded: {key!r}") and "\n" not in message
        assert message.endswith(("no such linear or convolutional layer", "kinds of adapters are not supported"))
        assert not hasattr(pipeline.transformer, "peft_config")


def test_the_lora_of_a_unet_is_refused(tmp_path, sd3):
    model = tiny_model()
    add_lora(model, rank=2, alpha=2, layers=["to_q"])
    save_lora(model, tmp_path)
    with pytest.raises(ValueError, match="its metadata has the key 'unet.*', of no component of the base model"):
        load_adapter(sd3, str(tmp_path), "one")
    save(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match="'unet.down_blocks.*': the base model has no such linear or convolutional"):
        load_lora(as_model(sd3), str(tmp_path))
    assert not hasattr(sd3.transformer, "peft_config")


def test_the_lora_of_a_transformer_is_refused_by_a_unet(tmp_path, sd3):
    save_lora(trained_model(sd3), tmp_path)
    model = tiny_model()
    with pytest.raises(
        ValueError, match="its metadata has the key 'transformer.*', of no component of the base model"
    ):
        load_adapter(model.pipeline, str(tmp_path), "one")
    save(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match="'transformer.*': the base model has no such linear or convolutional layer"):
        load_lora(model, str(tmp_path))
    assert not hasattr(model.network, "peft_config")


def test_metadata_of_a_component_that_diffusers_does_not_adapt_are_refused(tmp_path, flux):
    matrices = matrices_of(flux.transformer, {"proj_out": (4, 2.0)})
    path = save(in_diffusers(matrices), tmp_path / "lora.safetensors", config_of(matrices), "text_encoder_2")
    with pytest.raises(ValueError, match="its metadata has the key 'text_encoder_2.*', of no component of the base"):
        read_lora(path, flux)


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_a_pipeline_without_its_network_has_no_layers(tmp_path, sd3, component):
    pipeline = tiny_pipeline() if component == "unet" else fresh(sd3)
    network = getattr(pipeline, component)
    name = next(iter(layers_of(network)))
    tensors = in_diffusers(matrices_of(network, {name: (4, 2.0)}), f"{component}.")
    path = save(tensors, tmp_path / "lora.safetensors")
    assert read_lora(path, pipeline)[component].keys() == {name}
    setattr(pipeline, component, None)
    with pytest.raises(ValueError, match=f"'{component}.{name}.*: the base model has no such linear or convolutional"):
        read_lora(path, pipeline)
