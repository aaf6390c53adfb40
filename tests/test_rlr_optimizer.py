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
"""What happens to a gradient until the parameters have changed: averaging, clipping, loss scale, AdamW, its learning rate."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from rlr_testing import LORA, same_adapter, tiny_pipeline, train
from rlr_training.errors import RunError
from rlr_training.optimizer import (
    GradientClipping,
    average_gradients,
    averaged,
    loss_scale,
    make_optimization,
    optimizer_step,
)
from safetensors.torch import load_file
from train_rlr_sd import parse_args


# Clipping


def test_gradients_are_clipped_to_the_tenth_percentile_of_the_norms_so_far():
    """An outlier is clipped and still counts in the percentile, and a clipped gradient has norm 1."""
    accelerator, clipping = Accelerator(cpu=True), GradientClipping("auto")
    generator, norms = torch.Generator().manual_seed(0), []
    for scale in (1.0, 30.0, 2.0, 0.5, 4.0, 0.1):
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
        for p in parameters:
            p.grad = scale * torch.randn(p.shape, generator=generator)
        norms.append(torch.cat([p.grad for p in parameters]).norm().item())
        assert average_gradients(accelerator, parameters, clipping) == pytest.approx(norms[-1])
        clipped = torch.cat([p.grad for p in parameters]).norm().item()
        assert clipped == pytest.approx(min(1.0, norms[-1] / np.quantile(norms, 0.1)), rel=1e-4)
    assert clipped < 0.5  # the last norm is below the percentile, and the gradient is shorter than 1


def test_negligible_norms_do_not_count_in_the_percentile():
    clipping = GradientClipping("auto")
    for norm in (3.0, 0.0, 0.0, 1e-9):  # batches whose rewards are all equal have a gradient of 0 up to rounding
        clipping.factor(norm)
    assert clipping.factor(7.0) == pytest.approx(1 / 7.0)
    assert clipping.factor(2.9) == pytest.approx(1 / np.quantile([3.0, 7.0, 2.9], 0.1))


@pytest.mark.parametrize("norm", [math.inf, math.nan, 0.0])
def test_a_gradient_of_no_or_no_finite_norm_is_not_scaled(norm):
    assert GradientClipping("auto").factor(norm) == 1.0


def test_clipping_continues_from_a_checkpoint():
    clipping, resumed = GradientClipping("auto"), GradientClipping("auto")
    for norm in (2.0, 5.0, 3.0):
        clipping.factor(norm)
    resumed.load_state_dict(json.loads(json.dumps(clipping.state_dict())))
    assert resumed.factor(0.5) == clipping.factor(0.5) == pytest.approx(1 / np.quantile([2.0, 5.0, 3.0, 0.5], 0.1))


def test_gradients_are_clipped_to_a_given_norm():
    clipping = GradientClipping(2.0)
    assert clipping.factor(0.5) == 1.0 and clipping.factor(8.0) == 0.25


def test_the_unit_of_a_reward_does_not_matter_by_default(tmp_path):
    """Neither to the mixing nor to the clipping nor to AdamW and its epsilon."""
    flags = ["--max_train_steps", "3", "--learning_rate", "1e-3"]
    train(tmp_path / "one", *flags, "--reward", "aesthetic:1")
    train(tmp_path / "thousand", *flags, "--reward", "aesthetic:1024")
    train(tmp_path / "fixed", *flags, "--reward", "aesthetic:1024", "--max_grad_norm", "1")
    one, thousand, fixed = (load_file(tmp_path / name / LORA) for name in ("one", "thousand", "fixed"))
    close = lambda a, b: all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-6) for key in a)  # noqa: E731
    assert close(one, thousand) and not close(one, fixed)


# Ranks and half precision


def test_gradients_are_averaged_over_the_ranks():
    """The second rank has a gradient of zero."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([6.0, 8.0])
    accelerator = SimpleNamespace(
        scaler=None,
        reduce=lambda values, how: {"mean": values / 2, "sum": values}[how],
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )
    assert average_gradients(accelerator, [weight], GradientClipping(100.0)) == pytest.approx(5.0)
    assert weight.grad.tolist() == [3.0, 4.0]


def test_a_gradient_that_is_not_finite_ends_the_run():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(RunError, match="the gradient is not finite"):
        average_gradients(Accelerator(cpu=True), [weight], GradientClipping("auto"))


def test_an_overflow_in_half_precision_is_reported_and_ends_the_run_if_the_scale_is_tiny(caplog):
    """With a real GradScaler and the norm of its unscaled gradients, as accelerate takes them."""
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
        return average_gradients(accelerator, [weight], GradientClipping("auto"))

    assert not np.isfinite(step(2.0**10))
    assert "float16 overflows at a loss scale of 1024: this step is skipped" in caplog.text
    with pytest.raises(RunError, match="overflows even at a loss scale of 0.000488281: use --mixed_precision bf16"):
        step(2.0**-11)


def test_the_loss_scale_is_the_scale_by_which_gradients_are_divided():
    """Against a real GradScaler, which has no scale before it is used."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert loss_scale(SimpleNamespace(scaler=scaler, device="cpu")) == 8.0
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 16.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [2.0, 2.0]
    scaler.step(optimizer)
    assert loss_scale(SimpleNamespace(scaler=None, device="cpu")) == 1.0


# AdamW and its learning rate


def adamw(weight, gradients, learning_rate, beta1=0.9, beta2=0.999, weight_decay=1e-2, epsilon=1e-8):
    """Some steps of AdamW by its definition (huggingface.co/papers/1711.05101), in float64."""
    first = second = 0.0
    for step, gradient in enumerate(gradients, 1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        weight = weight - learning_rate * weight_decay * weight
        corrected = (second / (1 - beta2**step)) ** 0.5 + epsilon
        weight = weight - learning_rate * first / (1 - beta1**step) / corrected
    return weight


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("learning_rate", 0.2), ("adam_beta1", 0.5), ("adam_beta2", 0.7), ("adam_weight_decay", 0.3)),
        ("adam_epsilon", 0.5),
    ],
)
def test_every_flag_of_adam_reaches_the_optimizer(flag, value):
    args = parse_args(
        ["--learning_rate", "0.1", "--max_train_steps", "9", "--max_grad_norm", "100", f"--{flag}", str(value)]
    )
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    start, gradients = weight.detach().clone(), torch.tensor([[3.0, -0.1], [1.0, 2.0], [-2.0, 0.5]]).double()
    optimization = make_optimization(args, accelerator, [weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer_step(accelerator, optimization)
    expected = adamw(start, gradients, **{"learning_rate": 0.1, flag.removeprefix("adam_"): value})
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)
    without = adamw(start, gradients, 0.1)
    assert (expected - without).abs().max() > 1e-3  # the flag makes a difference here


def test_8bit_adam_is_that_of_bitsandbytes_with_the_same_flags():
    flags = ["--use_8bit_adam", "--adam_beta1", "0.5", "--adam_beta2", "0.7", "--adam_weight_decay", "0.3"]
    args = parse_args([*flags, "--adam_epsilon", "0.1", "--learning_rate", "0.2", "--max_train_steps", "2"])
    optimizer = make_optimization(args, Accelerator(cpu=True), [torch.nn.Parameter(torch.ones(2))]).optimizer.optimizer
    assert type(optimizer).__name__ == "AdamW8bit"
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.5, 0.7) and (group["weight_decay"], group["eps"], group["lr"]) == (0.3, 0.1, 0.2)


def test_the_learning_rate_follows_its_schedule():
    """That of the next step is logged, as in the examples of diffusers."""
    rates = {}
    for name, also in (("plain", []), ("scaled", ["--scale_lr", "--gradient_accumulation_steps", "2"])):
        flags = ["--learning_rate", "1e-3", "--lr_scheduler", "linear", "--lr_warmup_steps", "2", *also]
        args = parse_args([*flags, "--max_train_steps", "4", "--train_batch_size", "3"])
        optimization = make_optimization(args, Accelerator(cpu=True), [torch.nn.Parameter(torch.ones(2))])
        rates[name] = []
        for _ in range(4):
            optimization.optimizer.step()
            optimization.lr_scheduler.step()
            rates[name].append(optimization.lr_scheduler.get_last_lr()[0])
    assert rates["plain"] == pytest.approx([0.5e-3, 1e-3, 0.5e-3, 0])
    assert rates["scaled"] == pytest.approx([6 * rate for rate in rates["plain"]])  # six images per step


# The moving average


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
        if "up" in key:  # these start from zero; no checkpoint has the values that the others start from
            torch.testing.assert_close(average[key], expected, rtol=1e-4, atol=1e-6)
    assert not same_adapter(tmp_path, tmp_path / "ema")
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path / "ema")


def test_within_averaged_the_parameters_are_those_of_the_average():
    args = parse_args(["--ema_decay", "0.5", "--learning_rate", "1", "--max_train_steps", "9"])
    accelerator, weight = Accelerator(cpu=True), torch.nn.Parameter(torch.zeros(2))
    optimization = make_optimization(args, accelerator, [weight])
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer_step(accelerator, optimization)
    trained = weight.tolist()
    with averaged(optimization):
        assert weight.tolist() == optimization.ema.shadow_params[0].tolist() != trained
    assert weight.tolist() == trained
    with averaged(optimization._replace(ema=None)):
        assert weight.tolist() == trained
