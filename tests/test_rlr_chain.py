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
import copy

import pytest
import torch
from peft import LoraConfig
from reward_models import load_reward
from rlr_testing import TINY_AESTHETIC, Mix, gradients, tiny_pipeline
from rlr_utils import (
    SCHEDULERS,
    ChainOfThought,
    ClippedRatio,
    GaussianKL,
    StableDiffusionChain,
    backward_sweep,
    decode_latents,
    denoising_steps,
    full_bp,
    levels_of_steps,
    likelihood_ratio,
    make_scheduler,
    renoise,
    rollout,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler


PROMPTS = ["a red seven", "a blue two", "a green zero"]


def make_chain(pipeline, num_steps, prompts=PROMPTS, eta=1.0, guidance_scale=5.0):
    pipeline.scheduler.set_timesteps(num_steps)
    embeds, negative = pipeline.encode_prompt(prompts, "cpu", 1, guidance_scale > 1)
    return StableDiffusionChain(
        pipeline.unet, pipeline.scheduler, embeds, negative, guidance_scale=guidance_scale, eta=eta
    )


def add_lora(unet, seed=0):
    """A LoRA whose B is not zero, so that every gradient is there."""
    torch.manual_seed(seed)
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))


@pytest.mark.parametrize("eta, guidance_scale", [(1.0, 5.0), (0.5, 1.0), (0.0, 3.0)])
def test_a_rollout_ends_in_the_pipelines_own_picture(eta, guidance_scale):
    pipeline = tiny_pipeline()
    settings = {"num_inference_steps": 6, "eta": eta, "guidance_scale": guidance_scale, "output_type": "latent"}
    expected = pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **settings).images
    chain = make_chain(pipeline, 6, eta=eta, guidance_scale=guidance_scale)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, 4, 8, 8, generator=generator)
    trajectory = rollout(chain, x_T, generator)
    torch.testing.assert_close(trajectory.latents[0], expected, rtol=1e-5, atol=1e-5)
    images = pipeline.image_processor.postprocess(
        pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample.detach(), output_type="pt"
    )
    torch.testing.assert_close(decode_latents(pipeline.vae, expected).detach(), images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rollout_ends_in_the_pipelines_own_picture_under_every_scheduler(name, prediction_type):
    pipeline = tiny_pipeline()
    settings = {"prediction_type": prediction_type}
    pipeline.scheduler = make_scheduler(name, {**pipeline.scheduler.config, **settings})
    if (name, prediction_type) == ("euler_ancestral", "sample"):  # which diffusers does not have either
        with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler cannot be used here"):
            make_chain(pipeline, 6)
        return
    options = {"num_inference_steps": 6, "eta": 1.0, "guidance_scale": 3.0, "output_type": "latent"}
    expected = pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images
    chain = make_chain(pipeline, 6, guidance_scale=3.0)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, 4, 8, 8, generator=generator) * pipeline.scheduler.init_noise_sigma
    trajectory = rollout(chain, x_T, generator, predict=[1])
    torch.testing.assert_close(trajectory.latents[0], expected, rtol=2e-4, atol=2e-4)
    if chain.sigma(1) == 0:  # the last step then ends in what it predicts
        torch.testing.assert_close(trajectory.predictions[1], trajectory.latents[0], rtol=1e-3, atol=1e-3)
    assert all(chain.sigma(k) > 0 for k in range(2, 7))


def test_pure_noise_at_the_start_needs_another_prediction_than_noise():
    """Zero terminal signal: v prediction works, and noise prediction would divide by zero at the first step."""
    pipeline = tiny_pipeline()
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config = {**pipeline.scheduler.config, **settings}
    pipeline.scheduler = make_scheduler("ddim", {**config, "prediction_type": "v_prediction"})
    chain = make_chain(pipeline, 5)
    assert chain.timesteps[0] == 999 and chain.steps[0].x0_from_x == 0
    pipeline.scheduler = make_scheduler("ddim", config)
    with pytest.raises(ValueError, match=r"'epsilon', step 5 from the end \(timestep 999\): the schedule degenerates"):
        make_chain(pipeline, 5)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(clip_sample=True), "no Gaussian step"),
        (DDPMScheduler(clip_sample=False, thresholding=True), "no Gaussian step"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "step 3 from the end .* no Gaussian step"),
        (PNDMScheduler(), "PNDMScheduler cannot be used here: .*generator"),
    ],
    ids=["clips", "thresholds", "remembers", "no noise"],
)
def test_a_scheduler_that_is_no_gaussian_chain_is_refused(scheduler, message):
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        denoising_steps(scheduler, eta=1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_asking_a_scheduler_leaves_it_as_it_is(name):
    scheduler = make_scheduler(name, tiny_pipeline().scheduler.config)
    scheduler.set_timesteps(4)
    before = copy.deepcopy(vars(scheduler))
    denoising_steps(scheduler, eta=1.0)
    for key, value in vars(scheduler).items():
        same = torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else str(value) == str(before[key])
        assert same, key


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_sigma_is_that_of_the_ddim_paper(eta):
    """Equation 16 of huggingface.co/papers/2010.02502, from the cumulative alphas."""
    pipeline = tiny_pipeline()
    chain = make_chain(pipeline, 10, eta=eta)
    alphas = pipeline.scheduler.alphas_cumprod.double()
    for k in range(1, 11):
        t = chain.timesteps[10 - k].item()
        a_t, a_prev = alphas[t], alphas[max(t - 100, 0)]
        sigma = eta * ((1 - a_prev) / (1 - a_t)).sqrt() * (1 - a_t / a_prev).sqrt()
        # The scheduler works in float32, where 1 - a_t / a_prev cancels at the last step.
        assert chain.sigma(k) == pytest.approx(sigma.item(), rel=1e-3)
        assert isinstance(chain.sigma(k), float)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_chain_of_one_picture_is_its_row_of_the_batch(guidance_scale):
    chain = make_chain(tiny_pipeline(), 3, guidance_scale=guidance_scale)
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        repeated = chain.repeat(1, 4).mean(2, x[1:2].expand(4, -1, -1, -1))
        torch.testing.assert_close(repeated, chain.mean(2, x)[1:2].expand(4, -1, -1, -1), rtol=1e-4, atol=1e-5)
    assert chain.prompt_embeds.shape[1] == 3


def test_every_step_can_have_its_own_prompt():
    pipeline = tiny_pipeline()
    first, last = (make_chain(pipeline, 2, [p] * 3) for p in ("a red seven", "a blue two"))
    pipeline.scheduler.set_timesteps(2)
    embeds = torch.stack([first.prompt_embeds[0], last.prompt_embeds[0]])
    both = StableDiffusionChain(pipeline.unet, pipeline.scheduler, embeds, first.negative_prompt_embeds)
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(both.mean(2, x), first.mean(2, x))
        assert torch.equal(both.mean(1, x), last.mean(1, x))
        assert not torch.allclose(first.mean(1, x), last.mean(1, x))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_chain_of_thought_at_inference_is_that_of_training(guidance_scale):
    """Five steps: two coarse, two mid, one fine, in the pipeline through a callback and in the chain step by step."""
    pipeline = tiny_pipeline()
    levels = [PROMPTS, [f"a yellow {p.split()[-1]}" for p in PROMPTS], PROMPTS[::-1]]
    order = levels_of_steps(5, (0.4, 0.8))
    assert order == [0, 0, 1, 1, 2]
    chains = [make_chain(pipeline, 5, level, guidance_scale=guidance_scale) for level in levels]
    embeds = torch.stack([chains[level].prompt_embeds[0] for level in order])
    chain = chains[0].conditioned_on(embeds, chains[0].negative_prompt_embeds)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, 4, 8, 8, generator=generator)
    thought = ChainOfThought(pipeline, *levels, num_inference_steps=5, boundaries=(0.4, 0.8))
    options = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "eta": 1.0, "output_type": "latent"}
    found = pipeline(
        levels[0],
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=thought,
        **thought.inputs,
        **options,
    ).images
    expected = rollout(chain, x_T, generator).latents[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = pipeline(levels[0], generator=torch.Generator().manual_seed(0), **options).images
    assert (plain - found).abs().max() > 0.05


def replay(chain, trajectory):
    x = trajectory.latents[chain.num_steps]
    for k in range(chain.num_steps, 0, -1):
        x = chain.mean(k, x) + chain.sigma(k) * trajectory.noises[k]
    return x


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sweep_is_full_backpropagation_of_stable_diffusion(checkpointing):
    """Through 8 guided steps, the decoder, CLIP and the head, in float32: 1e-4 of the gradient's size."""
    pipeline = tiny_pipeline()
    add_lora(pipeline.unet)
    if checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.vae.enable_gradient_checkpointing()
    reward = load_reward("aesthetic", path=TINY_AESTHETIC)
    chain = make_chain(pipeline, 8)
    trajectory = rollout(chain, torch.randn(3, 4, 8, 8))
    x_0 = trajectory.latents[0].clone().requires_grad_()
    (reward_grad,) = torch.autograd.grad(reward(decode_latents(pipeline.vae, x_0), PROMPTS).sum(), x_0)
    backward_sweep(chain, trajectory, full_bp(8).mixing, reward_grad=reward_grad)
    swept = gradients(pipeline.unet)
    (-reward(decode_latents(pipeline.vae, replay(chain, trajectory)), PROMPTS).mean()).backward()
    expected = gradients(pipeline.unet)
    assert (swept - expected).norm() < 1e-4 * expected.norm()


def test_the_sweep_is_exact_on_stable_diffusion_in_float64():
    """Any gamma against one graph of the whole chain, to 1e-9."""
    pipeline = tiny_pipeline(dtype=torch.float64)
    add_lora(pipeline.unet)
    pipeline.unet.double()
    chain = make_chain(pipeline, 3)
    trajectory = rollout(chain, torch.randn(3, 4, 8, 8, dtype=torch.float64))
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    weight = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    mixing = [0.0, 1.0, 0.7, 0.2]
    backward_sweep(chain, trajectory, mixing, reward_grad=weight, advantages=advantages)
    swept = gradients(pipeline.unet)
    x = trajectory.latents[3]
    for k in (3, 2, 1):
        score = -likelihood_ratio(chain, trajectory, k, advantages) / 3
        x = Mix.apply(chain.mean(k, x), mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-(weight * x).sum() / 3).backward()
    expected = gradients(pipeline.unet)
    torch.testing.assert_close(swept, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_the_predicted_picture_is_the_schedulers():
    pipeline = tiny_pipeline()
    chain = make_chain(pipeline, 5)
    x_T = torch.randn(3, 4, 8, 8)
    trajectory = rollout(chain, x_T, torch.Generator().manual_seed(0), predict=[1, 3, 5])
    plain = rollout(chain, x_T, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(trajectory.latents, plain.latents)) and not plain.predictions
    alphas = pipeline.scheduler.alphas_cumprod
    assert trajectory.predictions.keys() == {1, 3, 5}
    for k in (1, 3, 5):
        t, x = chain.timesteps[5 - k], trajectory.latents[k]
        with torch.no_grad():
            doubled = torch.cat([chain.negative_prompt_embeds, chain.prompt_embeds[0]])
            first, second = pipeline.unet(torch.cat([x, x]), t, doubled).sample.chunk(2)
        noise = first + 5 * (second - first)
        expected = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        torch.testing.assert_close(trajectory.predictions[k], expected, rtol=1e-4, atol=1e-4)


def test_renoising_repeats_the_last_step_from_another_noise():
    pipeline = tiny_pipeline()
    chain = make_chain(pipeline, 5)
    x_0 = rollout(chain, torch.randn(3, 4, 8, 8)).latents[0]
    first, second = renoise(chain, x_0), renoise(chain, x_0)
    assert not torch.equal(first.latents[1], second.latents[1])
    alpha = pipeline.scheduler.alphas_cumprod[chain.timesteps[-1]]
    noise = (first.latents[1] - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean() == pytest.approx(0, abs=0.15)
    with torch.no_grad():
        step = chain.mean(1, first.latents[1]) + chain.sigma(1) * first.noises[1]
    torch.testing.assert_close(first.latents[0], step)


class Carried(TorchDispatchMode):
    """Notes every tensor that an operation carries from the CPU to the device: a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim > 0}
        if "cpu" in devices and any(t.is_meta for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.operations.append(func)
        return out


@pytest.mark.parametrize("estimator", ["rlr", "rlr of some steps", "ddpo", "rlr with KL", "draft_lv"])
def test_nothing_in_rollout_and_sweep_waits_for_the_device(estimator):
    """On a device without memory no value can be asked for; and after the noise, all that it needs is there."""
    pipeline = tiny_pipeline()
    add_lora(pipeline.unet)
    pipeline.unet.to("meta")
    pipeline.scheduler.set_timesteps(4)
    embeds = torch.zeros(2, 3, 77, 64, device="meta")
    chain = StableDiffusionChain(pipeline.unet, pipeline.scheduler, embeds[0], embeds[1])
    x_T = torch.zeros(3, 4, 8, 8, device="meta")
    carried, before = Carried(), []

    def called(unet, inputs):
        assert all(isinstance(value, torch.Tensor) and value.is_meta for value in inputs)
        before.append(len(carried.operations))

    pipeline.unet.register_forward_pre_hook(called)
    with carried:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        trajectory = rollout(chain, x_T, generators, keep=[2, 3] if estimator == "rlr of some steps" else [])
    # The noise of generators on the CPU, all of it before the first call.
    assert before[0] > 0 and set(before) == {len(carried.operations)} and len(before) == 4
    rewards, options = torch.zeros(3, device="meta"), {"reward_grad": torch.zeros_like(x_T)}
    mixing = ([0.0] if estimator == "ddpo" else [0.5]) * 5
    if estimator == "draft_lv":
        trajectory = renoise(chain, trajectory.latents[0])
        StableDiffusionChain(pipeline.unet, pipeline.scheduler, embeds[0], embeds[1])  # the scheduler is as it was
        mixing, options["stop_after"] = [1.0] * 5, 1
    elif estimator == "ddpo":
        options["cotangent"] = ClippedRatio(chain, trajectory, rewards)
    else:
        options["advantages"] = rewards
    if estimator == "rlr of some steps":
        options["weights"] = [1.0, 1.0, 2.0, 2.0, 0.0]
    if estimator == "rlr with KL":
        options["penalty"] = GaussianKL(chain, lambda k, x: chain.mean(k, x).detach(), trajectory, 0.1)
    with Carried() as carried:
        rows = backward_sweep(chain, trajectory, mixing, **options)
    assert rows.pathwise.is_meta and not carried.operations
    assert all(p.grad.is_meta for p in pipeline.unet.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="item"):
        rows.pathwise[1].item()


@pytest.mark.parametrize("mixing", [[0.5] * 5, [0.0] * 5], ids=["both", "likelihood ratio"])
def test_a_compiled_unet_has_one_graph_for_the_rollout_and_one_for_the_sweep(mixing):
    pipeline = tiny_pipeline()
    add_lora(pipeline.unet)
    chain = make_chain(pipeline, 4)
    plain = rollout(chain, torch.randn(3, 4, 8, 8), torch.Generator().manual_seed(0))
    counter = CompileCounter()
    torch._dynamo.reset()
    chain.unet = torch.compile(pipeline.unet, backend=counter)
    for _ in range(2):
        trajectory = rollout(chain, plain.latents[4], torch.Generator().manual_seed(0))
        backward_sweep(
            chain, trajectory, mixing, reward_grad=torch.ones_like(plain.latents[0]), advantages=torch.ones(3)
        )
    assert counter.frame_count == 2
    torch.testing.assert_close(trajectory.latents[0], plain.latents[0], rtol=1e-4, atol=1e-4)
