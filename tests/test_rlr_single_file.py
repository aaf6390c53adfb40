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
"""Single files in the original layout: loaded as the folder they were made of, or refused in one line.

The files are made here from the folders by the reverse of what diffusers' own converters do.
"""

import os
import re

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.original_names import original_names
from evaluate_rlr import main as evaluate
from evaluate_rlr import parse_args
from rlr_models import cache_repository, plain_pipeline, tiny_sdxl, train_on
from rlr_testing import DIGITS, TINY_AESTHETIC, TINY_CLIP, TINY_SD, refused
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffusers import UNet2DConditionModel


# The models of the Hub whose configuration diffusers takes.
SD_REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL_REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"


def original_unet(unet):
    names, tensors = original_names(unet), {}
    for key, value in unet.state_dict().items():
        module, _, kind = key.rpartition(".")
        tensors[f"model.diffusion_model.{names[module]}.{kind}"] = value
    return tensors


def original_vae(vae):
    levels, tensors = len(vae.config.block_out_channels), {}
    changes = [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.", lambda match: f"decoder.up.{levels - 1 - int(match[1])}.block."),
        (
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda match: f"decoder.up.{levels - 1 - int(match[1])}.upsample.",
        ),
        (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    for key, value in vae.state_dict().items():
        name = key
        for pattern, other in changes:
            name = re.sub(pattern, other, name)
        is_projection = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_projection else value
    return tensors


def original_clip(encoder, prefix):
    return {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()
    }


def original_open_clip(encoder, prefix):
    """That of OpenCLIP, in which q, k and v are one matrix."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    outside = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    state, tensors = (
        encoder.state_dict(),
        {f"{prefix}text_projection": encoder.text_projection.weight.data.T.contiguous()},
    )
    for key, name in outside.items():
        tensors[prefix + name] = state[key]
    for layer in range(encoder.config.num_hidden_layers):
        start, other = f"text_model.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{start}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{other}attn.in_proj_{kind}"] = torch.cat(parts)
            tensors[f"{other}attn.out_proj.{kind}"] = state[f"{start}self_attn.out_proj.{kind}"]
            for name, original in names.items():
                tensors[f"{other}{original}.{kind}"] = state[f"{start}{name}.{kind}"]
    return tensors


def original(pipeline):
    """The weights of a pipeline in the layout of Stability's code."""
    tensors = {**original_unet(pipeline.unet), **original_vae(pipeline.vae)}
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= original_clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= original_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= original_clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return {key: value.clone().contiguous() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A tiny SDXL whose second encoder has ten layers, by the last of which diffusers knows SDXL."""
    folder, pipeline = str(tmp_path_factory.mktemp("sdxl") / "model"), plain_pipeline(tiny_sdxl())
    config = {**pipeline.text_encoder_2.config.to_dict(), "num_hidden_layers": 10}
    pipeline.register_modules(text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(single file of tiny-sd, cache with its configuration)."""
    place = tmp_path_factory.mktemp("single")
    save_file(original(plain_pipeline(TINY_SD)), place / "tiny.safetensors")
    cache_repository(TINY_SD, SD_REPOSITORY, place / "cache", ending=".json")
    return str(place / "tiny.safetensors"), str(place / "cache")


def draw(model):
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    return model.pipeline("a red one", generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_images_of_a_single_file_are_those_of_its_folder(single, dtype):
    file, cache = single
    model, wanted = load_model(file, dtype=dtype, cache_dir=cache), load_model(TINY_SD, dtype=dtype)
    assert type(model) is type(wanted) and model.pipeline.safety_checker is None
    assert (model.network.dtype, model.pipeline.vae.dtype) == (dtype, dtype)
    assert torch.equal(draw(model), draw(wanted)) and not any(p.requires_grad for p in model.network.parameters())


def test_the_family_is_found_out_from_the_file(tmp_path, sdxl):
    save_file(original(plain_pipeline(sdxl)), tmp_path / "xl.safetensors")
    cache_repository(sdxl, SDXL_REPOSITORY, tmp_path / "cache", ending=".json")
    model = load_model(str(tmp_path / "xl.safetensors"), cache_dir=str(tmp_path / "cache"))
    assert type(model).__name__ == "StableDiffusionXL"
    assert torch.equal(draw(model), draw(load_model(sdxl)))
    half = load_model(str(tmp_path / "xl.safetensors"), dtype=torch.bfloat16, cache_dir=str(tmp_path / "cache"))
    assert half.network.dtype == torch.bfloat16
    for own, whole in zip(half.pipeline.vae.parameters(), model.pipeline.vae.parameters()):
        assert torch.equal(own, whole) and own.dtype == torch.float32


def test_a_checkpoint_of_torch_is_loaded_unless_it_holds_code(tmp_path, single):
    file, cache = single
    torch.save({"state_dict": load_file(file), "global_step": 7}, tmp_path / "tiny.ckpt")
    assert torch.equal(draw(load_model(str(tmp_path / "tiny.ckpt"), cache_dir=cache)), draw(load_model(TINY_SD)))

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"state_dict": load_file(file), "callbacks": Code()}, tmp_path / "code.ckpt")
    with pytest.raises(
        ValueError, match="code.ckpt' cannot be loaded: it is damaged, or holds code, which is not run"
    ):
        load_model(str(tmp_path / "code.ckpt"), cache_dir=cache)
    assert not (tmp_path / "run").exists()


def test_another_vae_is_used_instead_of_the_files(single):
    file, cache = single
    vae = plain_pipeline(TINY_SD).vae
    assert load_model(file, vae=vae, cache_dir=cache).pipeline.vae is vae


def test_both_scripts_take_a_single_file(tmp_path, single):
    file, cache = single
    train_on(file, tmp_path / "file", "--cache_dir", cache, "--num_eval_images", "2")
    train_on(TINY_SD, tmp_path / "folder", "--num_eval_images", "2")
    name = "pytorch_lora_weights.safetensors"
    trained, wanted = load_file(tmp_path / "file" / name), load_file(tmp_path / "folder" / name)
    assert trained.keys() == wanted.keys() and all(torch.equal(trained[key], wanted[key]) for key in wanted)
    flags = ["--pretrained_model_name_or_path", file, "--cache_dir", cache, "--adapters", str(tmp_path / "file")]
    flags += ["--reward", "aesthetic", "--reward_path", f"aesthetic={TINY_AESTHETIC}", "--feature_model", TINY_CLIP]
    flags += ["--prompts", DIGITS, "--num_prompts", "1", "--images_per_prompt", "2", "--num_inference_steps", "2"]
    results = evaluate(parse_args([*flags, "--output_dir", str(tmp_path / "out")]))
    assert list(results["models"]) == ["base", "file"]


ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "middle_block.1.transformer_blocks.0.attn1.to_out.0",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Of Stable Diffusion 1 and of SDXL, whose attention is in other blocks.
ORIGINAL_SD = {
    **ORIGINAL,
    "down_blocks.3.resnets.1.norm2": "input_blocks.11.0.out_layers.0",
    "up_blocks.0.resnets.2.norm1": "output_blocks.2.0.in_layers.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.attentions.2.norm": "output_blocks.5.1.norm",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
}
ORIGINAL_SDXL = {
    **ORIGINAL,
    "add_embedding.linear_1": "label_emb.0.0",
    "up_blocks.0.attentions.0.proj_in": "output_blocks.0.1.proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
}


def test_modules_of_stable_diffusion_have_the_names_of_the_original_code():
    """diffusers' converter takes some of them in other places too."""
    options = {"norm_num_groups": 1, "attention_head_dim": 1, "cross_attention_dim": 4}
    with torch.device("meta"):
        sd = UNet2DConditionModel(block_out_channels=(2, 4, 8, 8), **options)
        sdxl = UNet2DConditionModel(
            block_out_channels=(2, 4, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=16,
            **options,
        )
    for unet, wanted in ((sd, ORIGINAL_SD), (sdxl, ORIGINAL_SDXL)):
        names = original_names(unet)
        assert {name: names[name] for name in wanted} == wanted
        assert len(set(names.values())) == len(names)


# What is refused


def changed(tensors, **others):
    return {**tensors, **others}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BAD_FILES = {
    "adapter": (
        lambda tensors: {"unet.conv_in.lora.down.weight": torch.ones(2, 2)},
        {},
        "it does not hold a whole Stable",
    ),
    "no layer of the U-Net": (
        lambda tensors: without(tensors, "model.diffusion_model.out.2.weight"),
        {},
        "it lacks weights of the U-Net or of the VAE",
    ),
    "no layer of the VAE": (
        lambda tensors: without(tensors, "first_stage_model.decoder.conv_in.bias"),
        {},
        "it lacks weights of the U-Net or of the VAE",
    ),
    "no layer of the text encoder": (
        lambda tensors: without(tensors, "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"),
        {},
        "it lacks weights, such as 'encoder.layers.1.mlp.fc1.bias' of the text_encoder",
    ),
    "another size": (
        lambda tensors: changed(tensors, **{"model.diffusion_model.out.2.bias": torch.ones(9)}),
        {},
        "cannot be loaded: .*9",
    ),
    "v in its layers": (
        lambda tensors: changed(tensors, v_pred=torch.ones(1)),
        {},
        "it may predict noise or v, which",
    ),
    "v in its header": (
        lambda tensors: tensors,
        {"modelspec.prediction_type": "v"},
        "it may predict noise or v, which",
    ),
    "SD 2": (
        lambda tensors: changed(
            tensors,
            **{"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(1, 1024)},
        ),
        {},
        "it may predict noise or v, which diffusers cannot tell: convert it to a folder",
    ),
    "inpainting": (
        lambda tensors: changed(tensors, **{"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 9, 3, 3)}),
        {},
        "its configuration, of '.*inpainting', is not in the cache and the Hub cannot be reached",
    ),
}


@pytest.mark.parametrize("row", BAD_FILES)
def test_a_file_that_is_not_a_whole_model_is_refused_in_one_line(tmp_path, single, monkeypatch, row):
    change, header, message = BAD_FILES[row]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file(change(load_file(single[0])), tmp_path / "bad.safetensors", metadata={"format": "pt", **header})
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(tmp_path / "bad.safetensors"), cache_dir=single[1])
    assert "\n" not in str(error.value) and "bad.safetensors' cannot be loaded: " in str(error.value)


def test_without_a_configuration_the_remedy_is_named(tmp_path, single, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--pretrained_model_name_or_path", single[0], "--cache_dir", str(tmp_path / "cache")]
    assert re.search(
        f"--pretrained_model_name_or_path '.*tiny.safetensors' cannot be loaded: its configuration, of '{SD_REPOSITORY}', is not"
        " in the cache and the Hub cannot be reached: load it once with a connection, or convert the file to a folder with",
        refused(tmp_path / "out", capsys, *flags),
    )


@pytest.mark.parametrize("flag", ["revision", "variant"])
def test_a_single_file_has_neither_revision_nor_variant(tmp_path, single, capsys, flag):
    flags = ["--pretrained_model_name_or_path", single[0], f"--{flag}", "fp16"]
    message = "revision and variant are for folders and repositories, not for a single file"
    assert message in refused(tmp_path / "out", capsys, *flags)


@pytest.mark.parametrize("content", [None, b"", b"half", b"[]"])
def test_a_missing_or_damaged_file_is_named(tmp_path, single, content):
    for name in ("x.safetensors", "x.ckpt"):
        path = tmp_path / name
        if content is not None:
            whole = open(single[0], "rb").read()
            path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
        with pytest.raises(ValueError, match=f"{name}' cannot be loaded: .") as error:
            load_model(str(path), cache_dir=single[1])
        assert "\n" not in str(error.value)
