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
"""Stable Diffusion 1.x and 2.x in the training script and under every scheduler, against its pipeline."""

import pytest
import torch
from diffusion_models import SCHEDULERS, make_scheduler
from diffusion_models.stable_diffusion import StableDiffusion
from rlr_models import PROMPTS, assert_first_images_are_the_pipelines, chain_of
from rlr_testing import TINY_SD, tiny_pipeline
from rlr_utils import rollout


@pytest.fixture(scope="module")
def pipeline():
    """No test may change it but by the scheduler."""
    return tiny_pipeline()


def images_of(pipeline, num_steps, **options):
    """The latents that the pipeline ends in, from one generator for the batch."""
    options = {"eta": 1.0, "guidance_scale": 3.0, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPTS, generator=generator, num_inference_steps=num_steps, **options).images


def rolled_out(pipeline, num_steps, predict=(), **options):
    """(chain, trajectory) from the same generator."""
    chain = chain_of(StableDiffusion(pipeline), num_steps, **{"guidance_scale": 3.0, **options})
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, 4, 8, 8, generator=generator) * chain.init_noise_sigma
    return chain, rollout(chain, x_T, generator, predict=predict)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddim", {"guidance_scale": 5.0}),
        ("ddim", {"guidance_scale": 4.0, "eta": 0.3, "negative": "a blue one", "size": (48, 32)}),
        ("ddim", {"guidance_scale": 1.0}),
        ("ddpm", {"guidance_scale": 3.0}),
        ("euler_ancestral", {"guidance_scale": 3.0, "negative": "a blue one"}),
    ],
)
def test_the_first_images_of_a_run_are_the_pipelines_own(tmp_path, scheduler, options):
    prompts = assert_first_images_are_the_pipelines(TINY_SD, tmp_path / "out", scheduler, **options)
    assert len(set(prompts)) == 2


@pytest.mark.parametrize(("eta", "guidance_scale"), [(1.0, 5.0), (0.5, 1.0), (0.0, 3.0)])
def test_a_rollout_ends_in_the_pipelines_own_images(pipeline, eta, guidance_scale):
    options = {"eta": eta, "guidance_scale": guidance_scale}
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler.config)
    _, trajectory = rolled_out(pipeline, 6, **options)
    torch.testing.assert_close(trajectory.latents[0], images_of(pipeline, 6, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rollout_ends_in_the_pipelines_own_images_under_every_scheduler(pipeline, name, prediction_type):
    config = {**pipeline.scheduler.config, "prediction_type": prediction_type}
    pipeline.scheduler = make_scheduler(name, config)
    if (name, prediction_type) == ("euler_ancestral", "sample"):  # diffusers lacks it
        with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler cannot be used here"):
            rolled_out(pipeline, 6)
        return
    chain, trajectory = rolled_out(pipeline, 6, predict=[1])
    torch.testing.assert_close(trajectory.latents[0], images_of(pipeline, 6), rtol=2e-4, atol=2e-4)
    if chain.sigma(1) == 0:  # the last step then ends in what it predicts
        torch.testing.assert_close(trajectory.predictions[1], trajectory.latents[0], rtol=1e-3, atol=1e-3)
    assert all(chain.sigma(k) > 0 for k in range(2, 7))


def test_the_predicted_image_is_that_of_the_unet():
    """From the guided noise prediction and the cumulative alphas, without the chain."""
    pipeline = tiny_pipeline()
    chain, trajectory = rolled_out(pipeline, 5, predict=[1, 3, 5], guidance_scale=5.0)
    _, plain = rolled_out(pipeline, 5, guidance_scale=5.0)
    assert all(torch.equal(a, b) for a, b in zip(trajectory.latents, plain.latents)) and not plain.predictions
    assert trajectory.predictions.keys() == {1, 3, 5}
    positive, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    for k in (1, 3, 5):
        timestep, x = chain.timesteps[5 - k], trajectory.latents[k]
        with torch.no_grad():
            first, second = pipeline.unet(torch.cat([x, x]), timestep, torch.cat([negative, positive])).sample.chunk(2)
        alpha = pipeline.scheduler.alphas_cumprod[timestep]
        expected = (x - (1 - alpha).sqrt() * (first + 5 * (second - first))) / alpha.sqrt()
        torch.testing.assert_close(trajectory.predictions[k], expected, rtol=1e-4, atol=1e-4)


def test_a_schedule_that_starts_in_pure_noise_needs_v_prediction():
    """As in the models of huggingface.co/papers/2305.08891. Noise prediction would divide by zero at the first step."""
    pipeline = tiny_pipeline()
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config = {**pipeline.scheduler.config, **settings}
    pipeline.scheduler = make_scheduler("ddim", {**config, "prediction_type": "v_prediction"})
    chain, trajectory = rolled_out(pipeline, 5, eta=0.9)
    assert chain.timesteps[0] == 999 and chain.steps[0].x0_from_x == 0
    torch.testing.assert_close(trajectory.latents[0], images_of(pipeline, 5, eta=0.9), rtol=1e-4, atol=1e-4)
    pipeline.scheduler = make_scheduler("ddim", config)
    with pytest.raises(ValueError, match=r"'epsilon', step 5 from the end \(timestep 999\): the step is not finite"):
        rolled_out(pipeline, 5)
