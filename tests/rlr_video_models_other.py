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
"""Tiny pipelines of LTX-Video, CogVideoX and AnimateDiff, built offline and written once per process, and their tests' parts."""

import os
import shutil
from inspect import signature

import pytest
import torch
from diffusion_models import as_model, load_model
from diffusion_models.adapters import load_adapter, load_lora, save_lora
from peft import LoraConfig
from rlr_chains import Mix, gradients
from rlr_flow_models import clip_config, clip_tokenizer, plain_flow_pipeline, t5_tokenizer, tiny_t5, written_once
from rlr_models import assert_a_rollout_does_not_wait, seeded
from rlr_utils import backward_sweep, likelihood_ratio, rollout
from transformers import CLIPTextModel

import diffusers
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    UNet2DConditionModel,
)


@written_once
def tiny_ltx(denoising_decoder=False):
    """LTX-Video: a latent stands for 4 frames of 16 x 16 pixels. From 0.9.1 on its decoder removes the last of the noise."""
    options = {"timestep_conditioning": True, "decoder_inject_noise": (True, True, False)} if denoising_decoder else {}
    vae = AutoencoderKLLTXVideo(
        **{"block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4},
        **{"layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "patch_size": 4},
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        **options,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    saturate(vae.decoder.conv_out.conv)
    for name, weight in vae.named_parameters():
        if "per_channel_scale" in name:
            weight.data.fill_(0.05)  # of the noise that the decoder adds, which would be none
    return LTXPipeline(
        transformer=LTXVideoTransformer3DModel(
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2},
            **{"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 32},
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1},
            base_image_seq_len=1024,
        ),
        vae=vae,
        text_encoder=tiny_t5(),
        tokenizer=t5_tokenizer(),
    )


@written_once
def tiny_cogvideox():
    """CogVideoX 2B: with sinusoidal positions, here for 20 tokens of a prompt, and the DDIM scheduler."""
    return _cogvideox(CogVideoXDDIMScheduler, snr_shift_scale=3.0, scaling_factor=1.15, max_text_seq_length=20)


@written_once
def tiny_cogvideox_5b():
    """CogVideoX 5B: with rotary embeddings and the scheduler of DPM-Solver."""
    rotary = {"use_rotary_positional_embeddings": True}
    return _cogvideox(CogVideoXDPMScheduler, snr_shift_scale=1.0, scaling_factor=0.7, **rotary)


@written_once
def tiny_cogvideox15():
    """CogVideoX 1.5, whose patches are of two latent frames."""
    rotary = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}
    return _cogvideox(CogVideoXDPMScheduler, snr_shift_scale=1.0, scaling_factor=0.7, **rotary)


def _cogvideox(scheduler_class, snr_shift_scale, scaling_factor, **transformer_options):
    vae = AutoencoderKLCogVideoX(
        **{"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4},
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        scaling_factor=scaling_factor,
    )
    saturate(vae.decoder.conv_out.conv)
    return CogVideoXPipeline(
        transformer=CogVideoXTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "time_embed_dim": 8},
            **{"in_channels": 4, "out_channels": 4, "text_embed_dim": 32},
            **{"sample_height": 16, "sample_width": 24, "sample_frames": 9},
            **transformer_options,
        ),
        scheduler=scheduler_class(
            **{"prediction_type": "v_prediction", "clip_sample": False, "rescale_betas_zero_snr": True},
            **{"timestep_spacing": "trailing", "snr_shift_scale": snr_shift_scale},
        ),
        vae=vae,
        text_encoder=tiny_t5(),
        tokenizer=t5_tokenizer(),
    )


@written_once
def tiny_animatediff():
    """AnimateDiff on Stable Diffusion 1.5, for at most 6 frames."""
    (unet, motion_adapter), tokenizer = tiny_animatediff_parts(), clip_tokenizer()
    vae = AutoencoderKL(
        **{"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3,
    )
    saturate(vae.decoder.conv_out)
    return AnimateDiffPipeline(
        unet=unet,
        motion_adapter=motion_adapter,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
        vae=vae,
        text_encoder=CLIPTextModel(clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
    )


def tiny_animatediff_parts():
    """A U-Net of images and a motion adapter for it, which the pipeline makes one U-Net of."""
    unet = UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4},
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        **{"cross_attention_dim": 16, "attention_head_dim": 2},
    )
    motion_adapter = MotionAdapter(
        **{"block_out_channels": (8,), "motion_layers_per_block": 1, "motion_norm_num_groups": 4},
        **{"motion_num_attention_heads": 2, "motion_max_seq_length": 6},
    )
    return unet, motion_adapter


def saturate(conv):
    """Make a decoder's last layer one that takes some pixels out of range."""
    conv.weight.data *= 3


# What the tests of these families share

PROMPTS = ["a red seven", "a blue two on a green field"]
GENERATORS = range(len(PROMPTS))


def plain_video_pipeline(folder, model):
    """A pipeline as a user of diffusers has it, with the scheduler with which it draws what the model's chain draws."""
    pipeline = plain_flow_pipeline(folder)
    name, settings = model.scheduler_code(None) or ("FlowMatchEulerDiscreteScheduler", {})
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)
    return pipeline


def assert_the_defaults_are_the_pipelines(model, *names, **given):
    """Those of the arguments of its call, under the names that the model has, or else with the values that are given."""
    parameters = signature(type(model.pipeline).__call__).parameters
    for name in names:
        given[name] = getattr(model, name)
    assert {name: parameters[name].default for name in given} == given


def chain_of(model, size, num_steps=3, guidance_scale=None, negative_prompt=None, **options):
    """The chain of the model under `PROMPTS`, with its own guidance unless told otherwise."""
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    chain = model.make_chain(model.network, num_steps, size, guidance_scale=guidance_scale, **options)
    return chain.conditioned_on(model.embed(PROMPTS), model.embed_negative(negative_prompt))


def videos_of_chain(model, size, eta=0.0, **options):
    """What the chain draws, from a generator for each video."""
    chain, generators = chain_of(model, size, eta=eta, **options), seeded(GENERATORS)
    x_T = model.draw_latents(chain, len(PROMPTS), size, generators)
    with torch.no_grad():
        return model.decode(rollout(chain, x_T, generators).latents[0])


def videos_of_pipeline(model, pipeline, size, num_steps=3, guidance_scale=None, negative_prompt=None, eta=0.0):
    """What the plain pipeline draws from the same generators."""
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    options = model.drawing_options({"eta": eta})
    arguments = model.pipeline_arguments(size, num_steps, guidance_scale, negative_prompt, **options)
    if negative_prompt is not None:
        arguments["negative_prompt"] = [negative_prompt] * len(PROMPTS)
    return pipeline(prompt=PROMPTS, generator=seeded(GENERATORS), output_type="pt", **arguments).frames


def assert_draws_as(model, pipeline, size, **options):
    """The chain draws the videos of the plain pipeline; they are returned."""
    found, expected = videos_of_chain(model, size, **options), videos_of_pipeline(model, pipeline, size, **options)
    assert found.shape == (len(PROMPTS), size[2], 3, *size[:2]) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    return found


def add_random_lora(model, seed=0):
    """A LoRA whose B is not zero, on the layers that the family names."""
    torch.manual_seed(seed)
    targets = model.lora_layers.split(",")
    model.network.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets))


def assert_the_sweep_is_exact(folder, size, guidance_scale):
    """In float64 but for what diffusers computes in float32, against one graph of the whole chain, for any gamma."""
    model, mixing = load_model(folder, dtype=torch.float64), [0.0, 1.0, 0.7, 0.2]
    add_random_lora(model)
    model.network.double()
    chain = chain_of(model, size, guidance_scale=guidance_scale, eta=1.0)
    x_T, weight = torch.randn(2, *model.latents_shape(len(PROMPTS), size), dtype=torch.float64)
    trajectory, advantages = rollout(chain, x_T), torch.tensor([1.0, -0.5], dtype=torch.float64)
    backward_sweep(chain, trajectory, mixing, reward_grad=weight, advantages=advantages)
    swept, x = gradients(model.network), trajectory.latents[3]
    for k in (3, 2, 1):
        score = 0 if chain.sigma(k) == 0 else -likelihood_ratio(chain, trajectory, k, advantages) / len(PROMPTS)
        mean = chain.mean(k, x)
        x = (mean if chain.sigma(k) == 0 else Mix.apply(mean, mixing[k], score)) + chain.sigma(k) * trajectory.noises[
            k
        ]
    (-(weight * x).sum() / len(PROMPTS)).backward()
    expected = gradients(model.network)
    assert expected.norm() > 0 and (swept - expected).norm() < 1e-6 * expected.norm()


def assert_an_adapter_draws_the_same_in_a_plain_pipeline(folder, directory, size):
    """Saved and loaded by the pipeline's own methods, and loaded as the evaluation does."""
    model = load_model(folder)
    base = videos_of_chain(model, size)
    add_random_lora(model)
    tuned = videos_of_chain(model, size)
    assert (tuned - base).abs().max() > 1e-3
    save_lora(model, directory)
    pipeline, other = plain_video_pipeline(folder, model), load_model(folder)
    pipeline.load_lora_weights(directory)
    torch.testing.assert_close(videos_of_pipeline(model, pipeline, size), tuned, rtol=0, atol=1e-5)
    load_adapter(other.pipeline, str(directory), "tuned")
    torch.testing.assert_close(videos_of_chain(other, size), tuned, rtol=0, atol=1e-5)
    trained = load_model(folder)
    load_lora(trained, str(directory))
    torch.testing.assert_close(videos_of_chain(trained, size), tuned, rtol=0, atol=1e-5)


def assert_decodes_as(model, size, decode):
    """The model decodes as `decode`, latents -> (B, 3, F, H, W) in [-1, 1] and beyond, clamped, with its gradient.

    It also does with gradient checkpointing, and of many pixels out of range.
    """
    torch.manual_seed(0)
    latents = (3 * torch.randn(model.latents_shape(2, size))).requires_grad_()
    videos, expected = model.decode(latents), decode(latents).transpose(1, 2) / 2 + 0.5
    assert videos.shape == (2, size[2], 3, *size[:2]) and videos.dtype == torch.float32
    torch.testing.assert_close(videos, expected.clamp(0, 1), rtol=0, atol=5e-5)
    saturated = (expected < 0) | (expected > 1)
    assert saturated.float().mean() > 0.02
    weight = saturated * torch.randn_like(videos)
    (gradient,) = torch.autograd.grad((weight * expected).sum(), latents)
    (found,) = torch.autograd.grad((weight * videos).sum(), latents)
    assert gradient.norm() > 0
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    model.pipeline.vae.enable_gradient_checkpointing()
    again = model.decode(latents)
    torch.rand(1)  # between the passes a run draws other numbers
    (found,) = torch.autograd.grad((weight * again).sum(), latents)
    model.pipeline.vae.disable_gradient_checkpointing()
    assert torch.equal(again, videos)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def assert_works_in_half_precision(folder, size):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {model.network.dtype, model.pipeline.vae.dtype} == {torch.bfloat16}
    chain = chain_of(model, size, 2)
    x = torch.randn(model.latents_shape(len(PROMPTS), size), requires_grad=True)
    mean = chain.mean(2, x)
    mean.sum().backward()
    assert mean.dtype == torch.float32 and x.grad.isfinite().all()
    videos = model.decode(x.detach())
    assert videos.dtype == torch.float32 and videos.isfinite().all()


def assert_a_rollout_does_not_wait_for_the_device(folder, size):
    model = load_model(folder)
    assert_a_rollout_does_not_wait(model, model.embed(PROMPTS), model.embed_negative(), size, guidance_scale=3.0)


def copied(folder, directory):
    """The path of a copy of a pipeline's folder, whose files may be changed."""
    return shutil.copytree(folder, os.path.join(directory, "model"))


def assert_a_misfit_is_refused(pipeline, part, entry, value, message):
    """That of another value of an entry in a component's configuration, which is as before afterwards."""
    component = getattr(pipeline, part)
    before = component.config.get(entry)
    component.register_to_config(**{entry: value})
    try:
        with pytest.raises(ValueError, match=message):
            as_model(pipeline)
    finally:
        component.register_to_config(**{entry: before})
    as_model(pipeline)
