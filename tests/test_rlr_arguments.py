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
"""The command line of the training script: flags, defaults, presets, --help, and what is refused before a model is loaded."""

import copy
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import rlr_training.checks
from rlr_testing import BASE, ROOT
from rlr_training import arguments
from rlr_training.checks import check_args, flag_of, rlr_settings
from rlr_training.hub import command_of, typed_flags
from rlr_utils import BASELINES, ESTIMATORS, RESTS, Settings
from train_rlr_sd import parse_args


SCRIPT = os.path.join(ROOT, "train_rlr_sd.py")


def error_of(capsys, *flags):
    """The line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        parse_args([*BASE, *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("train_rlr_sd.py: error: ") and message.count("\n") == 1
    return message


# Defaults and presets


def test_defaults_are_those_of_the_documentation():
    args = parse_args([])
    assert args.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
    assert (args.reward, args.gradient_estimator, args.mixing) == ("aesthetic", "rlr", "auto")
    assert args.max_grad_norm == "auto"
    assert (args.num_inference_steps, args.guidance_scale, args.eta, args.train_batch_size) == (50, 5.0, 1.0, 4)
    assert args.output_dir == "rlr-sd-lora" and args.prompts is None and args.dataset_name is None


def test_settings_have_the_same_defaults_as_those_of_rlrstep():
    settings = rlr_settings(parse_args([]))
    # Only a script knows what else its GPU has to hold.
    assert Settings(**settings) == Settings(keep_graphs="auto")
    assert all(flag_of(name).removeprefix("--") in vars(parse_args([])) for name in settings)


def test_choices_are_those_of_rlrstep(capsys):
    assert (arguments.ESTIMATORS, arguments.BASELINES) == (ESTIMATORS, BASELINES)
    for rest in RESTS:
        assert parse_args(["--rest", rest]).rest == rest
    assert error_of(capsys, "--rest", "all").endswith(f"--rest 'all' must be one of {', '.join(RESTS)}\n")


def test_a_preset_sets_the_flags_that_it_names():
    plain, preset = vars(parse_args([])), vars(parse_args(["--preset_low_memory"]))
    changed = {name: value for name, value in preset.items() if value != plain[name]}
    assert changed == {name: value for name, value in arguments.LOW_MEMORY.items() if value != plain[name]}
    # As many images per step, one at a time.
    assert preset["gradient_accumulation_steps"] == plain["train_batch_size"] and preset["train_batch_size"] == 1


def test_flags_that_are_given_outweigh_a_preset():
    own = parse_args(["--train_batch_size", "4", "--mixed_precision", "fp16", "--preset_low_memory"])
    assert (own.train_batch_size, own.mixed_precision, own.reward_offload) == (4, "fp16", True)


def test_the_command_of_the_card_starts_the_same_run():
    flags = ["--preset_low_memory", "--validation_prompts", "a red one", "a blue two", "--eta", ".5"]
    flags += ["--subchain_range", "2", "3", "--negative_prompt", "it's", "--mixing", "0.5", *BASE]
    args = parse_args([*flags, "--hub_token", "hf_x", "--overwrite_output_dir"])
    accelerator = SimpleNamespace(num_processes=3, mixed_precision="bf16")
    words = shlex.split(command_of(args, typed_flags(args, parse_args([])), accelerator, "train_rlr_sd.py"))
    assert words[:5] == ["accelerate", "launch", "--num_processes", "3", "train_rlr_sd.py"]
    # Without the token, and without what would remove the run; of the folders of this machine the last part.
    folders = {name: os.path.basename(getattr(args, name)) for name in ("pretrained_model_name_or_path", "prompts")}
    folders["reward_path"] = ["aesthetic=tiny-aesthetic", "clip_score=clip"]
    expected = {**vars(args), "hub_token": None, "overwrite_output_dir": False, **folders}
    assert vars(parse_args(words[5:])) == expected


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--reward", "clip_score:2,aesthetic", "--decode_batch_size", "4", "--mixing", "0.5", "--max_grad_norm", "1"],
        ["--gradient_estimator", "rlr_paper", "--subchain_range", "2", "3", "--num_inference_steps", "6"],
        ["--heldout_reward", "clip_score", "--early_stop_patience", "2", "--dcot_boundaries", "0.2", "0.4"],
        ["--adapter_path", "somewhere", "--height", "48", "--preset_low_memory", "--sweep_fraction", "auto"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_check_args_only_checks(monkeypatch, flags):
    with monkeypatch.context() as patch:
        patch.setattr(rlr_training.checks, "check_args", lambda args, default_of: None)
        parsed = parse_args([*BASE, *flags])
    checked = copy.deepcopy(parsed)
    check_args(checked, vars(parse_args([])).get)
    assert vars(checked) == vars(parsed) and list(map(type, vars(checked).values())) == list(
        map(type, vars(parsed).values())
    )


# --help


@pytest.fixture(scope="module")
def help_of_script():
    """(text of --help, the modules that it imports)."""
    command = [sys.executable, "-X", "importtime", SCRIPT, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0
    return result.stdout, set(re.findall(r"^import time:.*\|\s+(\S+)$", result.stderr, re.MULTILINE))


def test_help_does_not_wait_for_heavy_libraries(help_of_script):
    _, modules = help_of_script
    assert "argparse" in modules and "rlr_training.flags" in modules
    heavy = {"torch", "diffusers", "accelerate", "transformers", "peft", "datasets", "numpy", "PIL", "huggingface_hub"}
    assert not modules & heavy


def test_help_shows_every_flag_with_its_default(help_of_script):
    _, *flags = re.split(r"^  (--\w+)", help_of_script[0], flags=re.MULTILINE)
    help_of = {flag: " ".join(text.split()) for flag, text in zip(flags[::2], flags[1::2])}
    defaults = vars(parse_args([]))
    assert help_of.keys() == {f"--{name}" for name in defaults} | {"--preset_low_memory"}
    for name, default in defaults.items():
        text = help_of[f"--{name}"]
        if default in (None, False, []):
            assert "Default: None" not in text and "Default: False" not in text and "Default: []" not in text
        else:
            shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            assert f"Default: {shown}." in text, name


def test_there_are_fewer_than_a_hundred_flags(help_of_script):
    assert 0 < len(re.findall(r"^  --\w+", help_of_script[0], re.MULTILINE)) < 100


# What is refused


@pytest.mark.parametrize(
    "flag",
    [
        *("memory_budget_gb", "half_order_gb", "zeroth_order_gb", "subchain_sampling", "zo_scale", "baseline_steps"),
        *("local_rank", "enable_xformers_memory_efficient_attention"),
    ],
)
def test_flags_that_there_are_not_are_refused(capsys, flag):
    assert f"unrecognized arguments: --{flag}" in error_of(capsys, f"--{flag}", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Numbers
        (["--train_batch_size", "0"], "--train_batch_size 0 must be at least 1"),
        (["--max_train_steps", "-3"], "--max_train_steps -3 must be at least 1"),
        (["--num_inference_steps", "0"], "--num_inference_steps 0 must be at least 1"),
        (["--num_inference_steps", "some"], "--num_inference_steps 'some' is not a whole number"),
        (["--keep_graphs", "-1"], "--keep_graphs -1 must be at least 0"),
        (["--subchain_length", "auto"], "--subchain_length 'auto' is not a whole number"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--seed", "4294967296"], "--seed 4294967296 must be in 0..2^32 - 1"),
        (["--learning_rate", "nan"], "--learning_rate nan must be a positive number"),
        (["--adam_epsilon", "0"], "--adam_epsilon 0 must be a positive number"),
        (["--ppo_clip_range", "small"], "--ppo_clip_range small must be a positive number"),
        (["--guidance_scale", "inf"], "--guidance_scale inf must be a number that is not negative"),
        (["--kl_weight", "-1"], "--kl_weight -1 must be a number that is not negative"),
        (["--adam_weight_decay", "-1"], "--adam_weight_decay -1 must be a number that is not negative"),
        (["--adam_beta1", "2"], "--adam_beta1 2 must be in [0, 1)"),
        (["--adam_beta2", "1"], "--adam_beta2 1 must be in [0, 1)"),
        (["--ema_decay", "1"], "--ema_decay 1 must be in (0, 1)"),
        (["--eta", "1.5"], "--eta 1.5 must be in [0, 1]"),
        (["--mixing", "2"], "--mixing 2.0 is neither auto nor a number in [0, 1]"),
        (["--mixing", "half"], "--mixing 'half' is neither auto nor a number in [0, 1]"),
        (["--sweep_fraction", "0"], "--sweep_fraction 0.0 is neither auto nor a number in (0, 1]"),
        (["--max_grad_norm", "none"], "--max_grad_norm 'none' is neither auto nor a positive number"),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan is neither auto nor a positive number"),
        (["--num_heldout_images", "6"], "--num_heldout_images 6 must be a multiple of 4"),
        (["--num_eval_images", "1"], "--num_eval_images 1 has no standard deviation: use 0 or at least 2"),
        (["--dcot_boundaries", ".7", ".3"], "--dcot_boundaries: the boundaries [0.7, 0.3] are not two shares"),
        # Choices
        (["--gradient_estimator", "magic"], "--gradient_estimator 'magic' must be one of rlr, rlr_paper, full_bp"),
        (
            ["--lr_scheduler", "piecewise_constant"],
            "--lr_scheduler 'piecewise_constant' must be one of linear, cosine",
        ),
        # Rewards
        (["--reward", "beauty:2"], "unknown reward 'beauty:2', known are: aesthetic, clip_score"),
        (["--reward", "astetic"], "unknown reward 'astetic' (did you mean 'aesthetic'?), known are"),
        (["--lora_rank", "8"], "unrecognized arguments: --lora_rank 8; did you mean --rank?"),
        (["--heldout_reward", "beauty"], "unknown reward 'beauty'"),
        (["--reward", "aesthetic:much"], "reward 'aesthetic:much': the weight 'much' is not a finite number"),
        (["--reward_path", "aesthetic"], "'aesthetic' is not of the form NAME=DIR"),
        (
            ["--reward_batch_size", "2", "--decode_batch_size", "1"],
            "--reward_batch_size 2 is more than --decode_batch_size 1: raise --decode_batch",
        ),
        # Flags that do not go together
        (["--kl_weight", "1", "--gradient_estimator", "draft_lv"], "--kl_weight 1.0 needs an estimator that sweeps"),
        (["--kl_weight", "1", "--gradient_estimator", "full_bp", "--eta", "0"], "which --kl_weight 1.0 needs"),
        (["--early_stop_patience", "2"], "--early_stop_patience 2 needs --heldout_reward"),
        (
            ["--gradient_estimator", "truncated_bp", "--truncation_steps", "4"],
            "--truncation_steps 4 must be from 1 to",
        ),
        (["--eta", "0"], "--eta 0 leaves no noise in the chain, which rlr needs: use --eta 1"),
        (["--eta", "0", "--gradient_estimator", "ddpo"], "--eta 0 leaves no noise in the chain, which ddpo needs"),
        (["--eta", "0", "--gradient_estimator", "rlr_paper"], "--eta 0 leaves no noise in the chain, which rlr_paper"),
        (["--scheduler", "ddpm", "--eta", "0.5"], "--eta 0.5 is for --scheduler ddim, and ddpm has"),
        (
            ["--keep_graphs", "2", "--gradient_estimator", "draft_lv"],
            "--keep_graphs 2 needs a sweep of the rollout's own",
        ),
        (
            ["--keep_graphs", "2", "--gradient_estimator", "rlr_paper"],
            "the perturbed weights of --rest zeroth_order do",
        ),
        (
            ["--sweep_fraction", ".5", "--gradient_estimator", "draft_lv"],
            "--sweep_fraction 0.5 needs an estimator that",
        ),
        (
            ["--sweep_fraction", ".5", "--gradient_estimator", "ddpo", "--num_inner_epochs", "2"],
            "--sweep_fraction 0.5 is biased with --num_inner_epochs 2: use 1",
        ),
        (["--num_inner_epochs", "2"], "--num_inner_epochs 2 needs --gradient_estimator ddpo"),
        (["--branches", "2", "--gradient_estimator", "ddpo"], "--branches 2 needs --gradient_estimator rlr, not ddpo"),
        (["--adapter_path", "x", "--rank", "2"], "--rank is for a new adapter, and --adapter_path 'x' has its own"),
        (["--baseline_vae", "x", "--baseline", "none"], "--baseline_vae 'x' needs --baseline auto or predicted_x0"),
        (["--dataset_name", "x"], "and --dataset_name 'x': give one of them"),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "give one of them"),
        (["--push_every", "2"], "--push_every 2 needs --push_to_hub"),
        (["--report_to", "wandb", "--hub_token", "hf_x"], "--report_to wandb with --hub_token would log the token"),
        (["--report_to", "all", "--hub_token", "hf_x"], "--report_to all with --hub_token would log the token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_refused_by_the_name_of_its_flag(capsys, flags, message):
    assert message in error_of(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--report_to", "wandb"], "wandb"),
        (["--report_to", "comet_ml"], "comet_ml"),
        (["--use_8bit_adam"], "bitsandbytes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_optional_package_that_is_missing_is_named(capsys, monkeypatch, flags, package):
    monkeypatch.setattr(rlr_training.checks, "find_spec", lambda name: None)
    assert f"error: {' '.join(flags)}: {package} is not installed" in error_of(capsys, *flags)
