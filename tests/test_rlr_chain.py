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
"""`scheduler_steps` and `DenoisingChain` against the steps that diffusers' schedulers take themselves."""

import copy
import inspect

import pytest
import torch
from diffusion_models import SCHEDULERS, make_scheduler
from rlr_utils import AffineStep, DenoisingChain, ddim_steps, prediction_weights, renoise, rollout, scheduler_steps

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (3, 4, 8, 8)


class ToyNetwork(torch.nn.Module):
    """A prediction that depends on latents, timestep and two conditions. It counts the images of each call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2)
        self.batch_sizes = []

    def forward(self, x, timestep, conditions):
        self.batch_sizes.append(len(x))
        shift = (conditions["text"] + timestep / 1000 * conditions["pooled"]).to(x.dtype)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.weight.to(x.dtype), x) + shift[:, :, None, None])


def conditions_of(batch_size=3):
    """Random conditions of a batch."""
    return {name: torch.randn(batch_size, 4, dtype=torch.float64) for name in ("text", "pooled")}


def scheduler_of(name, num_steps=6, **settings):
    """A scheduler of `SCHEDULERS` with the configuration of Stable Diffusion, set to some steps."""
    scheduler = make_scheduler(name, {**BETAS, "set_alpha_to_one": False, **settings})
    scheduler.set_timesteps(num_steps)
    return scheduler


def chain_of(scheduler, network, conditions, negative=None, eta=1.0, **options):
    """The chain of a network under the steps of a scheduler."""
    return DenoisingChain(
        network, scheduler_steps(scheduler, eta), scheduler.timesteps, conditions, negative, **options
    )


def sampled(scheduler, predict, x, generator, eta):
    """The latents (B, ...) before and after each step, and x_0 as predicted there, in the way of diffusers' pipelines."""
    options = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    latents, predicted = [x], []
    for timestep in scheduler.timesteps:
        e = predict(scheduler.scale_model_input(x, timestep), timestep)
        output = scheduler.step(e, timestep, x, generator=generator, **options)
        x = output.prev_sample
        latents.append(x)
        predicted.append(getattr(output, "pred_original_sample", None))
    return latents, predicted


def assert_same_chain(scheduler, eta=1.0, guidance_scale=3.0):
    """Every latent of a rollout is that of the scheduler, from the same generator, and so is every predicted x_0."""
    network, conditions, negative = ToyNetwork(), conditions_of(), conditions_of()
    chain = chain_of(scheduler, network, conditions, negative, eta, guidance_scale=guidance_scale)

    def predict(x, timestep):
        e = network(x, timestep, conditions)
        if guidance_scale <= 1:
            return e
        return (1 - guidance_scale) * network(x, timestep, negative) + guidance_scale * e

    with torch.no_grad():
        x_T = torch.randn(SHAPE) * chain.init_noise_sigma
        expected, x_0 = sampled(copy.deepcopy(scheduler), predict, x_T, torch.Generator().manual_seed(0), eta)
    steps = range(chain.num_steps, 0, -1)
    trajectory = rollout(chain, x_T, torch.Generator().manual_seed(0), predict=steps)
    torch.testing.assert_close(torch.stack(trajectory.latents[::-1]), torch.stack(expected), rtol=1e-4, atol=1e-4)
    for k, prediction in zip(steps, x_0):
        if prediction is not None:
            torch.testing.assert_close(trajectory.predictions[k], prediction, rtol=1e-4, atol=1e-4)
    return chain


# scheduler_steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_chain_takes_the_steps_of_every_scheduler(name, prediction_type):
    scheduler = scheduler_of(name, prediction_type=prediction_type)
    if (name, prediction_type) == ("euler_ancestral", "sample"):  # diffusers lacks it
        with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler cannot be used here"):
            scheduler_steps(scheduler, eta=1.0)
        return
    chain = assert_same_chain(scheduler)
    assert all(chain.sigma(k) > 0 for k in range(2, 7)) and (chain.sigma(1) > 0) == (name == "ddim")
    if chain.sigma(1) == 0:  # the last step then ends in what it predicts
        mean, x_0 = chain.predict(1, torch.randn(SHAPE, dtype=torch.float64))
        torch.testing.assert_close(x_0, mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta, guidance_scale", [(1.0, 5.0), (0.5, 1.0), (0.0, 3.0), (0.3, 0.0)])
def test_the_chain_takes_the_steps_of_ddim(eta, guidance_scale):
    chain = assert_same_chain(scheduler_of("ddim", num_steps=8), eta, guidance_scale)
    assert chain.guided == (guidance_scale > 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
        DDPMScheduler(**{**BETAS, "steps_offset": 0}, clip_sample=False, variance_type="fixed_large"),
        EulerDiscreteScheduler(**BETAS),
        LCMScheduler(),
        CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_chain_takes_the_steps_of_schedulers_that_it_does_not_know(scheduler):
    scheduler.set_timesteps(5)
    assert_same_chain(scheduler)


def test_a_schedule_that_starts_in_pure_noise_needs_v_prediction():
    """Noise prediction would divide by an alpha of zero at the first step."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = scheduler_of("ddim", 5, **settings, prediction_type="v_prediction")
    steps = scheduler_steps(scheduler, eta=1.0)
    assert scheduler.timesteps[0] == 999 and steps[0].x0_from_x == 0
    assert_same_chain(scheduler)
    with pytest.raises(ValueError, match=r"'epsilon', step 5 from the end \(timestep 999\): the step is not finite"):
        scheduler_steps(scheduler_of("ddim", 5, **settings), eta=1.0)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(clip_sample=True), "not a Gaussian step"),
        (DDPMScheduler(clip_sample=False, thresholding=True), "not a Gaussian step"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "step 3 from the end .* not a Gaussian step"),
        (PNDMScheduler(), "PNDMScheduler cannot be used here: .*generator"),
        (
            FlowMatchEulerDiscreteScheduler(),
            "FlowMatchEulerDiscreteScheduler cannot be used here: .*ddim_steps",
        ),
        (DDPMWuerstchenScheduler(), "DDPMWuerstchenScheduler cannot be used here"),
    ],
    ids=["clips", "thresholds", "remembers", "without noise", "flow matching", "a timestep per image"],
)
def test_a_scheduler_whose_steps_are_not_affine_is_refused(scheduler, message):
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        scheduler_steps(scheduler, eta=1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_asking_a_scheduler_leaves_it_and_the_random_state_unchanged(name):
    scheduler = scheduler_of(name)
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    scheduler_steps(scheduler, eta=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in vars(scheduler).items():
        same = torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else str(value) == str(before[key])
        assert same, key


def test_a_scheduler_may_be_asked_in_the_middle_of_a_run():
    scheduler = scheduler_of("dpm_sde")
    expected = scheduler_steps(scheduler, eta=1.0)
    scheduler.step(torch.ones(SHAPE), scheduler.timesteps[0], torch.ones(SHAPE))
    assert scheduler_steps(scheduler, eta=1.0) == expected


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_sigma_is_that_of_the_ddim_paper(eta):
    """Equation 16 of huggingface.co/papers/2010.02502, from the cumulative alphas."""
    scheduler = scheduler_of("ddim", 10, steps_offset=0)
    steps, alphas = scheduler_steps(scheduler, eta), scheduler.alphas_cumprod.double()
    for step, timestep in zip(steps, scheduler.timesteps.tolist()):
        a_t, a_prev = alphas[timestep], alphas[max(timestep - 100, 0)]
        sigma = eta * ((1 - a_prev) / (1 - a_t)).sqrt() * (1 - a_t / a_prev).sqrt()
        # The scheduler computes in float32, where 1 - a_t / a_prev cancels at the last step.
        assert step.sigma == pytest.approx(sigma.item(), rel=1e-3)
        assert all(isinstance(number, float) for number in step)


def test_the_predicted_image_is_that_of_noise_prediction():
    """x0_hat = (x - sqrt(1 - alpha) e) / sqrt(alpha), at every step."""
    scheduler = scheduler_of("ddim", 5)
    alphas = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    for step, alpha in zip(scheduler_steps(scheduler, eta=1.0), alphas):
        assert step.x0_from_x == pytest.approx(1 / alpha.sqrt().item(), rel=1e-5)
        assert step.x0_from_e == pytest.approx(-((1 - alpha) / alpha).sqrt().item(), rel=1e-5)


# DenoisingChain


@pytest.fixture
def steps():
    """Those of three timesteps, with an input scale that is not 1."""
    numbers = torch.rand(3, 6).tolist()
    return [AffineStep(*one) for one in numbers]


def toy_chain(steps, conditions, negative=None, **options):
    """A chain of a new `ToyNetwork`."""
    return DenoisingChain(ToyNetwork(), steps, torch.tensor([900, 500, 100]), conditions, negative, **options)


def test_the_mean_and_the_predicted_image_are_affine_in_latents_and_guided_prediction(steps):
    conditions, negative = conditions_of(), conditions_of()
    chain = toy_chain(steps, conditions, negative, guidance_scale=4.0)
    x, network = torch.randn(SHAPE, dtype=torch.float64), chain.call
    for k, step, timestep in zip((3, 2, 1), steps, (900, 500, 100)):
        e, e_negative = (network(step.input_scale * x, timestep, one) for one in (conditions, negative))
        guided = e_negative + 4 * (e - e_negative)
        torch.testing.assert_close(chain.mean(k, x), step.x_from_x * x + step.x_from_e * guided)
        mean, x_0 = chain.predict(k, x)
        assert torch.equal(mean, chain.mean(k, x)) and chain.sigma(k) == step.sigma
        torch.testing.assert_close(x_0, step.x0_from_x * x + step.x0_from_e * guided)


@pytest.mark.parametrize("scale, batch_sizes", [(1.0, [3]), (0.5, [3]), (1.1, [6])])
def test_guidance_is_one_call_of_twice_the_batch_and_off_up_to_a_scale_of_1(steps, scale, batch_sizes):
    chain = toy_chain(steps, conditions_of(), conditions_of(), guidance_scale=scale)
    chain.predict(2, torch.randn(SHAPE, dtype=torch.float64))
    assert chain.call.batch_sizes == batch_sizes


def test_guidance_may_have_a_rule_of_its_own(steps):
    conditions, negative = conditions_of(), conditions_of()
    chain = toy_chain(
        steps, conditions, negative, guidance_scale=2.0, guide=lambda negative, positive, s: s * negative * positive
    )
    x, (_, step, _) = torch.randn(SHAPE, dtype=torch.float64), steps
    e, e_negative = (chain.call(step.input_scale * x, 500, one) for one in (conditions, negative))
    torch.testing.assert_close(chain.mean(2, x), step.x_from_x * x + step.x_from_e * 2 * e_negative * e)


def test_the_gradient_flows_through_both_halves_of_the_guided_call(steps):
    chain = toy_chain(steps, conditions_of(2), conditions_of(2), guidance_scale=4.0)
    x = torch.randn(2, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: chain.predict(2, x), x)


def test_guidance_may_be_two_calls_of_the_same_gradient(steps):
    """The first half is called once more by the backward pass, after the second half's graph has been used up."""
    chain, given = toy_chain(steps, conditions_of(), conditions_of(), guidance_scale=4.0), []
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    for is_split in (False, True):
        chain.split_guidance = is_split
        chain.call.batch_sizes.clear()
        mean, x_0 = chain.conditioned_on(chain.conditions, chain.negative).predict(2, x)
        given.append([mean, x_0, *torch.autograd.grad(mean.square().sum() + x_0.sum(), (x, chain.call.weight))])
        assert chain.call.batch_sizes == ([3, 3, 3] if is_split else [6])
    for joint, split in zip(*given):
        torch.testing.assert_close(split, joint, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(chain.mean(2, x), given[1][0])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_every_step_can_have_its_own_conditions(steps, guidance_scale):
    by_step, negative = [conditions_of() for _ in range(3)], conditions_of()
    chain = toy_chain(steps, by_step, negative, guidance_scale=guidance_scale)
    x = torch.randn(SHAPE, dtype=torch.float64)
    means = [chain.mean(k, x) for k in (3, 2, 1)]
    for conditions, k, mean in zip(by_step, (3, 2, 1), means):
        assert torch.equal(chain.conditioned_on(conditions, negative).mean(k, x), mean)
    assert not torch.allclose(chain.conditioned_on(by_step[0], negative).mean(1, x), means[2])


def test_as_many_conditions_as_steps_are_needed(steps):
    with pytest.raises(ValueError, match="conditions of 2 steps for a chain of 3"):
        toy_chain(steps, [conditions_of()] * 2)


def test_other_conditions_make_another_chain(steps):
    first, second, negative = conditions_of(), conditions_of(), conditions_of()
    chain = toy_chain(steps, {}, guidance_scale=3.0)
    x = torch.randn(SHAPE, dtype=torch.float64)
    one, other = chain.conditioned_on(first, negative), chain.conditioned_on(second)
    expected = toy_chain(steps, first, negative, guidance_scale=3.0)
    expected.call = chain.call
    assert torch.equal(one.mean(2, x), expected.mean(2, x))
    assert one.guided and not other.guided and not chain.guided and chain.conditions == [{}] * 3


def test_one_negative_prompt_serves_all_images(steps):
    conditions, negative = conditions_of(), conditions_of(1)
    chain, x = toy_chain(steps, conditions, negative), torch.randn(SHAPE, dtype=torch.float64)
    repeated = chain.conditioned_on(conditions, {name: value.repeat(3, 1) for name, value in negative.items()})
    assert torch.equal(chain.mean(2, x), repeated.mean(2, x))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("negatives", [None, 1, 3])
def test_the_chain_of_one_image_is_its_row_of_the_batch(steps, guidance_scale, negatives):
    negative = None if negatives is None else conditions_of(negatives)
    chain = toy_chain(steps, [conditions_of() for _ in range(3)], negative, guidance_scale=guidance_scale)
    x = torch.randn(SHAPE, dtype=torch.float64)
    repeated = chain.repeat(1, 4)
    for k in (3, 2, 1):
        torch.testing.assert_close(
            repeated.mean(k, x[1:2].expand(4, -1, -1, -1)), chain.mean(k, x)[1:2].expand(4, -1, -1, -1)
        )
    assert len(chain.conditions[0]["text"]) == 3


def test_conditions_have_no_graph_into_a_text_encoder(steps):
    encoder = torch.nn.Linear(4, 4).double()
    conditions, negative = ({name: encoder(value) for name, value in conditions_of().items()} for _ in range(2))
    chain, x = toy_chain(steps, conditions, negative), torch.randn(SHAPE, dtype=torch.float64)
    for k in (2, 1):
        chain.mean(k, x).sum().backward()
    assert encoder.weight.grad is None and chain.call.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_has_the_precision_of_the_latents(steps, dtype):
    """Whatever the network is in."""
    conditions, negative = conditions_of(), conditions_of()
    chain, x, (_, step, _) = toy_chain(steps, conditions, negative), torch.randn(SHAPE, dtype=dtype), steps
    network = chain.call
    chain.call = lambda x, timestep, conditions: network(x, timestep, conditions).bfloat16()
    e, e_negative = (chain.call(step.input_scale * x, 500, one).to(dtype) for one in (conditions, negative))
    mean, x_0 = chain.predict(2, x)
    guided = e_negative + 5.0 * (e - e_negative)
    torch.testing.assert_close(mean, step.x_from_x * x + step.x_from_e * guided)
    torch.testing.assert_close(x_0, step.x0_from_x * x + step.x0_from_e * guided)


def test_renoising_repeats_the_last_step_from_another_noise(steps):
    chain = toy_chain(steps, conditions_of(), add_noise=lambda x_0, noise: 0.6 * x_0 + 0.8 * noise)
    x_0 = torch.randn(SHAPE, dtype=torch.float64)
    first, second = renoise(chain, x_0), renoise(chain, x_0)
    noise = (first.latents[1] - 0.6 * x_0) / 0.8
    assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean() == pytest.approx(0, abs=0.15)
    assert not torch.equal(first.latents[1], second.latents[1])
    step = chain.mean(1, first.latents[1]) + chain.sigma(1) * first.noises[1]
    torch.testing.assert_close(first.latents[0], step.detach())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_weights_of_predictions_are_the_derivatives_of_the_image(eta):
    """With all predictions held fixed but one, by autograd."""
    steps = ddim_steps([(1 - s, s) for s in (1.0, 0.9, 0.6, 0.3, 0.05, 0.0)], "flow_prediction", eta)
    predictions = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn((), dtype=torch.float64)
    for step, prediction in zip(steps, predictions):
        x = step.x_from_x * x + step.x_from_e * prediction
    (gradient,) = torch.autograd.grad(x, predictions)
    expected = gradient.abs() / gradient.abs().sum()
    torch.testing.assert_close(torch.tensor(prediction_weights(steps), dtype=torch.float64), expected)
