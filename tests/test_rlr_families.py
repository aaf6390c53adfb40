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
"""The interface of a model family, for every family, against the family's pipeline in diffusers."""

import pytest
import torch
from diffusion_models import UNET_FAMILIES, as_model, load_model
from rlr_models import FOLDERS, PROMPTS, chain_of, plain_pipeline, seeded
from rlr_utils import rollout

from diffusers import AutoencoderTiny


def test_every_family_has_a_model_for_these_tests():
    assert FOLDERS.keys() == UNET_FAMILIES.keys()


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request):
    return FOLDERS[request.param]()


@pytest.fixture(scope="module")
def model(folder):
    """No test may change it."""
    return load_model(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    """The same as diffusers loads it. No test may change it."""
    return plain_pipeline(folder)


def images_of(pipeline, num_steps=3, prompts=PROMPTS, negative_prompt=None, size=(32, 32), **options):
    """What the pipeline draws, from a generator for each image."""
    return pipeline(
        prompts,
        height=size[0],
        width=size[1],
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
        num_inference_steps=num_steps,
        generator=seeded(range(len(prompts))),
        **{"output_type": "pt", "guidance_scale": 5.0, "eta": 1.0, **options},
    ).images


@pytest.mark.parametrize(
    "scheduler, options",
    [
        ("ddim", {}),
        ("ddim", {"guidance_scale": 1.0, "size": (32, 48)}),
        ("ddim", {"guidance_scale": 4.0, "eta": 0.3, "negative_prompt": "a blue one", "size": (48, 32)}),
        ("ddpm", {"negative_prompt": ""}),
        ("euler_ancestral", {"guidance_scale": 3.0}),
        ("dpm_sde", {"guidance_scale": 3.0, "num_steps": 4}),
    ],
)
def test_a_rollout_from_the_pipelines_generators_ends_in_its_images(folder, scheduler, options):
    model, size = load_model(folder, scheduler=scheduler), options.get("size", (32, 32))
    chain, generators = chain_of(model, **options), seeded(range(3))
    x_T = model.draw_latents(chain, 3, size, generators)
    trajectory = rollout(chain, x_T, generators)
    found = model.decode(trajectory.latents[0])
    torch.testing.assert_close(found, images_of(plain_pipeline(folder, scheduler), **options), rtol=1e-4, atol=1e-4)


def test_a_loaded_pipeline_is_the_same_model(model, pipeline):
    other = as_model(pipeline)
    assert type(other) is type(model) and other.pipeline is pipeline and other.network is pipeline.unet
    x = torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        means = [chain_of(one).mean(2, x) for one in (model, other)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-4)


def test_a_family_says_what_it_is(model):
    assert model.pipeline_class == type(model.pipeline).__name__ and UNET_FAMILIES[model.pipeline_class]
    assert isinstance(model.name, str) and model.trained in model.pipeline.components
    assert model.network is getattr(model.pipeline, model.trained)
    encoders = [part for name, part in model.pipeline.components.items() if name.startswith("text_encoder")]
    assert model.text_encoders == encoders and all(isinstance(one, torch.nn.Module) for one in encoders)


def test_a_loaded_model_is_frozen_in_float32(model):
    modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 2 + len(model.text_encoders)
    parameters = [p for module in modules for p in module.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32} and not any(p.requires_grad for p in parameters)
    assert not any(module.training for module in modules)


def test_prompts_are_embedded_as_the_pipeline_embeds_them(model, pipeline):
    conditions = model.embed(PROMPTS)
    given = {}

    def keep(pipeline, step, timestep, kwargs):
        given.update(kwargs)
        return {}

    # The names are those under which a callback may change them.
    inputs = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": list(conditions)}
    images_of(pipeline, num_steps=1, guidance_scale=1.0, output_type="latent", **inputs)
    assert conditions.keys() == given.keys()
    for name, value in conditions.items():
        torch.testing.assert_close(value, given[name])
        assert len(value) == 3 and not value.requires_grad
        torch.testing.assert_close(value[1:2], model.embed(PROMPTS[1])[name], rtol=1e-4, atol=1e-4)


def test_images_without_a_negative_prompt_have_the_conditions_of_nothing(folder, model):
    """They are those of an empty prompt, or zeros where the pipeline's configuration says so."""
    nothing, empty = model.embed_negative(), model.embed([""])
    assert all(torch.equal(value, empty[name]) for name, value in model.embed_negative("").items())
    if not model.pipeline.config.get("force_zeros_for_empty_prompt"):
        assert all(torch.equal(value, empty[name]) for name, value in nothing.items())
        return
    assert {name: value.shape for name, value in nothing.items()} == {n: v.shape for n, v in empty.items()}
    assert not any(value.any() for value in nothing.values())
    other = load_model(folder)
    other.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert all(torch.equal(value, empty[name]) for name, value in other.embed_negative().items())


def test_static_conditions_depend_on_the_size_and_nothing_else(model):
    static = model.static((48, 32))
    assert all(isinstance(value, torch.Tensor) for value in static.values())
    network, shape = model.network, model.latents_shape(3, (48, 32))
    x, conditions = torch.randn(shape), model.embed(PROMPTS)
    with torch.no_grad():
        first, second = (model.call(network, x, 500, conditions, model.static((48, 32))) for _ in range(2))
    assert torch.equal(first, second) and first.shape == x.shape


def test_latents_are_drawn_as_the_pipeline_draws_them(model, pipeline):
    chain, generators = chain_of(model, num_steps=1, size=(48, 32)), seeded(range(3))
    x_T = model.draw_latents(chain, 3, (48, 32), generators)
    assert x_T.shape == model.latents_shape(3, (48, 32)) and x_T.dtype == torch.float32
    expected = images_of(pipeline, num_steps=1, size=(48, 32), output_type="latent")
    torch.testing.assert_close(rollout(chain, x_T, generators).latents[0], expected, rtol=1e-4, atol=1e-4)
    chain.init_noise_sigma = 14.6  # as of schedulers that add noise to the latents without shrinking them
    scaled = model.draw_latents(chain, 3, (48, 32), seeded(range(3)))
    torch.testing.assert_close(scaled, 14.6 * x_T)


def test_the_network_is_called_with_its_own_precision_and_differentiably(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {model.network.dtype, *(encoder.dtype for encoder in model.text_encoders)} == {torch.bfloat16}
    x, seen = torch.randn(3, 4, 4, 4, requires_grad=True), []
    model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    prediction = model.call(model.network, x, 500, model.embed(PROMPTS), model.static((16, 16)))
    prediction.float().sum().backward()
    assert seen == [torch.bfloat16] and x.grad.abs().sum() > 0
    chain = chain_of(model, size=(16, 16))
    assert model.draw_latents(chain, 3, (16, 16), seeded(range(3))).dtype == torch.float32
    assert chain.mean(2, x).dtype == torch.float32


def test_latents_are_decoded_as_the_pipeline_decodes_them(model, pipeline):
    latents = torch.randn(3, 4, 8, 8, requires_grad=True)

    def replace(pipeline, step, timestep, kwargs):
        return {"latents": latents.detach()}

    expected = images_of(pipeline, num_steps=1, callback_on_step_end=replace)
    images = model.decode(latents)
    torch.testing.assert_close(images.detach(), expected, rtol=1e-5, atol=1e-5)
    assert images.min() >= 0 and images.max() <= 1
    weight = torch.randn_like(images)
    (gradient,) = torch.autograd.grad((weight * images).sum(), latents)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (weight * (model.decode(latents + step) - model.decode(latents - step))).sum() / 2
    assert rise.item() == pytest.approx(1e-2 * gradient.norm().item(), rel=0.05)


def test_another_vae_may_decode(model):
    blocks = {f"{name}_block_out_channels": (8, 8) for name in ("encoder", "decoder")}
    counts = {f"num_{name}_blocks": (1, 1) for name in ("encoder", "decoder")}
    vae = AutoencoderTiny(**blocks, **counts).requires_grad_(False).to(torch.bfloat16)
    latents = torch.randn(2, 4, 8, 8)
    images = model.decode(latents, vae)
    expected = (vae.decode(latents.bfloat16()).sample.float() / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)
    assert images.dtype == torch.float32


def test_the_default_size_is_the_pipelines(model, pipeline):
    images = pipeline(PROMPTS[0], num_inference_steps=1, output_type="pt").images
    assert model.default_size == images.shape[2:] == (32, 32)


def test_sizes_that_the_pipeline_refuses_are_refused(model, pipeline):
    for size in ((32, 32), (48, 32), (8, 64)):
        model.check_size(size)
    for size in ((36, 32), (32, 33)):
        with pytest.raises(ValueError, match=f"images of {size[0]} x {size[1]} pixels: not multiples of 8"):
            model.check_size(size)
        with pytest.raises(ValueError, match="divisible by 8"):
            images_of(pipeline, num_steps=1, size=size)


def test_the_noise_schedule_is_a_copy_of_the_pipelines_scheduler(model):
    before = model.pipeline.scheduler.timesteps.clone()
    schedule = model.noise_schedule(7)
    assert len(schedule.timesteps) == 7 and schedule.config == model.pipeline.scheduler.config
    assert torch.equal(model.pipeline.scheduler.timesteps, before)
    with pytest.raises(ValueError, match="1000 steps reach beyond the model's timesteps: use fewer"):
        model.noise_schedule(1000)  # these schedules are offset by one


def test_the_chain_lies_on_the_device_that_is_asked_for(model):
    chain = model.make_chain(model.network, 4, (32, 32), device="meta")
    assert chain.timesteps.is_meta and chain.num_steps == 4 and chain.conditions == [{}] * 4
    assert model.make_chain(model.network, 4, (32, 32)).timesteps.device.type == "cpu"
    like = torch.zeros(3, 4, 4, 4, device="meta")
    assert chain.renoise(like, like).is_meta
    # Diffusers' schedulers move their tables to the device; the pipeline's own scheduler stays.
    assert model.pipeline.scheduler.alphas_cumprod.device.type == "cpu"
    assert model.make_chain(model.network, 4, (32, 32)).steps == chain.steps


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_chain_of_one_image_is_its_row_of_the_batch(model, guidance_scale):
    chain, x = chain_of(model, guidance_scale=guidance_scale), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        repeated = chain.repeat(1, 4).mean(2, x[1:2].expand(4, -1, -1, -1))
        torch.testing.assert_close(repeated, chain.mean(2, x)[1:2].expand(4, -1, -1, -1), rtol=1e-4, atol=1e-5)
        assert (chain.repeat(0, 1).mean(2, x[1:2]) - repeated[:1]).abs().max() > 1e-3


def test_the_chain_renoises_images_up_to_its_last_step(model):
    chain, scheduler = chain_of(model, num_steps=5), model.noise_schedule(5)
    x_0, noise = torch.randn(2, 3, 4, 8, 8)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[-1]]
    expected = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(chain.renoise(x_0, noise), expected)


def test_a_scheduler_without_gaussian_steps_is_refused(folder):
    model = load_model(folder)
    model.pipeline.scheduler = type(model.pipeline.scheduler).from_config(
        model.pipeline.scheduler.config, clip_sample=True
    )
    with pytest.raises(ValueError, match="DDIMScheduler, .* not a Gaussian step"):
        model.make_chain(model.network, 3, (32, 32))
