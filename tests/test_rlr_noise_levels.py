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
"""`ddim_steps` and `flow_sde_steps` against diffusers' schedulers, and on data whose distribution is known."""

import math
import random

import pytest
import torch
from rlr_chains import GaussianData, z_scores
from rlr_utils import AffineStep, RLRStep, ddim_steps, flow_sde_steps, scheduler_steps
from rlr_utils.noise_levels import PREDICTIONS

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler


def flow_sigmas(num_steps, shift=3.0):
    """T + 1 levels of a flow from 1 to 0, shifted as SD3's."""
    sigmas = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    return [*(shift * sigmas / (1 + (shift - 1) * sigmas)).tolist(), 0.0]


def flow_levels(num_steps):
    return [(1 - sigma, sigma) for sigma in flow_sigmas(num_steps)]


def diffusion_levels(num_steps):
    """T + 1 levels with alpha^2 + sigma^2 = 1, the first of nearly no signal."""
    angles = torch.linspace(math.pi / 2 - 1e-4, 0.0, num_steps + 1, dtype=torch.float64)
    return list(zip(angles.cos().tolist(), angles.sin().tolist()))


def assert_steps(steps, expected, tolerance):
    """All but the first are equal; at the first a scheduler in float32 may divide by an alpha that is nearly zero."""
    for step, other in zip(steps[1:], expected[1:]):
        assert step == pytest.approx(other, abs=tolerance)


def test_without_noise_a_step_of_a_flow_is_eulers():
    sigmas = flow_sigmas(10)
    for step, sigma, after in zip(ddim_steps(flow_levels(10), "flow_prediction", eta=0.0), sigmas, sigmas[1:]):
        assert step == pytest.approx(AffineStep(1.0, after - sigma, 0.0, 1.0, -sigma, 1.0), abs=1e-12)


def test_with_all_noise_a_flow_has_the_steps_of_dpm_solver():
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(10)
    levels = [(1 - sigma, sigma) for sigma in scheduler.sigmas.double().tolist()]
    assert_steps(ddim_steps(levels, "flow_prediction"), scheduler_steps(scheduler, 1.0), 1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_levels_of_stable_diffusion_have_the_steps_of_ddim(prediction_type, eta):
    """Where the scheduler steps from timestep to timestep; it computes in float32."""
    settings = {"prediction_type": prediction_type, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)
    scheduler.set_timesteps(20)
    squares = [scheduler.alphas_cumprod[t].item() for t in scheduler.timesteps] + [
        scheduler.final_alpha_cumprod.item()
    ]
    levels = [(square**0.5, (1 - square) ** 0.5) for square in squares]
    for step, expected in zip(ddim_steps(levels, prediction_type, eta), scheduler_steps(scheduler, eta)):
        # Prediction of x_0 divides by the last sigma of .03, in which the scheduler has fewer digits.
        tolerance = 1e-5 if prediction_type == "sample" else 5e-7
        assert step == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_the_levels_of_diffusers_flow_scheduler_are_stepped_through():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x, v = torch.randn(2, 4, dtype=torch.float64)
    levels = [(1 - sigma, sigma) for sigma in scheduler.sigmas.double().tolist()]
    for step, timestep in zip(ddim_steps(levels, "flow_prediction", eta=0.0), scheduler.timesteps):
        expected = scheduler.step(v, timestep, x, return_dict=False)[0]
        torch.testing.assert_close(step.x_from_x * x + step.x_from_e * v, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_what_a_step_makes_of_x_0_and_epsilon_is_the_formula(prediction_type, eta):
    """x = alpha x_0 + sigma epsilon and its true prediction become alpha' x_0 + c epsilon, with c^2 + s^2 = sigma'^2."""
    levels = flow_levels(6) if prediction_type == "flow_prediction" else diffusion_levels(6)
    x_0, epsilon = torch.randn(2, dtype=torch.float64).tolist()
    for step, (alpha, sigma), (after, noise) in zip(ddim_steps(levels, prediction_type, eta), levels, levels[1:]):
        of_x_0, of_epsilon = PREDICTIONS[prediction_type](alpha, sigma)
        x, e = alpha * x_0 + sigma * epsilon, of_x_0 * x_0 + of_epsilon * epsilon
        kept = (noise**2 - step.sigma**2) ** 0.5
        assert step.x_from_x * x + step.x_from_e * e == pytest.approx(after * x_0 + kept * epsilon, abs=1e-9)
        assert step.x0_from_x * x + step.x0_from_e * e == pytest.approx(x_0, abs=1e-9)


def gaussian(num_steps, prediction_type="flow_prediction", **settings):
    levels = flow_levels(num_steps) if prediction_type == "flow_prediction" else diffusion_levels(num_steps)
    return GaussianData(levels, ddim_steps(levels, prediction_type, **settings), PREDICTIONS[prediction_type])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_samples_of_more_steps_come_closer_to_the_data(prediction_type, eta):
    errors = []
    for num_steps in (10, 20, 40, 1280):
        chain = gaussian(num_steps, prediction_type, eta=eta)
        with torch.no_grad():
            mean, variance = chain.moments()
        errors.append(
            ((mean - chain.center).square() + (variance.sqrt() - chain.variance.sqrt()).square()).sum().sqrt()
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.4 and errors[3] < 0.02


def test_the_final_noise_is_all_that_remains_of_it():
    plain, noisy = gaussian(20), gaussian(20, final_noise=0.03)
    assert (plain.sigma(1), noisy.sigma(1)) == (0.0, 0.03)
    assert [plain.sigma(k) for k in range(2, 21)] == [noisy.sigma(k) for k in range(2, 21)]
    assert gaussian(20, eta=0.5, final_noise=0.03).sigma(1) == 0.015
    with torch.no_grad():
        torch.testing.assert_close(noisy.moments()[1], plain.moments()[1] + 0.03**2)


def test_flow_sde_keeps_too_much_noise_in_few_steps():
    """As the last standard deviation says, .2 with 10 steps; in the limit it comes to the data too."""
    variances = []
    for num_steps in (10, 1280):
        sigmas = flow_sigmas(num_steps)
        chain = GaussianData(flow_levels(num_steps), flow_sde_steps(sigmas), PREDICTIONS["flow_prediction"])
        with torch.no_grad():
            variances.append(chain.moments()[1] / chain.variance)
    assert variances[0][0] > 2 > 1.1 > variances[1].max()
    steps = flow_sde_steps([1.0, 0.8, 0.0])
    assert steps[0] == pytest.approx(
        AffineStep(1 - 0.49 / 0.2 / 2 * 0.2, -0.2, (0.49 / 0.2 * 0.2) ** 0.5, 1.0, -1.0, 1.0)
    )
    assert flow_sde_steps([0.9, 0.5], noise_level=0.0)[0] == pytest.approx(AffineStep(1.0, -0.4, 0.0, 1.0, -0.9, 1.0))


@pytest.mark.parametrize(
    "levels, prediction_type, message",
    [
        (
            [(0.0, 1.0), (0.5, 0.5)],
            "epsilon",
            "'epsilon', step 1 from the end: at alpha 0 and sigma 1 it does not say",
        ),
        ([(0.2, 0.8), (0.2, 0.8), (1.0, 0.0)], "flow_prediction", "step 2 from the end does not lower the noise"),
        ([(0.5, 0.5), (0.2, 0.8)], "flow_prediction", "step 1 from the end does not lower the noise"),
    ],
)
def test_levels_that_cannot_be_stepped_through_are_refused(levels, prediction_type, message):
    with pytest.raises(ValueError, match=message):
        ddim_steps(levels, prediction_type)
    if prediction_type == "flow_prediction":
        with pytest.raises(ValueError, match=message):
            flow_sde_steps([sigma for _, sigma in levels])


# The gradient


def estimate_with(kind, **settings):
    """`estimate(chain, x_T)` for `z_scores`: one rollout and one backward call of `RLRStep`."""
    steps = []

    def estimate(chain, x_T):
        if not steps:
            steps.append(RLRStep(chain.num_steps, kind == "smooth", parameters=chain.parameters(), **settings))

        def score(x_0, with_gradient):
            gradient = chain.reward_grad(x_0) if with_gradient else None
            return chain.parts(x_0).sum(1).detach(), gradient

        steps[0].backward([steps[0].rollout(chain, x_T, score)])

    return estimate


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "v_prediction"])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("smooth", {"estimator": "full_bp"}),
        ("smooth", {}),
        ("black box", {"mixing": 0.0, "baseline": "leave_one_out"}),
        ("black box", {}),
    ],
    ids=str,
)
def test_the_gradient_of_a_flow_is_unbiased(prediction_type, kind, settings):
    random.seed(0)
    # The likelihood ratio needs noise at every step.
    chain = gaussian(8, prediction_type, final_noise=0.0 if kind == "smooth" and settings else 0.03)
    assert z_scores(estimate_with(kind, **settings), chain=chain) < 5


def test_a_truncated_gradient_of_a_flow_is_not():
    random.seed(0)
    estimate = estimate_with("smooth", estimator="truncated_bp", truncation_steps=3)
    assert z_scores(estimate, batches=64, batch_size=64, chain=gaussian(8)) > 20
