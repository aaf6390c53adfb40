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
"""The flow-matching families, each against its own pipeline of diffusers."""

import pytest
import torch
from diffusion_models import FLOW_FAMILIES, load_model
from diffusion_models.adapters import load_adapter, save_lora
from diffusion_models.chain_of_thought import ChainOfThought
from rlr_chains import Mix, gradients
from rlr_flow_models import FLOW_FOLDERS, plain_flow_pipeline, tiny_flux, tiny_flux2_klein, tiny_sd3, tiny_sd35
from rlr_models import assert_a_rollout_does_not_wait, seeded
from rlr_utils import backward_sweep, likelihood_ratio, rollout

from diffusers import AutoencoderKL


PROMPTS = ["a red seven", "a blue two on a green field", "0"]
SIZE = (32, 48)
MODELS = {
    **FLOW_FOLDERS,
    "without T5": lambda: tiny_sd3(with_t5=False),
    "SD3.5": tiny_sd35,
    "schnell": lambda: tiny_flux(guidance_embeds=False),
    "distilled": lambda: tiny_flux2_klein(is_distilled=True),
}


@pytest.fixture(params=MODELS, scope="module")
def folder(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def model(folder):
    """No test may change it."""
    return load_model(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    """The same as diffusers loads it."""
    return plain_flow_pipeline(folder)


def chain_of(model, num_steps=3, guidance_scale=None, size=SIZE, negative_prompt=None, **options):
    """The chain of the model under `PROMPTS`, with its own guidance unless told otherwise."""
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    chain = model.make_chain(model.network, num_steps, size, guidance_scale=guidance_scale, **options)
    return chain.conditioned_on(model.embed(PROMPTS), model.embed_negative(negative_prompt))


def images_of_chain(model, size=SIZE, **options):
    """What the chain draws, from a generator for each image."""
    chain, generators = chain_of(model, size=size, **options), seeded(range(len(PROMPTS)))
    x_T = model.draw_latents(chain, len(PROMPTS), size, generators)
    with torch.no_grad():
        return model.decode(rollout(chain, x_T, generators).latents[0])


def images_of_pipeline(model, pipeline, num_steps=3, guidance_scale=None, size=SIZE, negative_prompt=None, **options):
    """What the plain pipeline draws from the same generators."""
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    arguments = model.pipeline_arguments(size, num_steps, guidance_scale, negative_prompt, **options)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    return pipeline(prompt=list(PROMPTS), generator=seeded(range(len(PROMPTS))), output_type="pt", **arguments).images


def test_every_family_has_a_model_for_these_tests():
    assert FLOW_FOLDERS.keys() == FLOW_FAMILIES.keys()


# Without noise


def test_without_noise_the_chain_draws_the_images_of_the_pipeline(model, pipeline):
    """Of prompts of differing length, which are not square, with the family's own guidance."""
    found = images_of_chain(model, eta=0.0)
    expected = images_of_pipeline(model, pipeline)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    # The levels are those that the pipeline has just used.
    schedule = model.noise_schedule(3, SIZE)
    assert torch.equal(schedule.sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(schedule.timesteps, pipeline.scheduler.timesteps)


def test_guidance_is_switched_off_and_raised_as_in_the_pipeline(model, pipeline):
    images = {}
    for guidance_scale in (0.0, 1.0, 2.5):
        images[guidance_scale] = images_of_chain(model, num_steps=2, guidance_scale=guidance_scale, eta=0.0)
        expected = images_of_pipeline(model, pipeline, num_steps=2, guidance_scale=guidance_scale)
        torch.testing.assert_close(images[guidance_scale], expected, rtol=0, atol=1e-5)
    distilled = getattr(model, "is_distilled", False) or getattr(model, "is_guided", True) is False
    assert torch.equal(images[1.0], images[2.5]) == distilled


def test_a_negative_prompt_is_the_pipelines_or_is_refused(model, pipeline):
    name = model.pipeline_class
    if name in ("FluxPipeline", "Flux2KleinPipeline"):
        with pytest.raises(ValueError, match="'a dog'"):
            model.embed_negative("a dog")
        return
    options = {"num_steps": 2, "negative_prompt": "a dog", "guidance_scale": 3.0}
    found = images_of_chain(model, eta=0.0, **options)
    torch.testing.assert_close(found, images_of_pipeline(model, pipeline, **options), rtol=0, atol=1e-5)
    assert (found - images_of_chain(model, eta=0.0, **{**options, "negative_prompt": None})).abs().max() > 1e-4


def test_evenly_spaced_levels_are_those_of_a_pipeline_that_is_given_them(model, pipeline):
    found = images_of_chain(model, eta=0.0, sigmas="linspace", num_steps=4)
    expected = images_of_pipeline(model, pipeline, sigmas="linspace", num_steps=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    levels = [model.noise_schedule(4, SIZE, sigmas).sigmas for sigmas in ("native", "linspace")]
    assert torch.equal(*levels) == (model.pipeline_class != "StableDiffusion3Pipeline")


def test_the_length_of_prompts_is_the_pipelines_argument(folder, pipeline):
    model = load_model(folder)
    whole = images_of_chain(model, num_steps=2, eta=0.0)
    model.max_sequence_length = 30
    found = images_of_chain(model, num_steps=2, eta=0.0)
    torch.testing.assert_close(found, images_of_pipeline(model, pipeline, num_steps=2), rtol=0, atol=1e-5)
    assert (found - whole).abs().max() > 1e-5


def test_flow_sde_without_noise_is_the_pipeline_too(model, pipeline):
    found = images_of_chain(model, noise="flow_sde", eta=0.0)
    torch.testing.assert_close(found, images_of_pipeline(model, pipeline), rtol=0, atol=1e-5)


# With noise


def test_noise_is_the_default_and_a_floor_reaches_the_last_step(model):
    silent, noisy = chain_of(model), chain_of(model, final_noise=0.03)
    assert silent.sigma(1) == 0 < silent.sigma(2)
    assert noisy.sigma(1) == 0.03 and noisy.sigma(3) == silent.sigma(3) > 0.1
    assert chain_of(model, noise="flow_sde", eta=0.7).sigma(1) > 0


def test_images_are_renoised_to_the_last_level(model):
    chain, last = chain_of(model), model.noise_schedule(3, SIZE).sigmas[-2].item()
    x_0, noise = torch.randn(2, 1, 4, 4, 4)
    torch.testing.assert_close(chain.renoise(x_0, noise), (1 - last) * x_0 + last * noise)


@pytest.fixture(scope="module")
def exact_model(folder):
    """A model in float64 with a LoRA whose B is not zero, on the layers that the family names."""
    model = load_model(folder, dtype=torch.float64)
    add_random_lora(model)
    model.network.double()
    return model


def add_random_lora(model, seed=0):
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = model.lora_layers.split(",")
    model.network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_sweep_is_exact(exact_model, guidance_scale):
    """Any gamma, against one graph of the whole chain; in float64 but for the parts that diffusers computes in float32."""
    mixing = [0.0, 1.0, 0.7, 0.2]
    chain = chain_of(exact_model, 3, guidance_scale, final_noise=0.03)
    shape = exact_model.latents_shape(len(PROMPTS), SIZE)
    trajectory = rollout(chain, torch.randn(shape, dtype=torch.float64))
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    backward_sweep(chain, trajectory, mixing, reward_grad=weight, advantages=advantages)
    swept = gradients(exact_model.network)
    x = trajectory.latents[3]
    for k in (3, 2, 1):
        score = -likelihood_ratio(chain, trajectory, k, advantages) / len(PROMPTS)
        x = Mix.apply(chain.mean(k, x), mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-(weight * x).sum() / len(PROMPTS)).backward()
    expected = gradients(exact_model.network)
    assert expected.norm() > 0
    assert (swept - expected).norm() < 1e-6 * expected.norm()


def test_images_have_a_gradient(model):
    latents = torch.randn(model.latents_shape(1, (32, 32)), requires_grad=True)
    images = model.decode(latents)
    assert images.shape == (1, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    weight = torch.randn_like(images)
    (gradient,) = torch.autograd.grad((weight * images).sum(), latents)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (weight * (model.decode(latents + step) - model.decode(latents - step))).sum() / 2
    assert rise.item() == pytest.approx(1e-2 * gradient.norm().item(), rel=0.1)


# Adapters


def test_a_saved_adapter_gives_the_same_images_in_a_plain_pipeline(folder, tmp_path):
    model = load_model(folder)
    base = images_of_chain(model, eta=0.0)
    add_random_lora(model)
    tuned = images_of_chain(model, eta=0.0)
    assert (tuned - base).abs().max() > 1e-3
    save_lora(model, tmp_path)
    pipeline = plain_flow_pipeline(folder)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(images_of_pipeline(model, pipeline), tuned, rtol=0, atol=1e-5)
    other = load_model(folder)
    load_adapter(other.pipeline, str(tmp_path), "tuned")
    torch.testing.assert_close(images_of_chain(other, eta=0.0), tuned, rtol=0, atol=1e-5)


# What a model must be


def test_sizes_that_the_pipeline_does_not_draw_are_refused(model):
    multiple = 2 * model.pipeline.vae_scale_factor
    model.check_size((4 * multiple, 2 * multiple))
    with pytest.raises(ValueError, match=f"not multiples of {multiple}"):
        model.check_size((4 * multiple + multiple // 2, 2 * multiple))


def test_a_loaded_model_is_frozen(model):
    modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 2 + len(model.text_encoders)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


def test_text_encoders_can_be_freed(folder):
    model = load_model(folder)
    assert model.text_encoders
    model.free_text_encoders()
    assert model.text_encoders == [] and model.network is not None


def test_in_half_precision_latents_stay_in_float32(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {model.network.dtype, model.pipeline.vae.dtype} == {torch.bfloat16}
    chain, x = chain_of(model, 2), torch.randn(model.latents_shape(len(PROMPTS), SIZE), requires_grad=True)
    mean = chain.mean(2, x)
    mean.sum().backward()
    assert mean.dtype == torch.float32 and x.grad.isfinite().all()
    assert model.decode(x.detach()).isfinite().all()


def test_a_rollout_does_not_wait_for_the_device(folder):
    """After the noise of all steps, and tables of positions at the first, nothing goes to the device. Z-Image is left out: its
    network takes a list of prompts, whose lengths are asked for."""
    model = load_model(folder)
    if model.pipeline_class == "ZImagePipeline":
        return
    assert_a_rollout_does_not_wait(model, *conditions_of(model), SIZE, guidance_scale=3.0)


def conditions_of(model):
    """Those of `PROMPTS` and of no negative prompt, which is empty for a model without guidance."""
    return model.embed(PROMPTS), model.embed_negative() or {}


def test_the_callback_of_a_chain_of_thought_draws_the_chain_where_a_callback_may_change_all_conditions(
    folder, pipeline
):
    model, size = load_model(folder), {"height": SIZE[0], "width": SIZE[1]}
    levels = [PROMPTS, PROMPTS[::-1], ["a thin one"] * len(PROMPTS)]
    options = {"num_inference_steps": 3, "boundaries": (0.3, 0.6)}
    if model.pipeline_class in ("FluxPipeline", "QwenImagePipeline", "ZImagePipeline"):
        with pytest.raises(ValueError, match=f"a {model.pipeline_class} lets no callback change p"):
            ChainOfThought(pipeline, *levels, **options)
        return
    chain = model.make_chain(model.network, 3, SIZE, guidance_scale=3.0, eta=0.0)
    chain = chain.conditioned_on([model.embed(level) for level in levels], model.embed_negative())
    generators = seeded(range(len(PROMPTS)))
    x_T = model.draw_latents(chain, len(PROMPTS), SIZE, generators)
    with torch.no_grad():
        expected = model.decode(rollout(chain, x_T, generators).latents[0])
    thought = ChainOfThought(pipeline, *levels, **options)
    given = {
        **size,
        **thought.inputs,
        "callback_on_step_end": thought,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
    }
    given |= {"generator": seeded(range(len(PROMPTS))), "output_type": "pt"}
    found = pipeline(prompt=thought.first, **given).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - images_of_pipeline(model, pipeline, guidance_scale=3.0)).abs().max() > 1e-4


def test_a_vae_of_another_class_is_refused(folder):
    vae = AutoencoderKL(latent_channels=4, shift_factor=0.0)
    if isinstance(load_model(folder).pipeline.vae, AutoencoderKL):
        assert load_model(folder, vae=vae).pipeline.vae is vae
    else:
        with pytest.raises(ValueError, match="its VAE is an AutoencoderKL.+, which an AutoencoderKL cannot replace"):
            load_model(folder, vae=vae)
