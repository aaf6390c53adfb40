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
from diffusion_models import FAMILIES, SCHEDULERS, as_model, load_model, make_scheduler
from diffusion_models.loading import load_vae
from rlr_models import FOLDERS, edit_json, tiny_sdxl
from rlr_testing import ROOT, TINY_SD, train
from rlr_utils import scheduler_steps

from diffusers import AutoencoderKL, DiffusionPipeline


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
    config = {"beta_end": 0.01, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
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
    supported = "is not supported, only StableDiffusionPipeline, StableDiffusionXLPipeline"
    assert all(name in supported for name in FAMILIES)
    other = changed(TINY_SD, tmp_path / "other", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match=f"other' cannot be loaded: a FluxPipeline {supported}"):
        load_model(other)
    with pytest.raises(ValueError, match=f"^a DiffusionPipeline {supported}"):
        as_model(DiffusionPipeline())


@pytest.mark.parametrize(
    "name, message",
    [
        ("StableDiffusionPipeline", "the U-Net is not of Stable Diffusion XL, and model_index.json says it is"),
        ("StableDiffusionXLPipeline", "the U-Net is of Stable Diffusion XL, and .* says StableDiffusionPipeline"),
    ],
)
def test_a_model_index_that_names_the_other_family_is_refused(tmp_path, name, message):
    (other,) = FAMILIES.keys() - {name}
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


def with_another_text_encoder(folder):
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
        (with_another_text_encoder, "mismatched"),
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
        ("--pretrained_model_name_or_path", "'.*' cannot be loaded: a FluxPipeline is not supported, only Stable.*"),
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
