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


def factors(norms, clipping=None):
    clipping = clipping or GradientClipping("auto")
    return [clipping.factor(norm) for norm in norms]


def test_the_factor_of_a_gradient_is_known_before_it_is_drawn():
    """It is one over the median of the last 20 norms before it, whatever its own norm, up to the bound."""
    norms = torch.empty(260).uniform_(0.01, 1, generator=torch.Generator().manual_seed(0)).pow(-0.5).tolist()
    found = factors(norms)
    assert found[0] == 1 / norms[0]
    beyond = 0
    for t in range(1, 260):
        before, last = sorted(norms[max(t - 200, 0) : t]), sorted(norms[max(t - 20, 0) : t])
        scale = last[(len(last) - 1) // 2]
        bound = max(before[-2 if 1 < t <= 101 else -3 if t > 101 else -1], 2 * scale)  # of 200 two may lie above it
        assert found[t] == pytest.approx(min(1, bound / norms[t]) / scale)
        beyond += norms[t] > bound
    assert 0 < beyond < 15


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_large_gradient_does_not_lose_to_frequent_small_ones(seed):
    """Gradients of -1 in 90 % and +12 in 10 %, whose mean is +.3. Divided each by its own norm they have the mean -.8."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.where(torch.rand(2000, generator=generator) < 0.1, 12.0, -1.0)
    found = torch.tensor(factors(gradients.abs().tolist()))
    mean, unclipped = (found * gradients)[100:].mean(), gradients[100:].mean()
    usual = found[100:].median()  # the scale, by which the learning rate is to be chosen
    assert unclipped > 0.2 and mean > 0
    assert mean / usual == pytest.approx(unclipped.item(), rel=0.2)


def climb(factor, steps, seed):
    """E[R] on the second half of a run on R = x - 40 [x > 2.5], x = theta + z, with AdamW and batches of 4.

    The slope of x is known, and the threshold's gradient is its likelihood ratio with the mean of the others as baseline.
    """
    generator, theta = torch.Generator().manual_seed(seed), torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, path = torch.optim.AdamW([theta], lr=0.004, weight_decay=0.0), []
    for noise in torch.randn(steps, 4, generator=generator, dtype=torch.float64):
        penalty = -40.0 * (theta.detach() + noise > 2.5)
        advantages = penalty - (penalty.sum() - penalty) / 3
        gradient = 1 + (advantages * noise).mean().item()
        theta.grad = torch.tensor([-gradient * factor(abs(gradient))], dtype=torch.float64)
        optimizer.step()
        path.append(theta.item())
    theta = torch.tensor(path[steps // 2 :])
    return (theta - 40 * torch.special.ndtr(theta - 2.5)).mean().item()


def test_the_expected_reward_does_not_fall_where_failures_are_rare():
    """It starts at -.248. Its optimum is -.226, where a batch of 4 holds a failure in 3.7 % of the steps."""
    ends = [climb(GradientClipping("auto").factor, 1500, seed) for seed in range(4)]
    without = [climb(lambda norm: 1.0, 1500, seed) for seed in range(4)]
    assert sum(ends) / 4 == pytest.approx(sum(without) / 4, abs=0.01) and sum(ends) / 4 > -0.248
    assert climb(lambda norm: 1 / norm, 900, 0) < -1  # divided by its own norm


@pytest.mark.parametrize("at", [0, 1, 2, 10, 60, 250])
def test_an_outlier_moves_the_parameters_no_more_than_ten_usual_steps(at):
    """One gradient of a thousand times the usual norm, in a direction of its own, against the run without it."""
    noise, ends = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), []
    for with_outlier in (False, True):
        clipping, weight = GradientClipping("auto"), torch.nn.Parameter(torch.zeros(8))
        optimizer, path = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0), []
        for step, gradient in enumerate(1 + noise):
            if with_outlier and step == at:
                gradient = -1000 * gradient.flip(0)
            weight.grad = clipping.factor(gradient.norm().item()) * gradient
            optimizer.step()
            path.append(weight.detach().clone())
        ends.append(torch.stack(path))
    plain, moved = ends
    usual = plain.diff(dim=0).norm(dim=1).mean()
    after = slice(at, at + 40)
    assert (moved - plain)[after].norm(dim=1).max() <= 10 * usual
    assert moved.diff(dim=0).norm(dim=1)[-20:].mean() > 0.5 * usual  # and it goes on at its pace


def test_negligible_norms_do_not_count():
    """Batches whose rewards are all equal have a gradient of 0 up to rounding."""
    assert factors([3.0, 4.0, *[1e-9] * 5, 0.0, 3.5])[-1] == pytest.approx(1 / 3.0)
    # Nothing but rounding so far: the second success shows that the first was no outlier.
    found = factors([1e-9] * 8 + [3.0, 3.0, 3.0])
    assert found[-1] == pytest.approx(1 / 3.0)


def test_a_gradient_of_no_norm_is_not_scaled():
    assert factors([0.0, 0.0, 2.0, 2.0]) == [1.0, 1.0, 0.5, 0.5]


def test_clipping_continues_from_a_checkpoint():
    clipping, resumed = GradientClipping("auto"), GradientClipping("auto")
    factors(torch.linspace(1, 9, 300).tolist(), clipping)
    state = json.loads(json.dumps(clipping.state_dict()))
    resumed.load_state_dict(state)
    assert len(state["norms"]) == 200
    assert resumed.factor(0.5) == clipping.factor(0.5) and resumed.factor(50.0) == clipping.factor(50.0)


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
    assert average_gradients(accelerator, [weight]) == pytest.approx(5.0)
    assert weight.grad.tolist() == [3.0, 4.0]


def step_on(accelerator, optimization, gradient):
    """An optimizer step on a gradient; returns the weights after it."""
    (weight,) = optimization.trainable
    weight.grad = torch.tensor(gradient)
    optimizer_step(accelerator, optimization)
    return weight.tolist()


def test_a_step_without_a_finite_gradient_is_skipped(caplog):
    """Weights, moments, moving average and clipping are those of the steps that were taken."""
    args = parse_args(["--learning_rate", "0.1", "--max_train_steps", "99", "--ema_decay", "0.5"])
    accelerator, ends = Accelerator(cpu=True), []
    for gradients in ([[3.0, 1.0], [math.nan, 1.0], [1.0, 2.0]], [[3.0, 1.0], [1.0, 2.0]]):
        optimization = make_optimization(args, accelerator, [torch.nn.Parameter(torch.ones(2))])
        ends += [step_on(accelerator, optimization, gradient) for gradient in gradients[-1:]]
        ends.pop()
        for gradient in gradients:
            last = step_on(accelerator, optimization, gradient)
        ends.append((last, optimization.ema.shadow_params[0].tolist(), optimization.clipping.norms))
    assert ends[0] == ends[1]
    assert caplog.text.count("the gradient is not finite (nan): this step is skipped") == 1


def test_ten_steps_in_a_row_without_a_finite_gradient_end_the_run():
    args, accelerator = parse_args(["--max_train_steps", "99"]), Accelerator(cpu=True)
    optimization = make_optimization(args, accelerator, [torch.nn.Parameter(torch.ones(2))])
    for gradient in (*[math.inf] * 9, 1.0, *[math.nan] * 9):
        step_on(accelerator, optimization, [gradient, 1.0])
    with pytest.raises(RunError, match=r"the gradient is not finite \(nan\), as in the 9 steps before: use a smaller"):
        step_on(accelerator, optimization, [math.nan, 1.0])


def test_overflows_in_half_precision_halve_the_loss_scale_and_end_the_run_after_ten(caplog):
    """With a real GradScaler around AdamW, as accelerate has it on a GPU."""
    PartialState()  # for the logger
    args = parse_args(["--learning_rate", "0.1", "--max_train_steps", "99"])
    weight = torch.nn.Parameter(torch.ones(2))
    optimization = make_optimization(args, Accelerator(cpu=True), [weight])
    scaler, adamw = torch.amp.GradScaler("cpu", init_scale=2.0**10), optimization.optimizer.optimizer
    scaler.scale(torch.ones(()))

    def clip(parameters, max_norm):
        scaler.unscale_(adamw)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def step():
        scaler.step(adamw)
        scaler.update()

    optimization.optimizer = SimpleNamespace(step=step, zero_grad=adamw.zero_grad)
    accelerator = SimpleNamespace(scaler=scaler, device="cpu", reduce=lambda x, _: x, clip_grad_norm_=clip)
    for _ in range(9):
        assert step_on(accelerator, optimization, [math.inf, 1.0]) == [1.0, 1.0]
    assert scaler.get_scale() == 2.0 and "float16 overflows at a loss scale of 1024: this step is" in caplog.text
    with pytest.raises(RunError, match="float16 overflows at a loss scale of 2, .* use --mixed_precision bf16"):
        step_on(accelerator, optimization, [math.inf, 1.0])


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
    optimization.ema = None
    with averaged(optimization):
        assert weight.tolist() == trained
