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
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import train_rlr_sd
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from PIL import Image
from rlr_testing import (
    BASE,
    DIGITS,
    LORA,
    ROOT,
    TINY_AESTHETIC,
    TINY_CLIP,
    TINY_SD,
    metrics_of,
    same_adapter,
    tiny_pipeline,
    train,
)
from rlr_utils import Schedule, StableDiffusionChain, load_levels
from safetensors import safe_open
from safetensors.torch import load_file
from train_rlr_sd import (
    LOW_MEMORY,
    GradientClipping,
    RunError,
    average_gradients,
    command_of,
    generate,
    load_training_prompts,
    loss_scale,
    main,
    parse_args,
)

from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel


def refused(output_dir, capsys, *flags):
    """The message of a run that ends in an error without having written anything."""
    with pytest.raises(SystemExit) as stop:
        train(output_dir, *flags)
    assert stop.value.code not in (0, None)
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message.strip().count("\n") == 0 and "error: " in message
    assert not output_dir.exists()
    return message


def test_a_run_leaves_an_adapter_metrics_and_pictures(tmp_path, capsys):
    out = tmp_path / "out"
    metrics = train(out, "--num_eval_images", "6", "--report_to", "tensorboard", "--decode_batch_size", "2")
    assert {
        LORA,
        "metrics.jsonl",
        "reward_curve.png",
        "before_after.png",
        "evaluation.json",
        "README.md",
        "logs",
        "training_args.json",
    } == {p.name for p in out.iterdir()}
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert (
            line["num_images"] == 2 and line["grad_norm"] > 0 and line["seconds"] > 0 and 0 < line["gamma_mean"] <= 1
        )
        assert line["images_per_second"] == pytest.approx(2 / line["seconds"])
    printed = capsys.readouterr().out
    for text in ("images per step", "2 = 2 batch x 1 accumulation x 1 ranks", "trainable parameters", "base", "tuned"):
        assert text in printed
    results = json.loads((out / "evaluation.json").read_text())
    assert results["num_images"] == 6
    assert results["gain"]["mean"] == pytest.approx(results["tuned"]["mean"] - results["base"]["mean"], abs=1e-5)
    card = (out / "README.md").read_text()
    assert "load_lora_weights" in card and f"{results['tuned']['mean']:.4f}" in card
    for picture in ("reward_curve.png", "before_after.png"):
        assert np.asarray(Image.open(out / picture)).std() > 5


def test_validation_pictures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = ["a red one", "a blue two"]
    # In mixed precision, where the U-Net under training and the VAE do not speak the same type.
    flags = ["--report_to", "tensorboard", "--validation_steps", "2", "--num_validation_images", "1"]
    flags += ["--mixed_precision", "bf16"]
    train(tmp_path, *flags, "--validation_prompts", *prompts)
    runs = [EventAccumulator(str(folder)).Reload().Tags() for folder in (tmp_path / "logs").rglob("rlr-sd")]
    assert runs[0]["images"] == ["validation"] and "reward_mean" in runs[0]["scalars"]


def test_the_adapter_is_a_diffusers_lora_that_changes_the_picture(tmp_path):
    train(tmp_path, "--learning_rate", "1e-2", "--rank", "2", "--lora_alpha", "8", "--lora_layers", "to_k,to_v")
    keys = load_file(tmp_path / LORA).keys()
    assert keys and all(key.startswith("unet.") and "lora" in key for key in keys)
    assert all("to_k" in key or "to_v" in key for key in keys)
    with safe_open(tmp_path / LORA, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 2 and metadata["unet.lora_alpha"] == 8

    def picture(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red seven", num_inference_steps=3, generator=generator, output_type="pt").images

    pipeline = tiny_pipeline()
    before = picture(pipeline)
    pipeline.load_lora_weights(tmp_path)
    assert (picture(pipeline) - before).abs().max() > 0.01
    pipeline.unload_lora_weights()
    torch.testing.assert_close(picture(pipeline), before)


# As many steps that some may be left out of the sweep.
SOME_STEPS = ["--sweep_fraction", "0.4", "--num_inference_steps", "6"]


def test_training_raises_the_reward(tmp_path):
    """Ten steps of the default estimator: more than three standard errors on 48 pictures the run did not train on."""
    train(
        tmp_path,
        *("--num_inference_steps", "8", "--train_batch_size", "16", "--decode_batch_size", "16"),
        *("--max_train_steps", "10", "--learning_rate", "2e-3", "--num_eval_images", "48"),
    )
    gain = json.loads((tmp_path / "evaluation.json").read_text())["gain"]
    assert gain["mean"] > 0.3
    assert gain["mean"] > 3 * gain["standard_error"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_estimator", "full_bp", "--eta", "0"],
        ["--gradient_estimator", "truncated_bp", "--truncation_steps", "2"],
        ["--gradient_estimator", "alignprop"],
        ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2"],
        ["--gradient_estimator", "rlr", "--mixing", "0.5"],
        ["--reward", "jpeg_compressibility"],
        ["--reward", "aesthetic:1,clip_score:5,jpeg_incompressibility:0.1"],
        ["--baseline", "per_prompt", "--images_per_prompt", "2", "--train_batch_size", "4"],
        ["--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--train_batch_size", "1", "--use_dora"],
        ["--mixed_precision", "bf16", "--use_8bit_adam", "--scale_lr", "--lr_scheduler", "cosine"],
        ["--guidance_scale", "1", "--resolution", "48"],
        ["--negative_prompt", "a blue one", "--train_batch_size", "1"],
        ["--num_inference_steps", "1"],
        ["--gradient_estimator", "draft_lv", "--lv_samples", "3"],
        ["--gradient_estimator", "rlr_paper", "--gradient_accumulation_steps", "2"],
        ["--gradient_estimator", "rlr_paper", "--subchain_length", "auto", "--subchain_range", "2", "3"],
        ["--gradient_estimator", "rlr_paper", "--rest", "likelihood_ratio", "--subchain_sampling", "grad_norm"],
        ["--gradient_estimator", "rlr_paper", "--rest", "none", "--subchain_length", "0"],
        ["--gradient_estimator", "rlr_paper", "--reward", "jpeg_compressibility"],
        ["--baseline", "none"],
        ["--baseline", "predicted_x0", "--gradient_estimator", "ddpo"],
        ["--baseline", "predicted_x0", "--baseline_steps", "2", "--reward", "aesthetic,jpeg_compressibility"],
        ["--reward", "jpeg_compressibility", "--branches", "2"],
        [*SOME_STEPS, "--kl_weight", "0.1", "--max_train_steps", "3", "--gradient_accumulation_steps", "2"],
        [*SOME_STEPS, "--gradient_estimator", "ddpo", "--gradient_accumulation_steps", "2"],
        [*SOME_STEPS, "--gradient_estimator", "alignprop", "--train_batch_size", "1"],
        [
            *SOME_STEPS,
            "--gradient_estimator",
            "rlr_paper",
            "--rest",
            "likelihood_ratio",
            "--subchain_sampling",
            "grad_norm",
        ],
        [*SOME_STEPS, "--baseline", "predicted_x0", "--keep_graphs", "5"],
        ["--preset_low_memory"],
        ["--scheduler", "ddpm", "--baseline", "predicted_x0"],
        ["--scheduler", "euler_ancestral", "--num_eval_images", "2"],
        ["--scheduler", "dpm_sde", "--height", "48", "--width", "32", "--num_eval_images", "2"],
        ["--scheduler", "dpm_sde", "--gradient_estimator", "draft_lv"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_way_to_train(tmp_path, flags):
    metrics = train(tmp_path, *flags)
    assert all(np.isfinite(list(line.values())).all() for line in metrics)
    weights = load_file(tmp_path / LORA)
    assert all(torch.isfinite(w).all() and w.dtype == torch.float32 for w in weights.values())
    assert any(w.abs().max() > 0 for key, w in weights.items() if "lora.up" in key)
    assert ("clip_fraction" in metrics[0]) == ("--num_inner_epochs" in flags)
    if "draft_lv" in flags:  # which takes its last step again for each of the noises
        assert metrics[0]["swept_steps"] == (3 if "--lv_samples" in flags else 2)
    if "aesthetic:1,clip_score:5,jpeg_incompressibility:0.1" in flags:
        for line in metrics:
            total = line["aesthetic_mean"] + 5 * line["clip_score_mean"] + 0.1 * line["jpeg_incompressibility_mean"]
            assert line["reward_mean"] == pytest.approx(total, rel=1e-5)


def test_a_reward_of_ones_own(tmp_path, caplog):
    """One with a gradient and one without, in NumPy's double precision, neither saying so, beside a member of the project."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n"
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2)) + torch.tensor(['red' in p for p in prompts])\n\n"
        "def dark(images, prompts):\n    return torch.tensor([-image.numpy().sum(dtype='float64') for image in images])\n"
    )
    red, dark = (f"{tmp_path}/mine.py:{name}" for name in ("red", "dark"))
    with caplog.at_level("INFO"):
        metrics = train(tmp_path / "out", "--reward", f"{red}:3,{dark}:.01,aesthetic", "--learning_rate", "1e-3")
    assert "red', tried on two random images: its scores have a gradient" in caplog.text
    assert "dark', tried on two random images: its scores have no gradient: a black box" in caplog.text
    for line in metrics:
        total = 3 * line[f"{red}_mean"] + 0.01 * line[f"{dark}_mean"] + line["aesthetic_mean"]
        assert line["reward_mean"] == pytest.approx(total, rel=1e-4) and line[f"{dark}_std"] > 0


def test_reward_offload_and_micro_batches_change_nothing(tmp_path, monkeypatch):
    # All is on the CPU here: that the rewards come and go is seen by what is asked of the library.
    asked = []

    def noted(*modules, device, offload=True, really=train_rlr_sd.offload_models):
        if any(type(module).__module__.startswith("reward_models") for module in modules):
            asked.append(offload)
        return really(*modules, device=device, offload=offload)

    monkeypatch.setattr(train_rlr_sd, "offload_models", noted)
    flags = ["--reward", "aesthetic,clip_score:3", "--decode_batch_size", "2", "--num_eval_images", "3"]
    plain = train(tmp_path / "plain", *flags)
    assert asked and not any(asked)
    asked.clear()
    saving = train(tmp_path / "saving", *flags, "--reward_offload", "--reward_batch_size", "1")
    assert len(asked) == 4 and all(asked)  # in two steps, and for the base and the tuned pictures
    for a, b in zip(plain, saving):
        assert a["clip_score_mean"] == pytest.approx(b["clip_score_mean"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("plain", "saving"))
    assert first["tuned"]["mean"] == pytest.approx(second["tuned"]["mean"], rel=1e-3)


def test_a_comparison_without_memory_left_loses_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, torch\n\ndef red(images, prompts):\n"
        f"    if os.path.exists({str(tmp_path / 'out' / LORA)!r}):\n        raise torch.OutOfMemoryError('none left')\n"
        "    return images[:, 0].mean((1, 2))\n"
    )
    with pytest.raises(SystemExit, match="the comparison with the base model has failed: none left"):
        train(tmp_path / "out", "--reward", f"{tmp_path}/mine.py:red", "--num_eval_images", "2")
    assert (tmp_path / "out" / LORA).exists()


HELD_OUT = ["--heldout_reward", "clip_score", "--heldout_steps", "1", "--num_heldout_images", "8"]
HELD_OUT += ["--feature_model", TINY_CLIP]


@pytest.mark.parametrize("estimator", ["rlr", "ddpo"])
def test_the_divergence_from_the_base_model_is_paid_for(tmp_path, estimator):
    """Nothing at first, where the adapter is the base model, and by a heavy weight all but everything afterwards."""
    flags = ["--gradient_estimator", estimator, "--learning_rate", "2e-3", "--max_train_steps", "8"]
    flags += ["--mixing", "0.5"]
    free = train(tmp_path / "free", *flags, *HELD_OUT)
    torch.backends.cudnn.allow_tf32 = True  # as it is by default
    tied = train(tmp_path / "tied", *flags, *HELD_OUT, "--kl_weight", "1000")
    assert not torch.backends.cudnn.allow_tf32
    assert tied[0]["kl"] == pytest.approx(0, abs=1e-6) and "kl" not in free[0]
    # The base model's means were computed in the midst of this gradient, and have left no trace.
    assert tied[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-5)
    assert tied[1]["kl"] > 0
    assert tied[-1]["drift"] < free[-1]["drift"]


def test_held_out_rewards_stop_the_run_and_keep_the_best(tmp_path, caplog):
    """Trained to be small as a file, which no caption asks for: the agreement with the prompt falls at once."""
    flags = ["--reward", "jpeg_compressibility:-1", "--learning_rate", "0.3", "--max_train_steps", "9"]
    metrics = train(tmp_path, *flags, *HELD_OUT, "--early_stop_patience", "2")
    held = [line["heldout_mean"] for line in metrics]
    best = int(np.argmax(held))
    assert len(metrics) == best + 1 + 2 < 9
    assert (
        f"stopped early after step {len(metrics)}: the held-out reward has not risen above {held[best]:.4f}"
        in caplog.text
    )
    assert "base model on 8 pictures: heldout_mean" in caplog.text
    for line in metrics:
        assert 0 < line["diversity"] < 2 and 0 <= line["drift"] < 2 and line["heldout_std"] > 0
    # best/ is the adapter of that step: its pictures score what was measured then.
    (tmp_path / "again").mkdir()
    short = train(tmp_path / "again" / "run", *flags, *HELD_OUT, "--max_train_steps", str(best + 1))
    assert short[best]["heldout_mean"] == held[best]
    assert same_adapter(tmp_path / "best", tmp_path / "again" / "run")
    assert not same_adapter(tmp_path / "best", tmp_path)


def test_early_stopping_is_resumed(tmp_path):
    flags = ["--reward", "jpeg_compressibility:-1", "--learning_rate", "0.3", "--checkpointing_steps", "1"]
    flags += [*HELD_OUT, "--early_stop_patience", "2"]
    straight = train(tmp_path / "straight", *flags, "--max_train_steps", "9")
    train(tmp_path / "resumed", *flags, "--max_train_steps", str(len(straight) - 1))
    resumed = train(tmp_path / "resumed", *flags, "--max_train_steps", "9", "--resume_from_checkpoint", "latest")
    assert [line["heldout_mean"] for line in resumed] == [line["heldout_mean"] for line in straight]


def test_the_moving_average_is_an_adapter_of_its_own(tmp_path):
    flags = ["--learning_rate", "1e-2", "--checkpointing_steps", "1", "--ema_decay", "0.5"]
    train(tmp_path, *flags, "--max_train_steps", "3")
    # diffusers' average decays by min(decay, (1 + n) / (10 + n)) at its n-th step after the first.
    steps = [load_file(tmp_path / f"checkpoint-{n}" / LORA) for n in (1, 2, 3)]
    average = load_file(tmp_path / "ema" / LORA)
    for key in average:
        expected = steps[0][key]
        for n, values in enumerate(steps[1:], start=1):
            decay = min(0.5, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * values[key]
        if "up" in key:  # what starts from zero: the rest starts from where no checkpoint tells
            torch.testing.assert_close(average[key], expected, rtol=1e-4, atol=1e-6)
    assert not same_adapter(tmp_path, tmp_path / "ema")
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path / "ema")


def test_decoding_in_parts_changes_nothing(tmp_path):
    whole = train(tmp_path / "whole", "--decode_batch_size", "2", "--learning_rate", "1e-3")
    parts = train(tmp_path / "parts", "--decode_batch_size", "1", "--learning_rate", "1e-3")
    for a, b in zip(whole, parts):
        assert a["reward_mean"] == pytest.approx(b["reward_mean"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    "also",
    [
        ["--kl_weight", "0.1", "--gradient_accumulation_steps", "2"],
        ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2", "--baseline", "predicted_x0"],
        ["--gradient_estimator", "rlr_paper", "--rest", "likelihood_ratio", "--gradient_checkpointing"],
        ["--gradient_estimator", "truncated_bp"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_kept_graphs_change_nothing_but_the_calls(tmp_path, also, capsys, monkeypatch):
    calls = []

    def counted(self, k, x, prediction=StableDiffusionChain._prediction):
        calls.append(k)
        return prediction(self, k, x)

    monkeypatch.setattr(StableDiffusionChain, "_prediction", counted)
    train(tmp_path / "again", *also, "--learning_rate", "1e-3")
    again, planned = len(calls), capsys.readouterr().out
    calls.clear()
    train(tmp_path / "kept", *also, "--learning_rate", "1e-3", "--keep_graphs", "2")
    assert same_adapter(tmp_path / "again", tmp_path / "kept")
    # Two steps of a batch, or as many as the estimator sweeps.
    batches = 4 if "--gradient_accumulation_steps" in also else 2
    kept = 1 if "truncated_bp" in also else 2
    assert again - len(calls) == batches * kept
    forwards = [int(re.search(r"(\d+) forward", text).group(1)) for text in (planned, capsys.readouterr().out)]
    assert forwards[0] - forwards[1] == 2 * 2 * kept * batches / 2


def test_accumulated_batches_are_averaged(tmp_path):
    """Sixteen pictures in eight batches or in one: the same pictures, and the same gradient."""
    flags = ["--gradient_estimator", "full_bp", "--max_train_steps", "1"]
    (whole,) = train(tmp_path / "whole", *flags, "--train_batch_size", "16")
    (parts,) = train(tmp_path / "parts", *flags, "--train_batch_size", "2", "--gradient_accumulation_steps", "8")
    assert whole["num_images"] == parts["num_images"] == 16
    assert parts["reward_mean"] == pytest.approx(whole["reward_mean"], rel=1e-4)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_the_learning_rate_follows_its_schedule_and_the_number_of_pictures(tmp_path):
    flags = ["--learning_rate", "1e-3", "--lr_scheduler", "linear", "--lr_warmup_steps", "2", "--max_train_steps", "4"]
    lines = train(tmp_path / "plain", *flags)
    # Of the next step, as in the examples of diffusers.
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.5e-3, 1e-3, 0.5e-3, 0])
    lines = train(tmp_path / "scaled", *flags, "--scale_lr", "--gradient_accumulation_steps", "2")
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-3, 4e-3, 2e-3, 0])


def test_a_black_box_in_a_sum_counts_as_it_does_alone(tmp_path):
    """Beside a differentiable member of weight zero the black box enters through dR/dx_0, and nothing changes."""
    flags = ["--mixing", "0.5", "--learning_rate", "1e-3"]
    train(tmp_path / "alone", *flags, "--reward", "jpeg_compressibility")
    train(tmp_path / "sum", *flags, "--reward", "aesthetic:0,jpeg_compressibility")
    alone, summed = load_file(tmp_path / "alone" / LORA), load_file(tmp_path / "sum" / LORA)
    for key in alone:
        torch.testing.assert_close(alone[key], summed[key], rtol=1e-4, atol=1e-6)


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    runs = [train(tmp_path / name, "--seed", seed) for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))]
    assert same_adapter(tmp_path / "a", tmp_path / "b")
    assert not same_adapter(tmp_path / "a", tmp_path / "c")
    assert runs[0][0]["reward_mean"] == runs[1][0]["reward_mean"] != runs[2][0]["reward_mean"]


def checkpoints(directory):
    """What there is of checkpoints, whole or not; a partial one would be a bug."""
    return {name for name in os.listdir(directory) if name.startswith(("checkpoint", "partial"))}


# A single picture leans on the running mean of its rewards, ddpo on the largest deviation so far.
@pytest.mark.parametrize(
    "also",
    [
        [],
        ["--train_batch_size", "1"],
        ["--num_inference_steps", "6", "--train_batch_size", "3"],
        ["--gradient_estimator", "ddpo", "--baseline", "predicted_x0"],
        ["--gradient_estimator", "rlr_paper", "--subchain_sampling", "grad_norm", "--subchain_length", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_checkpoints_are_kept_to_their_limit_and_resumed_exactly(tmp_path, also):
    flags = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "2", "--learning_rate", "1e-3", *also]
    straight = train(tmp_path / "straight", *flags, "--max_train_steps", "6")
    assert checkpoints(tmp_path / "straight") == {"checkpoint-4", "checkpoint-6"}
    train(tmp_path / "resumed", *flags, "--max_train_steps", "5")
    assert checkpoints(tmp_path / "resumed") == {"checkpoint-2", "checkpoint-4"}
    assert not os.path.exists(tmp_path / "resumed" / "checkpoint-4" / "model.safetensors")
    resumed = train(tmp_path / "resumed", *flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert checkpoints(tmp_path / "resumed") == {"checkpoint-4", "checkpoint-6"}
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for key in ("reward_mean", "reward_std", "grad_norm", "gamma_mean"):
        assert [line[key] for line in resumed] == [line[key] for line in straight]
    assert same_adapter(tmp_path / "straight", tmp_path / "resumed")


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    train(tmp_path, "--checkpointing_steps", "1", "--max_train_steps", "1")
    path = tmp_path / "checkpoint-1" / "rlr_state.json"
    state = json.loads(path.read_text())
    del state["transport"], state["clipping"]
    path.write_text(json.dumps(state))
    with pytest.raises(SystemExit, match="cannot resume .* earlier version, which did not keep clipping, transport"):
        train(tmp_path, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")


def test_a_checkpoint_by_name_is_gone_on_from_and_pruned_as_in_the_examples_of_diffusers(tmp_path):
    train(tmp_path, "--checkpointing_steps", "2", "--max_train_steps", "4")
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    flags = ["--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", "2"]
    train(tmp_path, "--checkpointing_steps", "2", "--max_train_steps", "8", *flags)
    assert checkpoints(tmp_path) == {"checkpoint-6", "checkpoint-8"}


def test_a_run_in_the_folder_of_another_is_refused_and_harms_nothing(tmp_path):
    train(tmp_path, "--max_train_steps", "1")
    before = (tmp_path / LORA).read_bytes()
    # There is nothing to resume from, but an adapter.
    with pytest.raises(SystemExit, match="already holds a run: name another folder, train its adapter on"):
        train(tmp_path, "--max_train_steps", "1")
    # What is wrong with the input is said first.
    with pytest.raises(SystemExit, match="no such file"):
        train(tmp_path, "--prompts", "nowhere.txt")
    with pytest.raises(SystemExit, match="cannot be loaded"):
        train(tmp_path, "--pretrained_model_name_or_path", "/nowhere")
    assert (tmp_path / LORA).read_bytes() == before


def test_a_resume_point_that_does_not_fit_is_refused_and_harms_nothing(tmp_path):
    out, flags = tmp_path / "out", ["--checkpointing_steps", "2", "--max_train_steps", "4"]
    train(out, *flags)
    before = {name: (out / name).read_bytes() for name in (LORA, "metrics.jsonl", "README.md")}
    (out / "checkpoint-final").mkdir()
    (out / "checkpoint-9").mkdir()  # not whole: it does not count as the latest
    flags = ["--max_train_steps", "6", "--resume_from_checkpoint"]
    for bad, message in (
        (["--max_train_steps", "3", "--resume_from_checkpoint", "latest"], "--max_train_steps 3 ends before"),
        ([*flags, "checkpoint-2"], "'.*checkpoint-4' is newer"),
        ([*flags, "checkpoint-9"], "does not exist; whole checkpoints in .*: checkpoint-2, checkpoint-4"),
        ([*flags, "latest", "--num_inference_steps", "4"], "configuration: num_inference_steps was 3 and is 4$"),
        (
            [*flags, "latest", "--rank", "2", "--seed", "1"],
            "another configuration: rank was 4 and is 2; seed was 0 and",
        ),
        ([*flags, "latest", "--use_dora"], "use_dora was False and is True"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(out, *bad)
        assert before == {name: (out / name).read_bytes() for name in before}
    # From another folder it may go on where there is no run to write over.
    other = tmp_path / "other"
    point = ["--resume_from_checkpoint", str(out / "checkpoint-4"), "--max_train_steps", "5"]
    assert [line["step"] for line in train(other, *point)] == [5]
    with pytest.raises(SystemExit, match="already holds a run"):
        train(other, *point, "--max_train_steps", "7")
    with pytest.raises(
        SystemExit, match="already holds a run: .*, continue it with --resume_from_checkpoint latest, or"
    ):
        train(out)


def test_the_precision_of_the_launcher_is_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tmp_path, "--checkpointing_steps", "2")
    assert json.loads((tmp_path / "training_args.json").read_text())["mixed_precision"] == "bf16"
    assert "--mixed_precision bf16" in (tmp_path / "README.md").read_text()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="configuration: mixed_precision was 'bf16' and is 'no'$"):
        train(tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")


def test_held_out_pictures_keep_their_prompts_on_resume(tmp_path):
    point = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    flags = ["--max_train_steps", "1", "--checkpointing_steps", "1", "--num_validation_images", "1"]
    train(tmp_path / "without", *flags)
    train(tmp_path / "without", *flags, *point, "--validation_prompts", "a red one")
    train(tmp_path / "with", *flags, *HELD_OUT)
    with pytest.raises(SystemExit, match="validation_prompts was None and is .'a red one'.$"):
        train(tmp_path / "with", *flags, *HELD_OUT, *point, "--validation_prompts", "a red one")


def test_a_killed_run_may_have_left_half_a_line(tmp_path):
    train(tmp_path, "--checkpointing_steps", "2")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    resumed = train(tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    assert [line["step"] for line in resumed] == [1, 2, 3]


@pytest.mark.parametrize("name", ["README.md", "checkpoint-2/model.safetensors"])
@pytest.mark.parametrize("flag", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]])
def test_what_is_somebody_elses_is_not_replaced(tmp_path, name, flag):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(SystemExit, match=f"holds '{name.split('/')[0]}', which is of no run of this script"):
        train(tmp_path, "--checkpointing_steps", "2", *flag)
    assert path.read_text() == "mine"


def test_overflows_are_told_and_not_borne_for_ever(caplog):
    """With a real GradScaler and the norm of its unscaled gradients, as accelerate takes them."""
    from types import SimpleNamespace

    PartialState()  # for the logger
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(init_scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        scaler.scale(torch.ones(()))
        weight.grad = torch.tensor([float("inf"), 1.0])

        def clip(parameters, max_norm):
            scaler.unscale_(optimizer)
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

        accelerator = SimpleNamespace(scaler=scaler, device="cpu", reduce=lambda x, _: x, clip_grad_norm_=clip)
        args = SimpleNamespace(gradient_accumulation_steps=1)
        return average_gradients(args, accelerator, [weight], GradientClipping("auto"))

    assert not np.isfinite(step(2.0**10))
    assert "float16 overflows at a loss scale of 1024: this step is left out" in caplog.text
    with pytest.raises(
        RunError, match="float16 overflows even at a loss scale of 0.000488281: use --mixed_precision bf16"
    ):
        step(2.0**-11)


def test_the_scale_for_half_precision_comes_from_the_scaler():
    """Against a real GradScaler, which has no scale of its own before it is used."""
    from types import SimpleNamespace

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert loss_scale(SimpleNamespace(scaler=scaler, device="cpu")) == 8.0
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 16.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [2.0, 2.0]
    scaler.step(optimizer)
    assert loss_scale(SimpleNamespace(scaler=None, device="cpu")) == 1.0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--reward", "beauty:2"], "unknown reward 'beauty:2', known are: aesthetic, clip_score"),
        (["--reward", "aesthetic:much"], "'aesthetic:much'.* no finite number"),
        (["--reward", "os:system:2"], "reward 'os:system:2' fails on two random images: TypeError"),
        (["--reward", "aesthetic,nowhere.py:f"], "reward 'nowhere.py:f' cannot be imported: there is no file"),
        (["--reward", "aesthetic@v1"], "reward 'aesthetic@v1': the folder .* has no revisions"),
        (["--reward_batch_size", "2"], "--reward_batch_size 2 is more than .* raise --decode_batch_size 1 with it"),
        (["--reward_path", "aesthetic"], "'aesthetic' is not of the form NAME=DIR"),
        (["--reward_path", "aesthetic=/nowhere"], "'aesthetic=/nowhere': no such folder"),
        (["--prompts", ""], "prompts '': no such file"),
        (["--lr_scheduler", "piecewise_constant"], "piecewise_constant"),
        (["--adam_beta1", "2"], "--adam_beta1 2.0"),
        (["--seed", "-1"], "--seed -1"),
        (["--guidance_scale", "inf"], "--guidance_scale inf"),
        (["--num_inference_steps", "1000"], "--num_inference_steps 1000 reaches beyond"),
        (["--kl_weight", "1", "--gradient_estimator", "draft_lv"], "--kl_weight 1.0 needs an estimator that sweeps"),
        (["--kl_weight", "1", "--gradient_estimator", "full_bp", "--eta", "0"], "which --kl_weight 1.0 needs"),
        (["--kl_weight", "1", "--mixed_precision", "bf16"], "--kl_weight 1.0 needs --mixed_precision no .*: in bf16"),
        (["--kl_weight", "1", "--allow_tf32"], "--kl_weight 1.0 needs .* no --allow_tf32: in TF32 rounding outweighs"),
        (
            ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2", "--mixed_precision", "bf16"],
            "--num_inner_epochs 2 needs --mixed_precision no .*: in bf16",
        ),
        (["--kl_weight", "-1"], "--kl_weight -1.0"),
        (["--ema_decay", "1"], "--ema_decay 1.0 must be in (0, 1)".replace("(", "\\(").replace(")", "\\)")),
        (["--early_stop_patience", "2"], "--early_stop_patience 2 needs --heldout_reward"),
        (["--heldout_reward", "beauty"], "unknown reward 'beauty'"),
        (["--heldout_reward", "clip_score", "--feature_model", "/nowhere"], "'/nowhere' holds no config.json"),
        (["--num_heldout_images", "6"], "--num_heldout_images 6 must be a multiple of 4"),
        (["--num_eval_images", "1"], "--num_eval_images 1"),
        (["--gradient_estimator", "truncated_bp", "--truncation_steps", "4"], "--truncation_steps 4 is more than"),
        (["--gradient_estimator", "rlr_paper", "--eta", "0"], "--eta 0 leaves no noise.*rlr_paper"),
        (["--gradient_estimator", "rlr_paper", "--subchain_length", "some"], "--subchain_length 'some'"),
        (["--gradient_estimator", "rlr_paper", "--subchain_length", "3"], "a sub-chain of 3 of 3 steps"),
        (["--gradient_estimator", "rlr_paper", "--subchain_range", "1", "2"], "not at 1..2"),
        (
            ["--gradient_estimator", "rlr_paper", "--subchain_length", "auto", "--memory_budget_gb", "2"],
            "a memory budget of 2.0 GB",
        ),
        (["--gradient_estimator", "draft_lv", "--reward", "jpeg_compressibility"], "not differentiable.*draft_lv"),
        (["--sweep_fraction", "0"], "--sweep_fraction '0' is neither auto nor a number in"),
        (["--keep_graphs", "-1"], "--keep_graphs -1 must be a number that is not negative"),
        (
            ["--keep_graphs", "2", "--gradient_estimator", "draft_lv"],
            "--keep_graphs 2 needs a sweep of the rollout's own",
        ),
        (
            ["--keep_graphs", "2", "--gradient_estimator", "rlr_paper"],
            "perturbed weights of --rest zeroth_order have not",
        ),
        (
            ["--sweep_fraction", ".5", "--gradient_estimator", "draft_lv"],
            "--sweep_fraction 0.5 needs an estimator that",
        ),
        (["--scheduler", "ddpm", "--eta", "0.5"], "--eta 0.5 is of --scheduler ddim, and ddpm has"),
        (["--scheduler", "euler_ancestral", "--gradient_estimator", "ddpo"], "adds no noise at step 1 from the end"),
        (["--scheduler", "ddpm", "--reward", "jpeg_compressibility"], "adds no noise at step 1 from the end"),
        (["--scheduler", "dpm_sde", "--kl_weight", "1"], "adds no noise at step 1 from the end"),
        (["--adapter_path", "x", "--rank", "2"], "--rank is for a new adapter, and --adapter_path 'x' has its own"),
        (["--dcot_boundaries", ".7", ".3"], "the boundaries .0.7, 0.3. are not two shares"),
        (["--height", "40", "--width", "36"], "pictures of 40 x 36 pixels"),
        (["--adapter_path", "/nowhere"], "--adapter_path '/nowhere' cannot be loaded"),
        (["--branches", "2"], "--branches 2 is for black boxes"),
        (["--branches", "2", "--gradient_estimator", "ddpo"], "--branches 2 needs --gradient_estimator rlr"),
        (["--baseline_vae", "x", "--baseline", "none"], "--baseline_vae 'x' needs --baseline auto or predicted_x0"),
        (["--baseline_vae", "/nowhere", "--baseline", "predicted_x0"], "--baseline_vae '/nowhere' cannot be loaded"),
        (
            ["--baseline_vae", f"{TINY_SD}/vae"],
            "vae' cannot be loaded: its config.json says AutoencoderKL, and .*Tiny is",
        ),
        (["--gradient_estimator", "magic"], "'magic', known are: rlr, rlr_paper, full_bp"),
        (["--prompts", "nowhere.txt"], "prompts 'nowhere.txt': no such file"),
        (["--prompts", os.devnull], "no such file"),
        (["--train_batch_size", "0"], "--train_batch_size 0 must be at least 1"),
        (["--max_train_steps", "-3"], "--max_train_steps -3 must be at least 1"),
        (["--num_inference_steps", "0"], "--num_inference_steps 0 must be at least 1"),
        (["--num_inference_steps", "2000"], "2000 cannot be larger"),
        (["--eta", "0"], "--eta 0 leaves no noise.*rlr"),
        (["--eta", "0", "--gradient_estimator", "ddpo"], "--eta 0 leaves no noise.*ddpo"),
        (["--mixing", "2"], "--mixing '2'"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (
            ["--sweep_fraction", ".5", "--gradient_estimator", "ddpo", "--num_inner_epochs", "2"],
            "--sweep_fraction 0.5 is biased with --num_inner_epochs 2",
        ),
        (["--max_grad_norm", "none"], "--max_grad_norm 'none'"),
        (["--num_inner_epochs", "2"], "needs --gradient_estimator ddpo"),
        (["--reward", "jpeg_compressibility", "--gradient_estimator", "full_bp"], "not differentiable.*full_bp"),
        (["--reward", "aesthetic,jpeg_compressibility", "--gradient_estimator", "alignprop"], "not differentiable"),
        (["--reward", "jpeg_compressibility", "--gradient_estimator", "truncated_bp"], "not differentiable"),
        (["--pretrained_model_name_or_path", "/nowhere"], "'/nowhere' cannot be loaded"),
        (["--resume_from_checkpoint", "checkpoint-7"], "'checkpoint-7' does not exist"),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "give one of them"),
        (["--output_dir", "/proc/no/folder"], "/proc/no"),
        (["--push_every", "2"], "--push_every 2 needs --push_to_hub"),
        (["--resolution", "36"], "pictures of 36 x 36 pixels: no multiples of 8"),
        (["--lora_layers", "to_k, to_nothing"], "has no layer 'to_nothing'"),
        (["--dataset_name", "x"], "give one of them"),
        (["--report_to", "wandb", "--hub_token", "hf_x"], "would log the token"),
        (["--report_to", "all", "--hub_token", "hf_x"], "would log the token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_before_anything_is_written(tmp_path, capsys, flags, message):
    import re

    assert re.search(message, refused(tmp_path / "out", capsys, *flags))


def test_a_model_whose_last_step_is_silent_is_refused_where_noise_is_needed(tmp_path, capsys):
    model = tmp_path / "model"
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    pipeline.save_pretrained(model)
    flags = ["--pretrained_model_name_or_path", str(model)]
    sums = ["--reward", "aesthetic,jpeg_compressibility"]
    for bad in (["--gradient_estimator", "ddpo"], ["--reward", "jpeg_compressibility"], sums):
        assert "no noise at step 1 from the end" in refused(tmp_path / "out", capsys, *flags, *bad)
    assert len(train(tmp_path / "out", *flags)) == 2


def test_a_reward_that_fails_stops_the_run_with_the_step_and_the_prompt(tmp_path):
    """A real failure: a head that overflows to infinity gives NaN."""
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "reward"
    shutil.copytree(TINY_AESTHETIC, broken)
    state = load_file(broken / "aesthetic_head.safetensors")
    state["layers.7.bias"] = torch.full_like(state["layers.7.bias"], float("nan"))
    save_file(state, broken / "aesthetic_head.safetensors")
    with pytest.raises(SystemExit, match="step 1: reward 'aesthetic' returned nan for prompt 'a [a-z]+ [a-z]+'"):
        train(tmp_path / "out", "--reward_path", f"aesthetic={broken}")
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "out" / LORA).exists()


def test_prompts_from_a_local_dataset(tmp_path, capsys):
    import pandas

    data = tmp_path / "data"
    data.mkdir()
    pandas.DataFrame({"caption": ["a red one", "", "a blue two"]}).to_parquet(data / "train.parquet")
    flags = [flag for flag in BASE if flag not in ("--prompts", DIGITS)]
    flags += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]
    with pytest.raises(SystemExit, match="--dataset_name .*: no --caption_column 'text' in it, only caption"):
        main(parse_args(flags))
    with pytest.raises(SystemExit, match="--dataset_name .*: .*validation"):
        main(parse_args([*flags, "--dataset_split", "validation"]))
    main(parse_args([*flags, "--caption_column", "caption"]))
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("streaming", [[], ["--dataset_streaming"]], ids=["loaded", "streamed"])
def test_prompts_of_a_dataset_in_a_folder_or_a_file(tmp_path, streaming):
    rows = [{"text": [f"a red {word}", "another caption"], "other": 1} for word in ("one", "two", "one", "three")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (tmp_path / "data", tmp_path / "data" / "train.jsonl"):
        args = parse_args(["--dataset_name", str(source), *streaming])
        assert load_training_prompts(args) == ["a red one", "a red two", "a red three"]
        args = parse_args(["--dataset_name", str(source), "--max_prompts", "2", *streaming])
        assert load_training_prompts(args) == ["a red one", "a red two"]


def test_a_dataset_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n")
    (tmp_path / "broken.csv").write_text('text\na fox\n"a cat", "b", 3\n\0\n')
    for name in ("prompts.txt", "broken.csv"):
        with pytest.raises(ValueError, match=f"--dataset_name .*{name}") as error:
            load_training_prompts(parse_args(["--dataset_name", str(tmp_path / name)]))
        assert "\n" not in str(error.value)


def test_what_the_text_encoder_does_not_see_is_said_once(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a red one\n" + "a red two and " * 10 + "a blue nine\n")
    with caplog.at_level("WARNING", logger="train_rlr_sd"):
        train(tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"))
    told = [record.getMessage() for record in caplog.records if "text encoder reads" in record.getMessage()]
    assert len(told) == 1 and "1 of 2 prompts are longer than the 16 tokens that the text encoder reads" in told[0]
    assert re.search(r"it does not see '[a-z ]*a red two and a blue nine'$", told[0]), told


def test_a_chain_of_thought_trains_each_third_under_its_own_prompt(tmp_path, capsys):
    """With the same prompt at all levels it is the plain run; with others it is not; and it is validated as it is trained."""
    file, prompts = tmp_path / "levels.jsonl", ["a red one", "a blue two"]

    def lines(levels_of):
        file.write_text(
            "\n".join(json.dumps({"prompt": p, **dict(zip(("coarse", "mid", "fine"), levels_of(p)))}) for p in prompts)
        )
        load_levels.cache_clear()

    flags = ["--prompts", str(file), "--num_inference_steps", "4", "--num_eval_images", "2"]
    (tmp_path / "plain.txt").write_text("\n".join(prompts))
    plain = train(tmp_path / "plain", *flags, "--prompts", str(tmp_path / "plain.txt"))
    lines(lambda p: (p, p, p))
    same = train(tmp_path / "same", *flags)
    assert [line["reward_mean"] for line in same] == pytest.approx([line["reward_mean"] for line in plain], rel=1e-5)
    lines(lambda p: ("a green nine", p, p))
    other = train(tmp_path / "other", *flags)
    assert other[0]["reward_mean"] != pytest.approx(same[0]["reward_mean"], rel=1e-3)
    base = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["base"]["mean"] for name in ("same", "other")
    ]
    assert base[0] != pytest.approx(base[1], rel=1e-3)
    # Where coarse has no step, it does not matter, in training and in the comparison.
    free = train(tmp_path / "free", *flags, "--dcot_boundaries", "0", "0.67")
    assert free[0]["reward_mean"] == pytest.approx(same[0]["reward_mean"], rel=1e-5)
    found = json.loads((tmp_path / "free" / "evaluation.json").read_text())["base"]["mean"]
    assert found == pytest.approx(base[0], rel=1e-5)
    assert "a coarse, a middle and a fine prompt" in (tmp_path / "other" / "README.md").read_text()


def test_a_tiny_autoencoder_may_decode_the_predictions(tmp_path):
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    tiny.save_pretrained(tmp_path / "taesd")
    flags = ["--baseline", "predicted_x0", "--gradient_estimator", "ddpo", "--learning_rate", "1e-3"]
    train(tmp_path / "own", *flags)
    train(tmp_path / "tiny", *flags, "--baseline_vae", str(tmp_path / "taesd"))
    assert not same_adapter(tmp_path / "own", tmp_path / "tiny")


@pytest.mark.parametrize(
    ("flags", "same_as", "predicted"),
    [
        ([], "leave_one_out", [0, 0]),
        (["--reward", "jpeg_compressibility"], "predicted_x0", [4, 4]),
        (["--reward", "aesthetic,jpeg_compressibility", "--baseline_steps", "2"], "predicted_x0", [2, 2]),
        (["--reward", "jpeg_compressibility", "--gradient_estimator", "ddpo"], "leave_one_out", [0, 0]),
    ],
)
def test_the_default_baseline_predicts_what_has_no_gradient(tmp_path, flags, same_as, predicted):
    flags = [*flags, "--num_inference_steps", "4", "--learning_rate", "1e-3"]
    metrics = train(tmp_path / "auto", *flags)
    train(tmp_path / "named", *flags, "--baseline", same_as)
    assert [line["predicted_steps"] for line in metrics] == predicted
    assert same_adapter(tmp_path / "auto", tmp_path / "named")


def test_the_default_baseline_predicts_where_a_gradient_is_too_rough_to_lean_on(tmp_path, capsys):
    """The mixing knows of it after the first step. Of the last half of the chain but for the very last step, of which the
    gradient is all that is used."""
    module = tmp_path / "rough.py"
    module.write_text("def rough(images, prompts):\n    return (1e5 * images.mean((1, 2, 3))).sin()\n")
    flags = ["--reward", f"{module}:rough", "--max_train_steps", "3", "--num_inference_steps", "6"]
    metrics = train(tmp_path / "out", *flags, "--train_batch_size", "4")
    first, *later = [(line["gamma_mean"], line["predicted_steps"]) for line in metrics]
    assert first[0] > 0.99 and first[1] == 0
    assert all(gamma < 0.5 and steps == 2 for gamma, steps in later)
    assert "pictures scored per step" in capsys.readouterr().out


def test_a_single_black_box_picture_a_step_trains(tmp_path):
    """No other picture to compare it with: the default baseline compares with earlier ones."""
    flags = ["--reward", "jpeg_compressibility", "--train_batch_size", "1", "--learning_rate", "1e-3"]
    assert all(line["grad_norm"] > 0 for line in train(tmp_path, *flags))


def test_defaults_are_those_of_the_documentation():
    args = parse_args([])
    assert args.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
    assert (args.reward, args.gradient_estimator, args.mixing) == ("aesthetic", "rlr", "auto")
    assert args.max_grad_norm == "auto"
    assert (args.num_inference_steps, args.guidance_scale, args.eta, args.train_batch_size) == (50, 5.0, 1.0, 4)
    assert args.output_dir == "rlr-sd-lora" and args.prompts is None and args.dataset_name is None


def test_training_goes_on_from_an_adapter(tmp_path):
    train(tmp_path / "first", "--rank", "2", "--lora_alpha", "4", "--learning_rate", "1e-2")
    same = train(tmp_path / "same", "--adapter_path", str(tmp_path / "first"), "--learning_rate", "1e-30")
    assert same_adapter(tmp_path / "first", tmp_path / "same")
    assert 4.0 in json.loads(safe_open(tmp_path / "same" / LORA, "pt").metadata()["lora_adapter_metadata"]).values()
    further = train(tmp_path / "further", "--adapter_path", str(tmp_path / "first"), "--learning_rate", "1e-2")
    assert same[0]["reward_mean"] == further[0]["reward_mean"] and not same_adapter(
        tmp_path / "first", tmp_path / "further"
    )
    # In half precision, too, the adapter is read as it was written.
    half = ["--adapter_path", str(tmp_path / "first"), "--learning_rate", "1e-30", "--mixed_precision", "bf16"]
    AcceleratorState._reset_state()
    train(tmp_path / "half", *half)
    AcceleratorState._reset_state()
    assert same_adapter(tmp_path / "first", tmp_path / "half")
    # The divergence is from the base model, not from the adapter that training began with.
    flags = ["--adapter_path", str(tmp_path / "first"), "--kl_weight", "0.1"]
    assert train(tmp_path / "kl", *flags)[0]["kl"] > 0


MODELS = {
    "1.4": (PNDMScheduler, {"skip_prk_steps": True}, {}),
    "2.1 base": (DDIMScheduler, {"clip_sample": False}, {"use_linear_projection": True}),
    "2.1": (DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, {"use_linear_projection": True}),
    "zero terminal signal": (
        EulerDiscreteScheduler,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"use_linear_projection": True, "upcast_attention": True},
    ),
}


def random_pipeline(folder, name):
    """A pipeline in the layout of a Stable Diffusion model, with a U-Net of random weights."""
    scheduler_class, settings, differing = MODELS[name]
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(
        {**pipeline.unet.config, "attention_head_dim": [2, 4], **differing}
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline.scheduler = scheduler_class(**betas, **settings)
    pipeline.save_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_other_stable_diffusion_models(tmp_path, name):
    random_pipeline(tmp_path / "model", name)
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--learning_rate", "1e-2"]
    # With eta 1 DDIM is off by one rounding there, and takes a root of less than nothing.
    flags += ["--eta", "0.9"] if name == "zero terminal signal" else []
    metrics = train(tmp_path / "out", *flags, "--num_eval_images", "2")
    assert all(np.isfinite([line["reward_mean"], line["grad_norm"]]).all() for line in metrics)
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["gain"]["mean"] != 0


def test_pure_noise_cannot_be_predicted_from_pure_noise(tmp_path, capsys):
    """A model of noise prediction on a schedule that starts without signal: said before anything is written."""
    pipeline = tiny_pipeline()
    config = {**pipeline.scheduler.config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(config)
    pipeline.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "out", capsys, "--pretrained_model_name_or_path", str(tmp_path / "model"))
    assert re.search(r"step 3 from the end \(timestep 999\): the schedule degenerates", message)


def test_pictures_need_not_be_square(tmp_path):
    train(tmp_path, "--height", "48", "--width", "32", "--num_eval_images", "2", "--baseline", "predicted_x0")
    config = json.loads((tmp_path / "training_args.json").read_text())
    assert (config["height"], config["width"], config["resolution"]) == (48, 32, 32)
    args = parse_args([*BASE, "--height", "48", "--width", "32"])
    assert generate(tiny_pipeline(), ["a red one"], args).shape == (1, 3, 48, 32)


def test_a_preset_is_the_flags_that_it_stands_for():
    plain, preset = vars(parse_args([])), vars(parse_args(["--preset_low_memory"]))
    assert {name: value for name, value in preset.items() if value != plain[name]} == {
        name: value for name, value in LOW_MEMORY.items() if value != plain[name]
    }
    # The same pictures a step, one at a time.
    assert preset["gradient_accumulation_steps"] == plain["train_batch_size"] and preset["train_batch_size"] == 1
    own = parse_args(["--train_batch_size", "4", "--mixed_precision", "fp16", "--preset_low_memory"])
    assert (own.train_batch_size, own.mixed_precision, own.reward_offload) == (4, "fp16", True)
    # The card's command starts the same run.
    words = command_of(own, 1).split()
    assert vars(parse_args(words[words.index("train_rlr_sd.py") + 1 :])) == vars(own)


def test_the_third_step_tells_how_long_the_run_will_take(tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(tmp_path, "--max_train_steps", "4")
    assert re.search(r"about 0:00:\d\d for 4 steps in all, at \d+\.\d seconds a step", caplog.text)


@pytest.mark.parametrize(
    ("flags", "scored"),
    [
        ([], "2"),
        (["--gradient_estimator", "draft_lv", "--lv_samples", "3"], "8 = 2 + 3 other last steps of each"),
        (["--reward", "jpeg_compressibility"], "8 = 2 + 3 predictions of each"),
        (["--reward", "jpeg_compressibility", "--branches", "2"], "10 = 2 + 4 branches of each"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_plan_tells_how_many_pictures_are_scored(tmp_path, capsys, flags, scored):
    train(tmp_path, "--max_train_steps", "1", *flags)
    assert f"pictures scored per step  {scored}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        ([], "48 forward + 36 with backward (on average), at first\n"),
        (["--keep_graphs", "4"], "20 forward + 36 with backward (on average), at first\n"),
        (["--sweep_fraction", "0.25"], "48 forward + 30 with backward (on average)\n"),
        (["--sweep_fraction", "1"], "48 forward + 48 with backward\n"),
        (["--mixing", "0.5"], "48 forward + 48 with backward\n"),
        (["--gradient_estimator", "full_bp"], "48 forward + 48 with backward\n"),
        (["--reward", "jpeg_compressibility"], "48 forward + 48 with backward\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_plan_tells_how_many_steps_are_swept(tmp_path, capsys, flags, calls):
    """Of 6 steps, guided, of 4 pictures, the last 3 and a half of the others, where a gradient can be leaned on."""
    train(tmp_path, "--num_inference_steps", "6", "--train_batch_size", "4", "--max_train_steps", "1", *flags)
    assert calls in capsys.readouterr().out


def test_the_sweep_computes_the_steps_that_were_drawn(tmp_path, monkeypatch):
    """Whether the U-Net is called with a graph or without, in three optimizer steps with some graphs kept."""
    drawn, calls, plain, plain_draw = [], {True: 0, False: 0}, StableDiffusionChain.mean, Schedule.draw_weights

    def counting(chain, k, x):
        calls[torch.is_grad_enabled()] += 1
        return plain(chain, k, x)

    def drawing(schedule):
        drawn.append(plain_draw(schedule)[1:])
        return [1.0, *drawn[-1]]

    monkeypatch.setattr(StableDiffusionChain, "mean", counting)
    monkeypatch.setattr(Schedule, "draw_weights", drawing)
    flags = ["--num_inference_steps", "6", "--train_batch_size", "4", "--max_train_steps", "3"]
    metrics = train(tmp_path, *flags, "--keep_graphs", "4")
    kept, swept = (sum(w > 0 for weights in drawn for w in weights[:end]) for end in (4, 6))
    assert len(drawn) == 3 and 9 <= kept < swept < 18
    assert calls == {True: swept, False: 18 - kept}
    assert metrics[0]["swept_steps"] == 4.5


def test_steps_that_are_left_out_of_the_sweep_cost_no_more_than_noise(tmp_path):
    """With all graphs kept it is the same step."""
    flags = ["--num_inference_steps", "6", "--train_batch_size", "4", "--max_train_steps", "1"]
    kept = train(tmp_path / "kept", *flags, "--keep_graphs", "6")
    again = train(tmp_path / "again", *flags)
    whole = train(tmp_path / "whole", *flags, "--sweep_fraction", "1")
    assert kept[0]["grad_norm"] == again[0]["grad_norm"] and same_adapter(tmp_path / "kept", tmp_path / "again")
    assert kept[0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-3)
    assert kept[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=0.5)


def test_a_divergence_counts_by_the_weight_of_its_step(tmp_path, monkeypatch):
    train(tmp_path / "first", "--learning_rate", "1e-2")
    flags = ["--adapter_path", str(tmp_path / "first"), "--kl_weight", "0.1", "--max_train_steps", "1"]
    found = {}
    for weight in (0.0, 1.0, 2.0):
        monkeypatch.setattr(Schedule, "draw_weights", lambda schedule, w=weight: [*[1.0] * 6, w])
        metrics = train(tmp_path / str(weight), *flags, "--num_inference_steps", "6")
        found[weight] = metrics[0]["kl"]
    assert 0 < found[0.0] < found[1.0]
    assert (found[0.0] + found[2.0]) / 2 == pytest.approx(found[1.0], rel=1e-5)


def test_a_compiler_that_fails_is_warned_of_and_done_without(tmp_path, caplog):
    train(tmp_path / "plain")
    AcceleratorState._reset_state()
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}):
        train(tmp_path / "compiled", "--compile")
    assert "the U-Net cannot be compiled and runs as it is: InvalidCxxCompiler" in caplog.text
    assert same_adapter(tmp_path / "compiled", tmp_path / "plain")


def test_a_compiled_unet_may_be_held_to_the_base_model(tmp_path, monkeypatch):
    """With the graphs of the compiler in C++ or Triton, whose buffers may be used once."""
    flags = ["--kl_weight", "0.1", "--mixing", "0.5", "--learning_rate", "1e-3"]
    plain = train(tmp_path / "plain", *flags)
    AcceleratorState._reset_state()
    monkeypatch.setattr("torch._functorch.config.donated_buffer", True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    compiled = train(tmp_path / "compiled", *flags)
    assert compiled[1]["kl"] == pytest.approx(plain[1]["kl"], rel=1e-2) and plain[1]["kl"] > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher(tmp_path, processes):
    """As a user starts it. Two ranks draw other noise, end in the same adapter (the checkpoint compares them, and would
    stop the run if the gradients were not averaged), and write one line a step."""
    if processes == 1:
        launcher = ["accelerate.commands.launch", "--num_processes", "1"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launcher, os.path.join(ROOT, "train_rlr_sd.py"), *BASE]
    command += ["--num_inference_steps", "5"]  # of which the first two may be left out of the sweep
    command += ["--output_dir", str(tmp_path / "out"), "--checkpointing_steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{2 * processes} = 2 batch x 1 accumulation x {processes} ranks" in result.stdout
    assert "reward=" in result.stderr and "seconds=" in result.stderr
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["num_images"] == 2 * processes for line in lines)
    states = [f for f in os.listdir(tmp_path / "out" / "checkpoint-2") if f.startswith("random_states")]
    assert len({(tmp_path / "out" / "checkpoint-2" / state).read_bytes() for state in states}) == processes
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    if processes == 1:
        # Far more memory than there is.
        resume = ["--resolution", "400000", "--output_dir", str(tmp_path / "large")]
    result = subprocess.run([*command, *resume], env=environment, capture_output=True, text=True, cwd=tmp_path)
    if processes == 1:
        assert result.returncode != 0
        for remedy in (
            "out of memory",
            "--train_batch_size",
            "--gradient_accumulation_steps",
            "--gradient_checkpoint",
        ):
            assert remedy in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_by_default_the_unit_of_a_reward_does_not_matter(tmp_path):
    """Neither to the mixing nor to the clipping nor to AdamW and its epsilon."""
    flags = ["--max_train_steps", "4", "--learning_rate", "1e-3"]
    train(tmp_path / "one", *flags, "--reward", "aesthetic:1")
    train(tmp_path / "thousand", *flags, "--reward", "aesthetic:1024")
    train(tmp_path / "fixed", *flags, "--reward", "aesthetic:1024", "--max_grad_norm", "1")
    one, thousand, fixed = (load_file(tmp_path / name / LORA) for name in ("one", "thousand", "fixed"))
    close = lambda a, b: all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-6) for key in a)  # noqa: E731
    assert close(one, thousand) and not close(one, fixed)


def test_gradients_are_clipped_to_the_tenth_percentile_of_the_norms_so_far():
    """A large one is not taken at its word, neither is it kept out of the percentile, and what is clipped has norm 1."""
    accelerator, clipping = Accelerator(cpu=True), GradientClipping("auto")
    args = parse_args(["--gradient_accumulation_steps", "2"])
    generator, norms = torch.Generator().manual_seed(0), []
    for scale in (1.0, 30.0, 2.0, 0.5, 4.0, 0.1):
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
        for p in parameters:
            p.grad = scale * torch.randn(p.shape, generator=generator)
        norms.append(torch.cat([p.grad for p in parameters]).norm().item() / 2)
        assert average_gradients(args, accelerator, parameters, clipping) == pytest.approx(norms[-1])
        clipped = torch.cat([p.grad for p in parameters]).norm().item()
        assert clipped == pytest.approx(min(1.0, norms[-1] / np.quantile(norms, 0.1)), rel=1e-4)
    assert clipped < 0.5  # the last one is below the percentile, and stays the shorter for it
    for nothing in (0.0, 0.0, 1e-9):  # batches whose rewards are all the same
        clipping.factor(nothing)
    assert clipping.factor(7.0) == pytest.approx(1 / 7.0)
    again = GradientClipping("auto")
    again.load_state_dict(json.loads(json.dumps(clipping.state_dict())))
    assert again.factor(0.05) == pytest.approx(1 / np.quantile([*norms, 7.0, 0.05], 0.1))
    for nothing in (math.inf, 0.0):  # the former a float16 step that is left out
        assert GradientClipping("auto").factor(nothing) == 1.0
    fixed = GradientClipping(2.0)
    assert fixed.factor(0.5) == 1.0 and fixed.factor(8.0) == 0.25
