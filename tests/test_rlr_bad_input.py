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
"""Input that only shows to be bad with the model, the reward and the prompts at hand: refused before anything is written."""

import os
import re
import shutil

import pytest
import torch
from rlr_testing import DIGITS, TINY_AESTHETIC, TINY_SD, refused, tiny_pipeline, train
from safetensors.torch import load_file, save_file

from diffusers import DDIMScheduler


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Rewards
        (["--reward", "os:system:2"], "reward 'os:system:2' fails on two random images: TypeError"),
        (["--reward", "aesthetic,nowhere.py:f"], "reward 'nowhere.py:f' cannot be imported: there is no file"),
        (["--reward", "aesthetic@v1"], "reward 'aesthetic@v1': the folder .* has no revisions"),
        (["--reward_path", "aesthetic=/nowhere"], "'aesthetic=/nowhere': no such folder"),
        (
            ["--heldout_reward", "clip_score", "--feature_model", "/nowhere"],
            "--feature_model '/nowhere' holds no config",
        ),
        # Estimators that need another reward or chain
        (["--gradient_estimator", "draft_lv", "--reward", "jpeg_compressibility"], "not differentiable.*draft_lv"),
        (["--gradient_estimator", "full_bp", "--reward", "jpeg_compressibility"], "not differentiable.*full_bp"),
        (
            ["--gradient_estimator", "truncated_bp", "--reward", "jpeg_compressibility"],
            "not differentiable.*truncated",
        ),
        (["--gradient_estimator", "alignprop", "--reward", "aesthetic,jpeg_compressibility"], "not differentiable"),
        (["--branches", "2"], "--branches 2 is for black boxes"),
        (
            ["--gradient_estimator", "rlr_paper", "--subchain_length", "3"],
            "--subchain_length 3: a sub-chain of 3 of 3",
        ),
        (["--gradient_estimator", "rlr_paper", "--subchain_range", "1", "2"], "may start at 2..2 .*, not at 1..2"),
        (["--scheduler", "euler_ancestral", "--gradient_estimator", "ddpo"], "adds no noise at step 1 from the end"),
        (["--scheduler", "ddpm", "--reward", "jpeg_compressibility"], "adds no noise at step 1 from the end"),
        (["--scheduler", "dpm_sde", "--kl_weight", "1"], "adds no noise at step 1 from the end"),
        # Precision in which two means cannot be compared
        (["--kl_weight", "1", "--mixed_precision", "bf16"], "--kl_weight 1.0 needs --mixed_precision no .*: in bf16"),
        (["--kl_weight", "1", "--allow_tf32"], "--kl_weight 1.0 needs .* no --allow_tf32: in TF32 rounding outweighs"),
        (
            ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2", "--mixed_precision", "bf16"],
            "--num_inner_epochs 2 needs --mixed_precision no .*: in bf16",
        ),
        # Models and adapters
        (
            ["--pretrained_model_name_or_path", "/nowhere"],
            "--pretrained_model_name_or_path '/nowhere' cannot be loaded",
        ),
        (
            ["--pretrained_model_name_or_path", "nowhere.safetensors"],
            "--pretrained_model_name_or_path 'nowhere.safetensors' cannot be loaded: there is no such file",
        ),
        (
            ["--adapter_path", "/nowhere"],
            "--adapter_path '/nowhere' cannot be loaded: there is no such file or folder",
        ),
        (
            ["--adapter_path", f"{TINY_SD}/vae"],
            "--adapter_path '.*vae' cannot be loaded: '.*' is no matrix of a LoRA, and other kinds of adapters are not",
        ),
        (["--lora_layers", "to_k,"], "--lora_layers 'to_k,' has an empty name: give names, separated by commas"),
        (["--lora_layers", "to_k, to_nothing"], "--lora_layers 'to_k, to_nothing': .* has no layer 'to_nothing'"),
        (["--baseline_vae", "/nowhere", "--baseline", "predicted_x0"], "--baseline_vae '/nowhere' cannot be loaded"),
        (
            ["--baseline_vae", f"{TINY_SD}/vae"],
            "--baseline_vae .*vae' cannot be loaded: its config.json says AutoencoderKL, and AutoencoderTiny is",
        ),
        (["--num_inference_steps", "1000"], "--num_inference_steps 1000: .* reach beyond"),
        (["--num_inference_steps", "2000"], "--num_inference_steps 2000: .*2000 cannot be larger"),
        (["--height", "40", "--width", "36"], "images of 40 x 36 pixels: not multiples of 8"),
        (["--resolution", "36"], "images of 36 x 36 pixels: not multiples of 8"),
        # Prompts
        (["--prompts", ""], "prompts '': no such file"),
        (["--prompts", "nowhere.txt"], "prompts 'nowhere.txt': no such file"),
        (["--prompts", os.devnull], "no such file"),
        (
            ["--prompts", f"{TINY_SD}/model_index.json"],
            "prompts '.*model_index.json': it is not a list of prompts, or of objects",
        ),
        (["--prompts", TINY_SD], "it is a folder; .* use --dataset_name .*tiny-sd --caption_column NAME"),
        # Folders
        (["--resume_from_checkpoint", "checkpoint-7"], "--resume_from_checkpoint 'checkpoint-7' does not exist"),
        (["--output_dir", "/proc/no/folder"], "--output_dir '/proc/no/folder' cannot be written to: No such file"),
        (["--output_dir", DIGITS], "--output_dir .*: '.*digits.txt' is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, flags, message):
    assert re.search(message, refused(tmp_path / "out", capsys, *flags))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate is configured for FSDP, which is not supported: choose plain"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate is configured for DeepSpeed, which is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "accelerate is configured for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "accelerate is configured for several kinds of parallelism"),
        (
            "ACCELERATE_MIXED_PRECISION",
            "fp8",
            "the mixed precision fp8, which is not supported: use --mixed_precision no",
        ),
    ],
)
def test_what_a_launcher_can_be_configured_for_and_the_sweep_cannot_is_refused_by_name(
    tmp_path, capsys, monkeypatch, variable, value, message
):
    monkeypatch.setenv(variable, value)
    assert message in refused(tmp_path / "out", capsys)


def test_a_model_without_noise_at_its_last_step_is_refused_where_noise_is_needed(tmp_path, capsys):
    model = tmp_path / "model"
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    pipeline.save_pretrained(model)
    flags = ["--pretrained_model_name_or_path", str(model)]
    sums = ["--reward", "aesthetic,jpeg_compressibility"]
    for bad in (["--gradient_estimator", "ddpo"], ["--reward", "jpeg_compressibility"], sums):
        assert "no noise at step 1 from the end" in refused(tmp_path / "out", capsys, *flags, *bad)
    assert len(train(tmp_path / "out", *flags)) == 2


def test_noise_prediction_from_pure_noise_is_refused(tmp_path, capsys):
    """A model of noise prediction on a schedule that starts without signal, whose first step divides by zero."""
    pipeline = tiny_pipeline()
    config = {**pipeline.scheduler.config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(config)
    pipeline.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "out", capsys, "--pretrained_model_name_or_path", str(tmp_path / "model"))
    assert re.search(r"step 3 from the end \(timestep 999\): the step is not finite", message)


SMALL_ONLY = """
calls = []

def f(images, prompts):
    assert images.shape[-2:] == (32, 32), images.shape
    calls.append(prompts)
    return images.mean((1, 2, 3)) * [1, 1, 1, 1, 1][len(calls) - 1]
"""


def test_a_custom_reward_is_tried_at_the_size_of_the_run_and_its_later_failure_names_the_step(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(SMALL_ONLY)
    flags = ["--reward", f"{tmp_path}/mine.py:f"]
    message = refused(tmp_path / "out", capsys, *flags, "--resolution", "40")
    assert re.search(r"fails on two random images: .*\[2, 3, 40, 40\]\) \(mine.py, line 5: assert images", message)
    # The first two calls are the trial, without and with a gradient, and the third is of a first image of the model; the
    # others score the two images of step 1.
    with pytest.raises(
        SystemExit, match=r"step 2: reward '.*mine.py:f' fails: IndexError: .* \(mine.py, line 7: return"
    ):
        train(tmp_path / "out", *flags)


def test_a_reward_that_fails_on_a_first_image_stops_the_run_before_anything_is_written(tmp_path):
    """A real failure: a head with NaN in it."""
    broken = tmp_path / "reward"
    shutil.copytree(TINY_AESTHETIC, broken)
    state = load_file(broken / "aesthetic_head.safetensors")
    state["layers.7.bias"] = torch.full_like(state["layers.7.bias"], float("nan"))
    save_file(state, broken / "aesthetic_head.safetensors")
    with pytest.raises(SystemExit, match="error: reward 'aesthetic' returned nan for prompt 'a [a-z]+ [a-z]+'"):
        train(tmp_path / "out", "--reward_path", f"aesthetic={broken}")
    assert not (tmp_path / "out").exists()
