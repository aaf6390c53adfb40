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
"""LTX-Video against its pipeline of diffusers."""

import pytest
import torch
from diffusion_models import VIDEO_FAMILIES, load_model
from rlr_models import edit_json, seeded
from rlr_utils import rollout
from rlr_video_models_other import (
    PROMPTS,
    add_random_lora,
    assert_a_misfit_is_refused,
    assert_a_rollout_does_not_wait_for_the_device,
    assert_an_adapter_draws_the_same_in_a_plain_pipeline,
    assert_decodes_as,
    assert_draws_as,
    assert_the_defaults_are_the_pipelines,
    assert_the_sweep_is_exact,
    assert_works_in_half_precision,
    chain_of,
    copied,
    plain_video_pipeline,
    tiny_ltx,
    videos_of_chain,
    videos_of_pipeline,
)


SIZE = (64, 32, 9)


@pytest.fixture(scope="module")
def model():
    """No test may change it."""
    return load_model(tiny_ltx(), families=VIDEO_FAMILIES)


@pytest.fixture(scope="module")
def denoising_model():
    """One whose decoder removes the last of the noise. No test may change it."""
    return load_model(tiny_ltx(denoising_decoder=True))


@pytest.fixture(scope="module")
def pipeline(model):
    return plain_video_pipeline(tiny_ltx(), model)


def denormalized(pipeline, latents):
    vae = pipeline.vae
    return pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)


def test_the_defaults_are_the_pipelines(model):
    height, width, frames = model.default_size
    assert_the_defaults_are_the_pipelines(
        *(model, "num_inference_steps", "guidance_scale", "max_sequence_length"),
        **{"height": height, "width": width, "num_frames": frames, "frame_rate": model.fps},
    )


# Without noise


@pytest.mark.parametrize("guidance_scale", [None, 1.0])
def test_without_noise_the_chain_draws_the_videos_of_the_pipeline(model, pipeline, guidance_scale):
    """Of prompts of differing length, which are not square."""
    found = assert_draws_as(model, pipeline, SIZE, guidance_scale=guidance_scale)
    assert (found[0] - found[1]).abs().max() > 1e-3
    # The levels are those that the pipeline has just used.
    assert torch.equal(model.noise_schedule(3, SIZE).sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(model.noise_schedule(3, SIZE).timesteps, pipeline.scheduler.timesteps)


def test_a_negative_prompt_and_the_length_of_prompts_are_the_pipelines(pipeline):
    model = load_model(tiny_ltx())
    plain = videos_of_chain(model, SIZE)
    found = assert_draws_as(model, pipeline, SIZE, negative_prompt="a dog")
    assert (found - plain).abs().max() > 1e-4
    model.max_sequence_length = 12
    assert (assert_draws_as(model, pipeline, SIZE) - plain).abs().max() > 1e-5


def test_levels_are_shifted_by_the_length_of_the_video(model):
    """Its last level is not 0 but .1, from where one step goes to 0."""
    short, long = (model.noise_schedule(4, (64, 64, frames)).sigmas for frames in (5, 45))
    assert (long[1:-2] > short[1:-2]).all()
    assert short[-2].item() == pytest.approx(0.1) and short[-1] == 0
    with pytest.raises(ValueError, match="no levels for 1 steps"):
        model.noise_schedule(1, SIZE)


def test_a_decoder_that_removes_noise_draws_it_from_fixed_seeds(denoising_model):
    """What the pipeline draws when its generators, after the chain, and the global one have the seed 0."""
    model = denoising_model
    pipeline = plain_video_pipeline(tiny_ltx(denoising_decoder=True), model)
    chain = chain_of(model, SIZE, eta=0.0)
    x_T = model.draw_latents(chain, len(PROMPTS), SIZE, seeded(range(2)))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with torch.no_grad():
        latents = rollout(chain, x_T, seeded(range(2))).latents[0]
        found, alone = model.decode(latents), model.decode(latents[1:])
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=1e-5)
    arguments = model.pipeline_arguments(SIZE, 3, model.guidance_scale)
    assert arguments["decode_timestep"] > arguments["decode_noise_scale"] > 0
    torch.manual_seed(0)
    packed = pipeline._pack_latents(x_T)
    expected = pipeline(prompt=PROMPTS, latents=packed, generator=seeded([0, 0]), output_type="pt", **arguments).frames
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    other = videos_of_pipeline(model, pipeline, SIZE)  # with other noise in the decoder, and only there
    assert 1e-3 < (other - found).abs().mean() < 0.1


# With noise


def test_noise_is_the_default(model):
    chain = chain_of(model, SIZE)
    assert chain.sigma(1) == 0 < chain.sigma(2)
    x_0, noise = torch.randn(2, 1, 4, 3, 4, 2)
    torch.testing.assert_close(chain.renoise(x_0, noise), 0.9 * x_0 + 0.1 * noise)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_sweep_is_exact(guidance_scale):
    assert_the_sweep_is_exact(tiny_ltx(), SIZE, guidance_scale)


def test_videos_are_decoded_and_differentiated_as_by_the_pipeline(model, pipeline):
    assert_decodes_as(model, SIZE, lambda latents: pipeline.vae.decode(denormalized(pipeline, latents)).sample)
    assert model.chunk_frames(9) is None


def test_a_decoder_that_removes_noise_has_a_gradient(denoising_model):
    """Also where checkpointing computes twice what draws noise."""
    pipeline = denoising_model.pipeline

    def decode(latents):
        noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
        noisy = 0.975 * denormalized(pipeline, latents) + 0.025 * noise
        torch.manual_seed(0)
        return pipeline.vae.decode(noisy, torch.tensor([0.05, 0.05])).sample

    assert_decodes_as(denoising_model, SIZE, decode)


def test_it_works_in_half_precision():
    assert_works_in_half_precision(tiny_ltx(denoising_decoder=True), SIZE)


def test_a_rollout_does_not_wait_for_the_device():
    assert_a_rollout_does_not_wait_for_the_device(tiny_ltx(), SIZE)


# Adapters


def test_a_saved_adapter_draws_the_same_in_a_plain_pipeline(tmp_path):
    assert_an_adapter_draws_the_same_in_a_plain_pipeline(tiny_ltx(), tmp_path, SIZE)


def test_the_lora_is_in_both_attentions_of_every_block(model):
    tuned = load_model(tiny_ltx())
    add_random_lora(tuned)
    assert sum("lora_A" in name for name, _ in tuned.network.named_parameters()) == 2 * 2 * 4


# What a model must be


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 48, 9), "videos of 64 x 48 pixels: not multiples of 32"),
        ((64, 32, 10), "videos of 10 frames: not one and a multiple of 4"),
        ((64, 32, 0), "videos of 0 frames"),
    ],
)
def test_sizes_that_the_pipeline_does_not_draw_are_refused(model, size, message):
    model.check_size(SIZE)
    model.check_size(model.default_size)
    with pytest.raises(ValueError, match=message):
        model.check_size(size)


MISFITS = [
    ("transformer", "patch_size", 2, "takes patches of 1 x 2 x 2 latents"),
    ("transformer", "in_channels", 7, "the VAE has latents of 4 channels, the transformer of 7"),
    ("transformer", "caption_channels", 7, "takes prompts of width 7, and the text encoder gives 32"),
    ("scheduler", "use_flow_sigmas", True, "has use_flow_sigmas"),
]


@pytest.mark.parametrize(("part", "entry", "value", "message"), MISFITS)
def test_components_that_do_not_fit_are_refused_by_name(pipeline, part, entry, value, message):
    assert_a_misfit_is_refused(pipeline, part, entry, value, message)


@pytest.mark.parametrize("entry", ["shift_terminal", "base_image_seq_len", "max_shift"])
def test_a_schedule_that_says_too_little_is_refused(tmp_path, entry):
    folder = copied(tiny_ltx(), tmp_path)
    edit_json(f"{folder}/scheduler/scheduler_config.json", {entry: None})
    with pytest.raises(
        ValueError, match=f"^'{folder}' cannot be loaded: scheduler: its configuration has no '{entry}'"
    ):
        load_model(folder)


def test_another_vae_is_refused(model):
    with pytest.raises(ValueError, match="the VAE of LTX-Video can be replaced by no other"):
        model.decode(torch.zeros(1, 4, 3, 4, 2), vae=model.pipeline.vae)
