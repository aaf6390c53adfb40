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
"""`load_model`, `load_vae` and `make_scheduler`: what is loaded, and what is refused by name."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusion_models import FAMILIES, SCHEDULERS, UNET_FAMILIES, as_model, load_model, make_scheduler
from diffusion_models.loading import load_vae
from rlr_models import FOLDERS, edit_json, tiny_sdxl
from rlr_testing import ROOT, TINY_SD, refused, train
from rlr_utils import scheduler_steps
from safetensors.torch import load_file, save_file

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel


@pytest.fixture(params=FOLDERS)
def folder(request):
    return FOLDERS[request.param]()


def changed(folder, new_folder, **entries):
    """A copy of a model whose model_index.json has other entries."""
    shutil.copytree(folder, new_folder)
    edit_json(new_folder / "model_index.json", entries)
    return str(new_folder)


def wide_vae():
    """One of latents of 16 channels."""
    return AutoencoderKL(latent_channels=16, norm_num_groups=8, block_out_channels=(8,))


# What is loaded


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_has_the_scheduler_that_is_asked_for(folder, name):
    model = load_model(folder, scheduler=name)
    class_name, settings = SCHEDULERS[name]
    assert type(model.pipeline.scheduler).__name__ == class_name
    with open(f"{folder}/scheduler/scheduler_config.json", encoding="utf-8") as file:
        own = json.load(file)
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "steps_offset"):
        assert model.pipeline.scheduler.config[key] == own[key]
    assert all(model.pipeline.scheduler.config[key] == value for key, value in settings.items())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_keeps_what_its_configuration_says_but_does_not_clip(name):
    config = {
        "beta_end": 0.01,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    scheduler = make_scheduler(name, {**config, "clip_sample": True, "solver_order": 2})
    assert all(scheduler.config[key] == value for key, value in config.items())
    scheduler.set_timesteps(4)
    assert len(scheduler_steps(scheduler, eta=1.0)) == 4


@pytest.mark.parametrize("force_upcast", [True, False])
def test_in_half_precision_a_vae_that_overflows_stays_in_float32(folder, force_upcast):
    """Those of Stable Diffusion do not overflow, whatever their configuration says."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.register_to_config(force_upcast=force_upcast)
    for options in ({}, {"vae": vae}):
        model = load_model(folder, dtype=torch.bfloat16, **options)
        stays = (force_upcast if options else True) and folder != TINY_SD
        assert model.pipeline.vae.dtype == (torch.float32 if stays else torch.bfloat16)
        assert {module.dtype for module in (model.network, *model.text_encoders)} == {torch.bfloat16}
        modules = (model.network, model.pipeline.vae, *model.text_encoders)
        assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert model.pipeline.vae is vae


def test_a_vae_of_its_own_decodes(tmp_path, folder):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.3
    model, latents = load_model(folder, vae=vae), torch.randn(1, 4, 8, 8)
    loaded = load_vae(str(tmp_path), "AutoencoderKL", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder).decode(latents), model.decode(latents, loaded))
        assert (model.decode(latents) - model.decode(latents, loaded)).mean() > 0.05


def test_the_packages_first_imports_are_light():
    """--help of the scripts needs the names of schedulers and levels, and does not wait for torch."""
    program = "import sys, diffusion_models, diffusion_models.levels, diffusion_models.schedulers"
    program += "\nassert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# What is refused


def test_a_pipeline_of_no_family_is_refused_with_what_is_supported(tmp_path):
    supported = f"is not supported here, only {', '.join(FAMILIES)}"
    assert all(name in supported for name in FAMILIES)
    other = changed(TINY_SD, tmp_path / "other", _class_name="SanaPipeline")
    with pytest.raises(ValueError, match=f"other' cannot be loaded: a SanaPipeline {supported}"):
        load_model(other)
    with pytest.raises(ValueError, match=f"^a DiffusionPipeline {supported}"):
        as_model(DiffusionPipeline())


@pytest.mark.parametrize(
    "name, message",
    [
        ("StableDiffusionPipeline", "it does not have both text encoders: use a base model of SDXL"),
        (
            "StableDiffusionXLPipeline",
            "model_index.json says StableDiffusionPipeline, whose .* addition_embed_type None, and this one has 'text_time'",
        ),
    ],
)
def test_a_model_index_that_names_the_other_family_is_refused(tmp_path, name, message):
    (other,) = UNET_FAMILIES.keys() - {name}
    folder = changed(FOLDERS[name](), tmp_path / "other", _class_name=other)
    with pytest.raises(ValueError, match=f"other' cannot be loaded: {message}"):
        load_model(folder)


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2"])
def test_a_refiner_is_refused(tmp_path, missing):
    refiner = changed(tiny_sdxl(), tmp_path / "refiner", **{missing: [None, None]})
    with pytest.raises(
        ValueError, match="refiner' cannot be loaded: it does not have both .*: use a base model of SDXL"
    ):
        load_model(refiner)


FOREIGN_SCHEDULERS = [
    (diffusers.EDMEulerScheduler(), "has no schedule of betas"),
    (diffusers.EDMDPMSolverMultistepScheduler(), "has no schedule of betas"),
    (diffusers.FlowMatchEulerDiscreteScheduler(), "has no schedule of betas"),
    (diffusers.IPNDMScheduler(), "has no schedule of betas"),
    (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "is set to flow matching"),
    (
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "is set to flow matching",
    ),
    (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "is set to continuous timesteps"),
    (diffusers.DDPMScheduler(prediction_type="score"), "has the prediction_type 'score'"),
    (diffusers.DDIMScheduler(trained_betas=[0.1] * 10), "has trained_betas for 10 timesteps, and num_train_timesteps"),
    (
        diffusers.DDIMScheduler(timestep_spacing="even"),
        "has the timestep_spacing 'even', not one of leading, linspace",
    ),
    (diffusers.LCMScheduler(), "is for a model that was distilled"),
    (diffusers.TCDScheduler(), "is for a model that was distilled"),
]


@pytest.mark.parametrize(
    "scheduler, problem", FOREIGN_SCHEDULERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_scheduler_of_another_kind_is_refused_by_name(tmp_path, scheduler, problem):
    """diffusers would make a DDIM of it, with betas that the model never saw."""
    scheduler.save_pretrained(tmp_path)
    with open(tmp_path / "scheduler_config.json", encoding="utf-8") as file:
        config = json.load(file)
    for name in SCHEDULERS:
        with pytest.raises(ValueError, match=f"^its scheduler, {type(scheduler).__name__}, {problem}.*needs a model"):
            make_scheduler(name, config)


def test_a_model_with_a_scheduler_of_another_kind_is_refused(tmp_path, folder, capsys):
    model = changed(folder, tmp_path / "model", scheduler=["diffusers", "EDMEulerScheduler"])
    diffusers.EDMEulerScheduler().save_pretrained(f"{model}/scheduler")
    message = "model' cannot be loaded: its scheduler, EDMEulerScheduler, has no schedule of betas: the chain needs"
    assert message in refused(tmp_path / "out", capsys, "--pretrained_model_name_or_path", model)


@pytest.mark.parametrize(
    "name", ["DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"]
)
def test_the_schedulers_of_stable_diffusion_models_are_taken_with_their_betas(name):
    betas = {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**betas)
    expected = torch.linspace(0.001**0.5, 0.01**0.5, 1000) ** 2
    torch.testing.assert_close(make_scheduler("ddim", scheduler.config).betas, expected)


@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("time_cond_proj_dim", 16, "needs an embedding of the guidance scale, since its guidance was distilled"),
        ("class_embed_type", "timestep", "needs class labels .class_embed_type in its config.json"),
        ("num_class_embeds", 3, "needs class labels"),
        ("attention_type", "gated", "the U-Net's attention_type is 'gated', which is not supported"),
        ("encoder_hid_dim_type", "image_proj", "needs embeddings of another kind of encoder"),
        ("addition_embed_type", "text", "addition_embed_type .*, and this one has 'text'"),
        ("in_channels", 9, "the U-Net takes 9 channels and predicts 4: not a text-to-image model"),
        ("out_channels", 8, "the U-Net takes 4 channels and predicts 8: not a text-to-image model"),
        ("cross_attention_dim", 48, "the U-Net reads embeddings of width 48, and prompts are embedded in (64|96)"),
        ("cross_attention_dim", [48, 64], "the U-Net reads embeddings of width 48 and 64, and prompts"),
    ],
)
def test_a_unet_with_inputs_that_the_chain_does_not_feed_is_refused(folder, entry, value, message):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.register_to_config(**{entry: value})
    with pytest.raises(ValueError, match=message):
        as_model(pipeline)


def test_an_inpainting_model_is_refused(tmp_path, capsys):
    """Its U-Net has the channels of a mask and of a masked image too."""
    pipeline = DiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    pipeline.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "out", capsys, "--pretrained_model_name_or_path", str(tmp_path / "model"))
    assert "model' cannot be loaded: the U-Net takes 9 channels and predicts 4: not a text-to-image model" in message


def test_a_unet_that_reads_other_numbers_of_sdxl_is_refused():
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl())
    pipeline.unet.register_to_config(projection_class_embeddings_input_dim=5 * 8 + 24)
    with pytest.raises(
        ValueError, match="reads 64 numbers of size and pooled prompt, and SDXL has 72: use a base model"
    ):
        as_model(pipeline)


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_refused(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.tokenizer.add_tokens(["<my-cat>"])
    size = len(pipeline.tokenizer)
    with pytest.raises(ValueError, match=f"the tokenizer knows {size} tokens, its text encoder only {size - 1}"):
        as_model(pipeline)


def test_a_tokenizer_that_does_not_say_its_length_has_that_of_the_text_encoder(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    for tokenizer in (tmp_path / "model").glob("tokenizer*"):
        edit_json(tokenizer / "tokenizer_config.json", {"model_max_length": None})
    model, whole = load_model(str(tmp_path / "model")), load_model(folder)
    length = whole.pipeline.text_encoder.config.max_position_embeddings
    assert model.pipeline.tokenizer.model_max_length == length == whole.pipeline.tokenizer.model_max_length
    for name, embeds in model.embed(["a red seven"]).items():
        assert torch.equal(embeds, whole.embed(["a red seven"])[name])


def test_the_size_may_have_two_sides_or_be_missing(tmp_path, capsys):
    shutil.copytree(TINY_SD, tmp_path / "model")
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "model")]
    edit_json(tmp_path / "model" / "unet" / "config.json", {"sample_size": [8, 6]})
    model = load_model(str(tmp_path / "model"))
    assert model.default_size == (32, 24)
    train(tmp_path / "out", *flags, "--max_train_steps", "1")
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["width"] == 24
    edit_json(tmp_path / "model" / "unet" / "config.json", {"sample_size": None})
    assert "has no sample_size: give the size" in refused(tmp_path / "none", capsys, *flags)
    train(tmp_path / "none", *flags, "--max_train_steps", "1", "--resolution", "32")


@pytest.mark.parametrize("size", [0, -8, "16", [8, 8, 8], [8, "8"]])
def test_a_size_that_is_none_is_refused(size):
    pipeline = DiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
    pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match="the sample_size in the unet's config.json is .*, not one or two sides"):
        as_model(pipeline).default_size


def with_nan(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def without_scaling(folder):
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            with_nan,
            "model' draws images that are not finite: its weights are damaged, or overflow with --mixed_precision no",
        ),
        (without_scaling, "model' cannot draw an image: TypeError: unsupported operand"),
        (
            lambda folder: edit_json(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": 1}),
            "model' cannot draw an image: RuntimeError: ",
        ),
    ],
)
def test_a_model_that_cannot_draw_is_refused_before_anything_is_written(tmp_path, capsys, damage, message):
    shutil.copytree(TINY_SD, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refused(tmp_path / "out", capsys, "--pretrained_model_name_or_path", str(tmp_path / "model"))


def test_a_vae_with_other_channels_is_refused(folder):
    with pytest.raises(
        ValueError, match="cannot be loaded: the VAE has latents of 16 channels, the U-Net of 4"
    ) as error:
        load_model(folder, vae=wide_vae())
    assert folder in str(error.value)


def without_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def with_cut_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def with_other_weights(folder):
    edit_json(folder / "unet" / "config.json", {"block_out_channels": [32, 32]})


def with_a_cut_text_encoder(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_configuration(folder):
    (folder / "text_encoder" / "config.json").unlink()


def without_index(folder):
    (folder / "model_index.json").unlink()


def with_a_broken_index(folder):
    (folder / "model_index.json").write_text("{")


def without_class(folder):
    edit_json(folder / "model_index.json", {"_class_name": None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "no file named diffusion_pytorch_model"),
        (with_cut_weights, "Unable to load weights"),
        (with_other_weights, "shape"),
        (with_a_cut_text_encoder, "header"),
        (without_configuration, "text_encoder: .*No such file"),
        (without_index, "no file named model_index.json"),
        (with_a_broken_index, "not a valid JSON"),
        (without_class, "its model_index.json does not name a pipeline"),
    ],
)
def test_a_damaged_model_is_named(tmp_path, damage, message):
    shutil.copytree(TINY_SD, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=f"model' cannot be loaded: (.|\n)*{message}"):
        load_model(str(tmp_path / "model"))


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="^'/nowhere' cannot be loaded: "):
        load_model("/nowhere")


def test_a_vae_of_another_class_is_refused(tmp_path):
    wide_vae().save_pretrained(tmp_path / "vae")
    message = "vae' cannot be loaded: its config.json says AutoencoderKL, and AutoencoderTiny is needed"
    with pytest.raises(ValueError, match=message):
        load_vae(str(tmp_path / "vae"), "AutoencoderTiny", torch.float32)
    assert load_vae(str(tmp_path / "vae"), "AutoencoderKL", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'/nowhere' cannot be loaded: "):
        load_vae("/nowhere", "AutoencoderKL", torch.float32)


@pytest.mark.parametrize(
    "flag, message",
    [
        (
            "--pretrained_model_name_or_path",
            "'.*' cannot be loaded: a FluxPipeline is not supported here, but by another script, only Stable.*",
        ),
        ("--pretrained_vae_model_name_or_path", "'.*' cannot be loaded: its config.json says .*"),
    ],
)
def test_the_training_script_names_the_flag_in_one_line(tmp_path, flag, message):
    other = changed(TINY_SD, tmp_path / "other", _class_name="FluxPipeline")
    value = other if flag == "--pretrained_model_name_or_path" else f"{other}/unet"
    with pytest.raises(SystemExit, match=rf"^train_rlr_sd.py: error: {flag} {message}") as stop:
        train(tmp_path / "out", flag, value)
    assert "\n" not in stop.value.code and not (tmp_path / "out").exists()


def test_the_training_script_refuses_a_vae_with_other_channels(tmp_path):
    wide_vae().save_pretrained(tmp_path / "wide")
    with pytest.raises(SystemExit, match="error: .*the VAE has latents of 16 channels, the U-Net of 4"):
        train(tmp_path / "out", "--pretrained_vae_model_name_or_path", str(tmp_path / "wide"))
    assert not (tmp_path / "out").exists()
