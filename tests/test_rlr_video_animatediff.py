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
"""AnimateDiff against its pipeline of diffusers."""

import shutil

import pytest
import torch
from diffusion_models import VIDEO_FAMILIES, load_model
from rlr_models import edit_json
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
    tiny_animatediff,
    tiny_animatediff_parts,
    videos_of_chain,
)

from diffusers import AutoencoderTiny


SIZE = (16, 24, 4)


@pytest.fixture(scope="module")
def model():
    """No test may change it."""
    return load_model(tiny_animatediff(), families=VIDEO_FAMILIES)


@pytest.fixture(scope="module")
def pipeline(model):
    return plain_video_pipeline(tiny_animatediff(), model)


def test_the_defaults_are_the_pipelines(model):
    names = "num_inference_steps", "guidance_scale"
    assert_the_defaults_are_the_pipelines(model, *names, num_frames=model.default_size[2])


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"eta": 1.0}, {"negative_prompt": "a dog"}])
def test_the_chain_draws_the_videos_of_the_pipeline(model, pipeline, options):
    """With its noise, too. Of prompts of differing length, which are not square."""
    found = assert_draws_as(model, pipeline, SIZE, **options)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert not options or (found - videos_of_chain(model, SIZE)).abs().max() > 1e-4


def test_a_unet_of_images_with_a_motion_adapter_is_the_same_model(tmp_path, model):
    folder = copied(tiny_animatediff(), tmp_path)
    unet, motion_adapter = tiny_animatediff_parts()
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    motion_adapter.save_pretrained(f"{folder}/motion_adapter")
    edit_json(f"{folder}/model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]})
    other = load_model(folder)
    assert type(other.network) is type(model.network)
    assert_draws_as(other, plain_video_pipeline(folder, other), SIZE)
    shutil.rmtree(f"{folder}/motion_adapter")
    edit_json(f"{folder}/model_index.json", {"motion_adapter": [None, None]})
    with pytest.raises(ValueError, match="cannot be loaded: it has no motion_adapter"):
        load_model(folder)


def test_frames_see_each_other(model):
    """A change of the last latent frame changes the prediction of the first."""
    chain = chain_of(model, SIZE)
    x = torch.randn(model.latents_shape(len(PROMPTS), SIZE))
    other = x.clone()
    other[:, :, -1] += 1
    with torch.no_grad():
        assert (chain.mean(3, x) - chain.mean(3, other))[:, :, 0].abs().max() > 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_the_sweep_is_exact(guidance_scale):
    assert_the_sweep_is_exact(tiny_animatediff(), SIZE, guidance_scale)


def test_videos_are_decoded_and_differentiated_as_by_the_pipeline(model, pipeline):
    assert_decodes_as(model, SIZE, pipeline.decode_latents)
    assert model.chunk_frames(4) is None


def test_the_gradient_through_the_decoder_keeps_no_features_of_the_decoder(model):
    kept, latents = [], torch.randn(model.latents_shape(2, SIZE), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        videos = model.decode(latents)
    assert sum(kept) <= 2 * latents.numel() < videos.numel()


def test_another_vae_of_the_same_latents_may_decode(model):
    vae, latents = AutoencoderTiny(latent_channels=4), torch.randn(2, 4, 5, 4, 6)
    videos = model.decode(latents, vae=vae)
    frame = vae.decode(latents[1, :, 3][None] / vae.config.scaling_factor).sample[0] / 2 + 0.5
    torch.testing.assert_close(videos[1, 3], frame.clamp(0, 1), rtol=0, atol=1e-5)


def test_it_works_in_half_precision():
    assert_works_in_half_precision(tiny_animatediff(), SIZE)


def test_a_rollout_does_not_wait_for_the_device():
    assert_a_rollout_does_not_wait_for_the_device(tiny_animatediff(), SIZE)


def test_a_saved_adapter_draws_the_same_in_a_plain_pipeline(tmp_path):
    assert_an_adapter_draws_the_same_in_a_plain_pipeline(tiny_animatediff(), tmp_path, SIZE)


def test_the_lora_is_in_the_layers_of_space_and_of_time():
    tuned = load_model(tiny_animatediff())
    add_random_lora(tuned)
    names = [name for name, _ in tuned.network.named_parameters() if "lora_A" in name]
    assert sum(".motion_modules." in name for name in names) >= 8 <= sum(".attentions." in name for name in names)


# What a model must be


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 28, 4), "videos of 16 x 28 pixels: not multiples of 8"),
        ((16, 24, 7), "videos of 7 frames: the motion modules take at most 6"),
        ((16, 24, 0), "videos of 0 frames"),
    ],
)
def test_sizes_that_the_pipeline_does_not_draw_are_refused(model, size, message):
    model.check_size(SIZE)
    assert model.default_size == (16, 16, 16)
    with pytest.raises(ValueError, match=message):
        model.check_size(size)


MISFITS = [
    ("unet", "in_channels", 9, "takes 9 channels and predicts 4"),  # as that of PIA, which takes an image
    ("unet", "encoder_hid_dim_type", "ip_image_proj", "embeddings of another kind of encoder"),
    ("unet", "addition_embed_type", "text_time", "whose U-Net has the addition_embed_type None"),  # of SDXL
    ("unet", "cross_attention_dim", 7, "reads embeddings of width 7, and prompts are embedded in 16"),
    ("vae", "latent_channels", 7, "the VAE has latents of 7 channels, the U-Net of 4"),
]


@pytest.mark.parametrize(("part", "entry", "value", "message"), MISFITS)
def test_components_that_do_not_fit_are_refused_by_name(pipeline, part, entry, value, message):
    assert_a_misfit_is_refused(pipeline, part, entry, value, message)


@pytest.mark.parametrize("entry", ["num_attention_heads", "motion_num_attention_heads"])
def test_a_unet_that_does_not_say_its_heads_is_refused(tmp_path, entry):
    folder = copied(tiny_animatediff(), tmp_path)
    edit_json(f"{folder}/unet/config.json", {entry: None})
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded: unet: its configuration has no '{entry}'"):
        load_model(folder)
