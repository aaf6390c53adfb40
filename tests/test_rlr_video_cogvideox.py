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
"""CogVideoX 2B, 5B and 1.5 against their pipeline of diffusers."""

import math

import pytest
import torch
from diffusion_models import VIDEO_FAMILIES, load_model
from rlr_models import edit_json
from rlr_video_models_other import (
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
    tiny_cogvideox,
    tiny_cogvideox15,
    tiny_cogvideox_5b,
    videos_of_chain,
)

from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler


SIZE = (32, 48, 9)
MODELS = {"2B": tiny_cogvideox, "5B": tiny_cogvideox_5b, "1.5": tiny_cogvideox15}


@pytest.fixture(params=MODELS, scope="module")
def folder(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def model(folder):
    """No test may change it."""
    return load_model(folder, families=VIDEO_FAMILIES)


@pytest.fixture(scope="module")
def pipeline(folder, model):
    return plain_video_pipeline(folder, model)


def test_the_defaults_are_the_pipelines(folder, model):
    assert_the_defaults_are_the_pipelines(model, "num_inference_steps", "guidance_scale")
    if folder == tiny_cogvideox():
        assert (model.max_sequence_length, model.fps) == (20, 8)  # its positions are for so many tokens
    else:
        assert_the_defaults_are_the_pipelines(model, "max_sequence_length")
        assert model.fps == (16 if folder == tiny_cogvideox15() else 8)


# Without noise


@pytest.mark.parametrize("guidance_scale", [None, 1.0])
def test_without_noise_the_chain_draws_the_videos_of_the_pipeline(model, pipeline, guidance_scale):
    """Of prompts of differing length, which are not square."""
    found = assert_draws_as(model, pipeline, SIZE, guidance_scale=guidance_scale)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("num_steps", "size"), [(1, SIZE), (7, SIZE), (2, (48, 32, 17)), (2, (32, 32, 1))])
def test_it_does_with_other_steps_and_sizes(model, pipeline, num_steps, size):
    """Seven steps do not divide the timesteps: each ends beside where the next begins, and the last before 0."""
    assert_draws_as(model, pipeline, size, num_steps=num_steps)


def test_a_negative_prompt_is_the_pipelines(model, pipeline):
    found = assert_draws_as(model, pipeline, SIZE, num_steps=2, negative_prompt="a dog")
    assert (found - videos_of_chain(model, SIZE, num_steps=2)).abs().max() > 1e-5


def test_the_length_of_prompts_is_the_pipelines_where_positions_are_rotary(folder, pipeline):
    if folder == tiny_cogvideox():
        return
    model = load_model(folder)
    model.max_sequence_length = 12
    found = assert_draws_as(model, pipeline, SIZE, num_steps=2)
    model.max_sequence_length = 226
    assert (found - videos_of_chain(model, SIZE, num_steps=2)).abs().max() > 1e-5


def test_the_pipelines_own_scheduler_is_replaced_where_it_remembers_steps(folder, model):
    assert type(model.pipeline.scheduler) is CogVideoXDDIMScheduler
    plain = plain_video_pipeline(folder, model)
    before = CogVideoXDPMScheduler.from_config(plain.scheduler.config)
    assert torch.equal(model.pipeline.scheduler.alphas_cumprod, before.alphas_cumprod)
    assert model.pipeline.scheduler.alphas_cumprod[-1] == 0
    model.noise_schedule(3)
    assert len(model.pipeline.scheduler.timesteps) == 1000  # it is a copy that is set to three steps


# With noise


def test_the_first_step_goes_from_pure_noise_to_the_predicted_video_and_new_noise(model):
    chain, alphas = chain_of(model, SIZE, eta=1.0), model.pipeline.scheduler.alphas_cumprod
    assert chain.timesteps.tolist() == [999, 666, 332] and chain.timesteps.dtype == torch.int64
    first = chain.steps[0]
    assert first.sigma == pytest.approx(math.sqrt(1 - alphas[666])) and first.x_from_x == 0
    assert first.x_from_e == pytest.approx(-math.sqrt(alphas[666]))
    assert (first.x0_from_x, first.x0_from_e) == (0, -1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_keeps_the_share_of_the_video_and_of_the_noise(model, eta):
    """In what becomes of alpha x_0 + sigma epsilon with the right prediction."""
    alphas = [*model.pipeline.scheduler.alphas_cumprod[[999, 749, 499, 249]].tolist(), 1.0]
    chain = chain_of(model, SIZE, num_steps=4, eta=eta)
    for step, now, then in zip(chain.steps, alphas, alphas[1:]):
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        of_x_0 = step.x_from_x * alpha - step.x_from_e * sigma
        of_epsilon = step.x_from_x * sigma + step.x_from_e * alpha
        assert of_x_0 == pytest.approx(math.sqrt(then), abs=1e-9)
        assert math.hypot(of_epsilon, step.sigma) == pytest.approx(math.sqrt(1 - then), abs=1e-7)
    assert (chain.sigma(4) > chain.sigma(3) > chain.sigma(2) > 0) == (eta > 0) and chain.sigma(1) == 0


def test_videos_are_renoised_to_the_last_level(model):
    x_0, noise = torch.randn(2, 1, 4, 3, 4, 4)
    kept = model.pipeline.scheduler.alphas_cumprod[332].item()
    expected = math.sqrt(kept) * x_0 + math.sqrt(1 - kept) * noise
    torch.testing.assert_close(chain_of(model, SIZE).renoise(x_0, noise), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_the_sweep_is_exact(folder, guidance_scale):
    assert_the_sweep_is_exact(folder, SIZE, guidance_scale)


def test_videos_are_decoded_and_differentiated_as_by_the_pipeline(model, pipeline):
    """Without the latent frame that pads those of 1.5, in front."""
    padding = 1 if pipeline.transformer.config.patch_size_t else 0
    assert model.latents_shape(2, SIZE) == (2, 4, 3 + padding, 8, 12)
    assert_decodes_as(model, SIZE, lambda latents: pipeline.decode_latents(latents.transpose(1, 2)[:, padding:]))
    assert model.chunk_frames(9) is None


def test_it_works_in_half_precision(folder):
    assert_works_in_half_precision(folder, SIZE)


def test_a_rollout_does_not_wait_for_the_device(folder):
    assert_a_rollout_does_not_wait_for_the_device(folder, SIZE)


# Adapters


def test_a_saved_adapter_draws_the_same_in_a_plain_pipeline(folder, tmp_path):
    assert_an_adapter_draws_the_same_in_a_plain_pipeline(folder, tmp_path, SIZE)


# What a model must be


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((32, 44, 9), "videos of 32 x 44 pixels: not multiples of 8"),
        ((32, 48, 13), "videos of 13 frames: not one and a multiple of 8"),  # the decoder returns 16
        ((32, 48, 0), "videos of 0 frames"),
    ],
)
def test_sizes_that_the_pipeline_does_not_draw_are_refused(model, size, message):
    model.check_size(SIZE)
    with pytest.raises(ValueError, match=message):
        model.check_size(size)


def test_sizes_are_the_pipelines_or_else_those_that_1_5_was_trained_on(folder, model):
    if folder == tiny_cogvideox15():
        assert model.default_size == (768, 1360, 9)
        with pytest.raises(ValueError, match="videos of 64 x 104 pixels: the model has positions for 64 x 96"):
            model.check_size((64, 104, 9))
    else:
        assert model.default_size == (64, 96, 9)
        model.check_size((64, 104, 9))


IMAGE_TO_VIDEO = "image to video"
MISFITS = [
    ("transformer", "in_channels", 8, f"takes 8 channels and predicts 4, as one of {IMAGE_TO_VIDEO}"),
    ("transformer", "ofs_embed_dim", 8, IMAGE_TO_VIDEO),
    ("transformer", "use_learned_positional_embeddings", True, IMAGE_TO_VIDEO),
    ("transformer", "patch_size_t", 3, "takes patches of 3 latent frames"),
    ("transformer", "text_embed_dim", 7, "takes prompts of width 7, and the text encoder gives 32"),
    ("vae", "latent_channels", 7, "the VAE has latents of 7 channels, the transformer of 4"),
]


@pytest.mark.parametrize(("part", "entry", "value", "message"), MISFITS)
def test_components_that_do_not_fit_are_refused_by_name(pipeline, part, entry, value, message):
    assert_a_misfit_is_refused(pipeline, part, entry, value, message)


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        *(("scheduler", entry) for entry in ("snr_shift_scale", "rescale_betas_zero_snr", "timestep_spacing")),
        *(("transformer", entry) for entry in ("use_rotary_positional_embeddings", "sample_height", "sample_frames")),
    ],
)
def test_a_configuration_that_says_too_little_is_refused(tmp_path, part, entry):
    """Without these the library would take those of another model, which no weight shows."""
    folder = copied(tiny_cogvideox_5b(), tmp_path)
    edit_json(f"{folder}/{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json", {entry: None})
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded: {part}: its configuration has no '{entry}'"):
        load_model(folder)


def test_another_scheduler_is_refused(tmp_path):
    folder = copied(tiny_cogvideox(), tmp_path)
    with pytest.raises(ValueError, match="the scheduler ddpm is not one of CogVideoX, which has DDIM alone"):
        load_model(folder, scheduler="ddpm")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(f"{folder}/scheduler")
    edit_json(f"{folder}/model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]})
    with pytest.raises(ValueError, match="its scheduler, DDIMScheduler, is neither CogVideoXDDIMScheduler nor"):
        load_model(folder)


def test_another_vae_is_refused(model):
    with pytest.raises(ValueError, match="the VAE of CogVideoX can be replaced by no other"):
        model.decode(torch.zeros(1, 4, 3, 4, 4), vae=model.pipeline.vae)
