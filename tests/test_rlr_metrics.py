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
"""The plan that is printed before a run, the lines of metrics.jsonl, and how long a run is said to take."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from rlr_testing import BASE, metrics_of, train
from rlr_training.checks import rlr_settings
from rlr_training.memory import GIB, Footprint
from rlr_training.metrics import Progress, gather_scores, log_metrics, print_plan, trim_metrics
from rlr_training.metrics import metrics_of as line_of
from rlr_training.run import load_run_rewards, set_num_steps
from rlr_training.trial import Costs
from rlr_utils import RLRStep, ddim_steps
from train_rlr_sd import parse_args


COSTS = Costs(forward=2 * 10**12, swept=5 * 10**12, decode=4 * 10**12, predict=3 * 10**12, swept_bytes=GIB)
EXPECTED = Footprint(weights=3 * GIB, latents=2**20, sweep=2 * GIB, scoring=GIB)


def plan_of(capsys, *flags, differentiable=True, num_prompts=10, num_ranks=1, guided=True):
    """The rows of the plan {name: value}."""
    args = parse_args(["--train_batch_size", "2", "--max_train_steps", "5", *flags])
    parameters = [torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(234))]
    rlr = RLRStep(args.num_inference_steps, differentiable, parameters=parameters, **rlr_settings(args))
    accelerator, sampler = (
        SimpleNamespace(num_processes=num_ranks, print=print),
        SimpleNamespace(prompts=[""] * num_prompts),
    )
    levels = [(1 - sigma, sigma) for sigma in (1.0, 0.8, 0.5, 0.1, 0.0)]
    chain = SimpleNamespace(steps=ddim_steps(levels, "flow_prediction", eta=0.0), guided=guided)
    print_plan(accelerator, args, rlr, rlr.draw_schedule(), chain, sampler, parameters, COSTS, EXPECTED)
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_the_plan_is_the_arithmetic_of_the_run(capsys):
    flags = ["--gradient_accumulation_steps", "4", "--images_per_prompt", "2", "--pretrained_model_name_or_path", "x"]
    rows = plan_of(capsys, *flags, num_ranks=3)
    assert rows["images per step"] == "24 = 2 batch x 4 accumulation x 3 ranks"
    assert rows["steps"] == "5 = 6.0 passes over the prompts"
    assert (rows["trainable parameters"], rows["prompts"], rows["model"]) == ("1,234", "10", "x")
    assert (rows["reward"], rows["gradient estimator"]) == ("aesthetic", "rlr")
    expected = "about 5.0 GiB = 3.0 GiB weights + 1.0 MiB latents + the larger of 2.0 GiB for a swept step and 1.0 GiB for scoring"
    assert rows["memory per device"] == expected
    # Without noise a prediction counts as much as its step lowers sigma.
    assert rows["weight of the steps"] == "10 % the last, 50 % the last 2, 80 % the last 3"


@pytest.mark.parametrize(
    ("flags", "differentiable", "scored"),
    [
        ([], True, "2"),
        (["--gradient_estimator", "draft_lv", "--lv_samples", "3"], True, "8 = 2 + 3 other last steps of each"),
        ([], False, "8 = 2 + 3 predictions of each"),
        (["--branches", "2"], False, "10 = 2 + 4 branches of each"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_plan_says_how_many_images_are_scored(capsys, flags, differentiable, scored):
    rows = plan_of(capsys, "--num_inference_steps", "3", *flags, differentiable=differentiable)
    assert rows["images scored per step"] == scored


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        ([], "48 forward + 36 with backward (on average), at first"),
        (["--keep_graphs", "4"], "20 forward + 36 with backward (on average), at first"),
        (["--sweep_fraction", "0.25"], "48 forward + 30 with backward (on average)"),
        (["--sweep_fraction", "1"], "48 forward + 48 with backward"),
        (["--sweep_fraction", "1", "--guidance_scale", "1"], "24 forward + 24 with backward"),
        (["--mixing", "0.5"], "48 forward + 48 with backward"),
        (["--gradient_estimator", "full_bp"], "48 forward + 48 with backward"),
        (["--gradient_estimator", "truncated_bp", "--truncation_steps", "2"], "48 forward + 16 with backward"),
        (["--gradient_estimator", "alignprop"], "48 forward + 28 with backward (on average)"),
        (
            ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2"],
            "48 forward + 48 with backward, the latter x 2 inner epochs",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_plan_says_how_often_the_network_is_called(capsys, flags, calls):
    """Of 6 guided steps of 4 images, the last 3 are swept and half of the others, if the reward has a gradient."""
    guided = "--guidance_scale" not in flags
    rows = plan_of(capsys, "--num_inference_steps", "6", "--train_batch_size", "4", *flags, guided=guided)
    assert rows["network calls per step"] == calls


@pytest.mark.parametrize(
    ("flags", "differentiable", "work"),
    [
        # Of 2 images, 4 forwards of 2 TFLOP, 3 + 1 / 2 swept steps of 5 and a decoding of 4 each.
        (
            [],
            True,
            "59 TFLOP, and what the rewards take; a step with backward takes 2.50 times as much as a forward pass",
        ),
        # A black box sweeps all four, and predicts four images of 3 TFLOP.
        (
            [],
            False,
            "88 TFLOP, .* 2.50 times as much as a forward pass; 27 % of it decode predictions, which --baseline_vae does for less",
        ),
        (
            ["--baseline_vae", "taesd"],
            False,
            "88 TFLOP, .* 2.50 times as much as a forward pass; 27 % of it decode predictions",
        ),
        (
            ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2"],
            False,
            "104 TFLOP, .* 2.50 times as much as a forward pass",
        ),
        (
            ["--gradient_estimator", "full_bp", "--keep_graphs", "4"],
            True,
            "48 TFLOP, .* 2.50 times as much as a forward pass",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_plan_prices_the_calls_by_count(capsys, flags, differentiable, work):
    rows = plan_of(capsys, "--num_inference_steps", "4", *flags, differentiable=differentiable)
    assert re.fullmatch(work, rows["work per step"])


def test_the_plan_counts_all_steps_of_a_black_box(capsys):
    rows = plan_of(capsys, "--num_inference_steps", "6", "--train_batch_size", "4", differentiable=False)
    assert rows["network calls per step"] == "48 forward + 48 with backward"


@pytest.mark.parametrize(("flags", "steps"), [([], 7), (["--max_train_steps", "3"], 3)])
def test_the_steps_of_a_run_are_passes_over_the_prompts_unless_given(flags, steps):
    """Two passes over 10 prompts with 2 images each are 40 images, at 6 images a step."""
    flags = ["--num_train_epochs", "2", "--images_per_prompt", "2", *flags]
    args = parse_args([*flags, "--train_batch_size", "2", "--gradient_accumulation_steps", "3"])
    set_num_steps(args, SimpleNamespace(num_processes=1), 10)
    assert args.max_train_steps == steps


STATISTICS = {"gamma_mean": 0.9, "predicted_steps": 2, "swept_steps": 4.5}


def test_a_line_has_the_figures_of_all_images_of_a_step():
    scorers = [
        SimpleNamespace(scores={"total": torch.tensor([1.0, 2.0]), "aesthetic": torch.tensor([5.0, 6.0])}),
        SimpleNamespace(scores={"total": torch.tensor([6.0]), "aesthetic": torch.tensor([7.0])}),
    ]
    scores = gather_scores(Accelerator(cpu=True), scorers)
    line = line_of(7, scores, [STATISTICS], 1.5, 1e-3, 0.5)
    assert line == {
        **STATISTICS,
        "step": 7,
        "reward_mean": 3.0,
        "reward_std": pytest.approx(7**0.5),
        "num_images": 3,
        "grad_norm": 1.5,
        "seconds": 0.5,
        "images_per_second": 6.0,
        "learning_rate": 1e-3,
        "aesthetic_mean": 6.0,
        "aesthetic_std": 1.0,
    }
    assert json.loads(json.dumps(line)) == line


def test_a_line_averages_the_inner_epochs_and_allows_for_one_image_and_for_overflows():
    epochs = [{**STATISTICS, "kl": value, "clip_fraction": value / 2} for value in (0.2, 0.4)]
    line = line_of(1, {"total": torch.tensor([2.0])}, epochs, math.inf, 1e-3, 1.0)
    assert (line["kl"], line["clip_fraction"]) == (pytest.approx(0.3), pytest.approx(0.15))
    assert line["reward_std"] == 0.0 and line["grad_norm"] is None


def test_lines_are_appended_to_the_file_and_trimmed_on_resume(tmp_path):
    accelerator = Accelerator(cpu=True)
    trim_metrics(tmp_path, 0)
    assert metrics_of(tmp_path) == []
    for step in (1, 2, 3):
        log_metrics(accelerator, tmp_path, {"step": step, "grad_norm": None})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    trim_metrics(tmp_path, 2)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2]
    trim_metrics(tmp_path, 0)  # a run that starts afresh
    assert metrics_of(tmp_path) == []


def test_the_third_step_says_how_long_the_run_will_take(tmp_path, caplog):
    with caplog.at_level("INFO"):
        metrics = train(tmp_path, "--max_train_steps", "4", "--lr_scheduler", "linear", "--learning_rate", "1e-3")
    assert re.search(r"about 0:00:\d\d for 4 steps in all, at \d+\.\d seconds a step", caplog.text)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    # That of the next step is logged, as in the examples of diffusers.
    assert [line["learning_rate"] for line in metrics] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0])
    for line in metrics:
        assert line["num_images"] == 2 and line["grad_norm"] > 0 and 0 < line["gamma_mean"] <= 1
        assert line["seconds"] > 0 and line["images_per_second"] == pytest.approx(2 / line["seconds"])


def same_for_all(images, prompts):
    return torch.full((len(images),), 0.5)


def test_a_reward_without_a_signal_and_a_single_image_are_warned_of(tmp_path, caplog):
    flags = ["--reward", "test_rlr_metrics:same_for_all", "--train_batch_size", "1", "--max_train_steps", "4"]
    assert all(line["reward_mean"] == 0.5 for line in train(tmp_path, *flags))
    assert caplog.text.count("the last steps had no signal: every image scored 0.5") == 1
    assert caplog.text.count("one image a step: its reward has no other to be compared with") == 1


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (["--train_batch_size", "1"], False),  # the aesthetic reward has a gradient
        (["--train_batch_size", "1", "--gradient_estimator", "ddpo"], True),
        (["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--gradient_estimator", "ddpo"], False),
    ],
)
def test_a_single_image_is_warned_of_where_it_is_compared_with_others(caplog, flags, warns):
    args = parse_args([*BASE, "--train_batch_size", "1", *flags])
    load_run_rewards(args, ["a red one"], Accelerator(cpu=True))
    assert ("one image a step" in caplog.text) is warns


@pytest.mark.parametrize(
    ("num_images", "steps", "warns"),
    [
        (2, [(1.0, 0.0, 2.0)] * 3, True),  # (mean, deviation, norm of the gradient): the same score for all
        (2, [(1.0, 0.5, 0.0), (2.0, 0.5, 0.0), (3.0, 0.5, 0.0)], True),  # no gradient
        (2, [(1.0, 0.0, 2.0), (1.0, 0.0, 2.0), (1.0, 0.5, 2.0)] * 2, False),
        (2, [(1.0, 0.5, None)] * 4, False),  # float16 has overflowed
        (1, [(1.0, 0.0, 2.0), (2.0, 0.0, 2.0), (3.0, 0.0, 2.0), (4.0, 0.0, 2.0)], False),
        (1, [(1.0, 0.0, 2.0)] * 4, True),
    ],
)
def test_what_counts_as_a_step_without_a_signal(caplog, num_images, steps, warns):
    Accelerator(cpu=True)  # for the logger
    progress = Progress(SimpleNamespace(is_local_main_process=False), 0, 9)
    for mean, deviation, norm in steps:
        line = {"reward_mean": mean, "reward_std": deviation, "grad_norm": norm, "num_images": num_images}
        progress.update({**line, "seconds": 1.0})
    assert ("had no signal" in caplog.text) is warns
