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
"""SDXL in the scripts, which find out from the model that it is SDXL."""

import json
import os
import re
import shutil

import evaluate_rlr
import pytest
import torch
from diffusion_models import load_model
from rlr_models import (
    RED,
    SEEN,
    assert_first_images_are_the_pipelines,
    edit_json,
    plain_pipeline,
    tiny_sdxl,
    train_on,
    training_generators,
)
from rlr_testing import DIGITS, LORA, TINY_CLIP, forget_accelerator, metrics_of, refused, same_adapter
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers import StableDiffusionXLPipeline


@pytest.fixture(scope="module")
def folder():
    return tiny_sdxl()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of one prompt."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red seven\n")
    return str(path)


@pytest.mark.parametrize(
    ("scheduler", "zeros", "options"),
    [
        ("ddim", True, {"guidance_scale": 5.0}),
        ("ddim", False, {"guidance_scale": 5.0}),
        ("ddim", True, {"guidance_scale": 4.0, "negative": "a blue one", "size": (48, 32)}),
        ("ddim", True, {"guidance_scale": 4.0, "negative": ""}),
        ("ddim", True, {"guidance_scale": 1.0, "size": (32, 48)}),
        ("ddpm", True, {"guidance_scale": 3.0}),
        ("euler_ancestral", True, {"guidance_scale": 3.0, "negative": "a blue one"}),
    ],
)
def test_the_first_images_of_a_run_are_the_pipelines_own(tmp_path, folder, scheduler, zeros, options):
    """Without a negative prompt the pipeline takes zeros, or an empty prompt if its configuration says so."""
    if not zeros:
        folder = shutil.copytree(folder, tmp_path / "model")
        edit_json(folder / "model_index.json", {"force_zeros_for_empty_prompt": False})
    assert_first_images_are_the_pipelines(str(folder), tmp_path / "out", scheduler, **options)


def test_the_size_is_a_condition_as_in_the_pipeline(folder):
    model = load_model(folder)
    size, dim = (48, 32), model.pipeline.text_encoder_2.config.projection_dim
    expected = model.pipeline._get_add_time_ids(
        size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=dim
    )
    assert model.static(size).keys() == {"time_ids"} and torch.equal(model.static(size)["time_ids"], expected)


@pytest.mark.parametrize(("mean", "std"), [([0.5, -1.0, 0.2, 0.0], [2.0, 0.5, 1.0, 3.0]), ([1.0] * 4, None)])
def test_latents_are_decoded_with_the_statistics_of_the_vae(folder, mean, std):
    """Some VAEs have a mean and a deviation of their latents. The pipeline ignores one without the other."""
    model, latents = load_model(folder), torch.randn(2, 4, 8, 8)
    model.pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    images = model.pipeline(
        "a red seven",
        num_inference_steps=1,
        guidance_scale=1.0,
        callback_on_step_end=lambda *_: {"latents": latents},
        output_type="pt",
    ).images
    torch.testing.assert_close(model.decode(latents), images, rtol=1e-5, atol=1e-5)
    model.pipeline.vae.register_to_config(latents_mean=None, latents_std=None)
    changed = (model.decode(latents) - images).abs().max()
    assert changed > 0.01 if std else changed == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder, prompts):
    """(output folder, the reward's calls) of a run of eight steps of two micro-batches, with a comparison at the end."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2", "--max_train_steps", "8"]
    flags += ["--gradient_accumulation_steps", "2", "--checkpointing_steps", "7", "--num_eval_images", "8"]
    torch.manual_seed(0)
    SEEN.clear()
    train_on(folder, out, *flags, "--prompts", prompts)
    return out, list(SEEN)


def test_training_raises_the_reward_and_a_plain_pipeline_loads_the_adapter(folder, trained):
    """The images of a run's last step are those of a plain pipeline with the adapter of the step before."""
    out, seen = trained
    results = json.loads((out / "evaluation.json").read_text())
    assert results["gain"]["mean"] > 3 * results["gain"]["standard_error"] > 0
    keys = load_file(out / LORA).keys()
    assert keys and all(key.startswith("unet.") and "lora" in key for key in keys)
    with safe_open(out / LORA, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 4 and metadata["unet.lora_alpha"] == 8

    def images_of(pipeline):
        options = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 1.0, "output_type": "pt"}
        return pipeline(["a red seven"] * 2, generator=training_generators(8), **options).images

    pipeline = plain_pipeline(folder)
    before = images_of(pipeline)
    pipeline.load_lora_weights(out / "checkpoint-7")
    tuned = images_of(pipeline)
    # After the first micro-batch of step 8: the second, then eight images of base and tuned model, two at a time.
    torch.testing.assert_close(seen[-10][0], tuned, rtol=1e-4, atol=1e-4)
    assert (before - tuned).abs().max() > 0.01


def test_training_goes_on_from_an_adapter(tmp_path, folder, trained):
    flags = ["--adapter_path", str(trained[0]), "--learning_rate", "1e-30", "--max_train_steps", "1"]
    train_on(folder, tmp_path, *flags)
    assert same_adapter(trained[0], tmp_path)


def test_adapters_are_evaluated(tmp_path, folder, trained):
    flags = ["--pretrained_model_name_or_path", folder, "--adapters", str(trained[0]), "--prompts", DIGITS]
    flags += ["--reward", "jpeg_compressibility", "--feature_model", TINY_CLIP, "--num_inference_steps", "3"]
    flags += ["--num_prompts", "1", "--images_per_prompt", "2", "--output_dir", str(tmp_path / "evaluation")]
    forget_accelerator()
    models = evaluate_rlr.main(evaluate_rlr.parse_args(flags))["models"]
    assert models["out"]["drift"] > models["base"]["drift"] == pytest.approx(0, abs=1e-6)


def test_the_card_is_enough_to_use_the_adapter(tmp_path, folder, monkeypatch):
    plain_pipeline(folder).vae.save_pretrained(tmp_path / "vae")
    flags = ["--pretrained_model_name_or_path", folder, "--pretrained_vae_model_name_or_path", str(tmp_path / "vae")]
    flags += ["--height", "48", "--max_train_steps", "1"]
    train_on(folder, tmp_path / "out", *flags)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- stable-diffusion-xl\n" in card and "accelerate launch --num_processes 1 train_rlr_sd.py" in card
    # It names folders by the last part of their paths.
    (tmp_path / os.path.basename(folder)).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(re.search(r"```py\n(.*?)```", card, re.DOTALL)[1], scope)
    assert scope["image"].size == (32, 48) and type(scope["pipeline"]) is StableDiffusionXLPipeline
    assert any("lora_B" in name for name, _ in scope["pipeline"].unet.named_parameters())
    assert scope["pipeline"].vae.config["_name_or_path"] == "vae"


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2", "--kl_weight", "0.1"],
        ["--gradient_estimator", "draft_lv", "--negative_prompt", "a blue one"],
        ["--gradient_estimator", "rlr_paper", "--baseline", "predicted_x0", "--gradient_checkpointing"],
        ["--reward", "jpeg_compressibility", "--branches", "2", "--guidance_scale", "1"],
        ["--heldout_reward", "jpeg_compressibility", "--heldout_steps", "1", "--num_heldout_images", "4"]
        + ["--feature_model", TINY_CLIP, "--ema_decay", "0.5", "--early_stop_patience", "5"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_every_estimator_trains(tmp_path, folder, flags):
    metrics = train_on(folder, tmp_path, *flags)
    assert all(line["grad_norm"] > 0 for line in metrics)
    weights = load_file(tmp_path / LORA)
    assert any(w.abs().max() > 0 for key, w in weights.items() if "lora.up" in key or "lora_B" in key)
    assert ("drift" in metrics[0]) == ("--heldout_reward" in flags)
    assert os.path.exists(tmp_path / "ema" / LORA) == ("--ema_decay" in flags)


def test_checkpoints_are_kept_to_their_limit_and_resumed_exactly(tmp_path, folder):
    flags = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--learning_rate", "1e-3"]
    straight = train_on(folder, tmp_path / "straight", *flags, "--max_train_steps", "4")
    assert {name for name in os.listdir(tmp_path / "straight") if "-" in name} == {"checkpoint-3", "checkpoint-4"}
    train_on(folder, tmp_path / "resumed", *flags, "--max_train_steps", "2")
    resumed = train_on(
        *(folder, tmp_path / "resumed", *flags, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    )
    for key in ("step", "reward_mean", "grad_norm", "gamma_mean"):
        assert [line[key] for line in resumed] == [line[key] for line in straight]
    assert same_adapter(tmp_path / "straight", tmp_path / "resumed")


def test_training_in_half_precision(tmp_path, folder):
    metrics = train_on(folder, tmp_path, "--mixed_precision", "bf16", "--num_eval_images", "2")
    assert all(0 < line["grad_norm"] < float("inf") for line in metrics) and metrics_of(tmp_path) == metrics
    weights = load_file(tmp_path / LORA)
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in weights.values())


def test_a_refiner_and_a_vae_that_cannot_be_loaded_end_the_run(tmp_path, folder, capsys):
    refiner = shutil.copytree(folder, tmp_path / "refiner")
    edit_json(refiner / "model_index.json", {"text_encoder": [None, None]})
    flag = "--pretrained_model_name_or_path"
    message = refused(tmp_path / "out", capsys, flag, str(refiner), "--reward", RED)
    assert f"{flag} '{refiner}' cannot be loaded: it does not have both text encoders" in message
    flags = [flag, folder, "--pretrained_vae_model_name_or_path", "/nowhere"]
    message = refused(tmp_path / "out", capsys, *flags, "--reward", RED)
    assert "--pretrained_vae_model_name_or_path '/nowhere' cannot be loaded" in message
