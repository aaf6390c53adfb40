#!/usr/bin/env python
# coding=utf-8
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
"""Fine-tune a LoRA of Stable Diffusion XL on a reward with RLR (huggingface.co/papers/2502.00639).

    accelerate launch train_rlr_sdxl.py --reward aesthetic

prompt -> rollout -> reward -> advantages -> backward sweep -> optimizer step; see the README beside this file. What does not
depend on the model is train_rlr_sd.py's: flags, checks, estimators, checkpoints, held-out pictures, upload.
"""

import math
import random
import time

import torch
from rlr_utils import (
    PerturbedChain,
    PromptSampler,
    StableDiffusionChain,
    WeightPerturbation,
    rollout,
    text_encoders_of,
)
from train_rlr_sd import (
    Batch,
    Estimator,
    Record,
    Scorer,
    average_gradients,
    can_be_compiled,
    claim_output_dir,
    command_of,
    embeds_by_step,
    ending_in_one_line,
    find_start,
    fit_to_model,
    frozen_dtype,
    generators_of,
    latents_shape,
    load_judges,
    load_pipeline,
    load_training_prompts,
    load_vae,
    loss_scale,
    make_accelerator,
    make_embeds_of,
    make_optimizer,
    make_parser,
    make_trainable,
    metrics_of,
    parse_and_check,
    print_plan,
    refusing_bad_input,
    sweep,
    to_device,
)

from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor


SCRIPT = "train_rlr_sdxl.py"
TRACKER = "rlr-sdxl"


def parse_args(input_args=None):
    parser = make_parser(SCRIPT, "Stable Diffusion XL")
    parser.add_argument(
        "--pretrained_vae_model_name_or_path",
        type=str,
        default=None,
        help="A VAE instead of the model's own (path or Hub name): madebyollin/sdxl-vae-fp16-fix does not overflow in half"
        " precision, where the model's own is kept in float32.",
    )
    parser.set_defaults(
        pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0", output_dir="rlr-sdxl-lora"
    )
    return parse_and_check(parser, input_args)


def load_xl_pipeline(args, dtype):
    """The pipeline to train, as `load_pipeline`; its VAE in float32 where its configuration says that it needs that.

    Raises:
        ValueError: as `load_pipeline` does, for a refiner, and if --pretrained_vae_model_name_or_path cannot be loaded.
    """
    name, components = args.pretrained_vae_model_name_or_path, {"add_watermarker": False}
    if name is not None:
        components["vae"] = load_vae(args, "pretrained_vae_model_name_or_path", AutoencoderKL, torch.float32)
    dtypes = {"default": dtype, "vae": torch.float32}
    pipeline = load_pipeline(args, dtypes, StableDiffusionXLPipeline, **components)
    if len(text_encoders_of(pipeline)) < 2:
        raise ValueError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} has not both text encoders: use a"
            " base model of SDXL"
        )
    channels, wanted = pipeline.vae.config.latent_channels, pipeline.unet.config.in_channels
    if channels != wanted:
        raise ValueError(
            f"--pretrained_vae_model_name_or_path {name!r} has latents of {channels} channels, the U-Net of {wanted}"
        )
    if not pipeline.vae.config.force_upcast:
        # Not diffusers' own `to`, which warns of modules to be kept in float32, of which there are none.
        torch.nn.Module.to(pipeline.vae, dtype)
    return pipeline


def negative_embeds(args, pipeline, embeds_of):
    """(1, L, D) and pooled (1, D') of --negative_prompt; without one the pipeline may want zeros, not an empty prompt."""
    if args.negative_prompt is None and pipeline.config.force_zeros_for_empty_prompt:
        return [torch.zeros_like(embeds) for embeds in embeds_of([""])]
    return embeds_of([args.negative_prompt or ""])


@ending_in_one_line(SCRIPT)
def main(args):
    with refusing_bad_input():
        accelerator = make_accelerator(args)
        dtype = frozen_dtype(accelerator)
        prompts = load_training_prompts(args)
        rewards, heldout = load_judges(args, prompts, accelerator)
        resume_path, first_step = find_start(args, accelerator, len(prompts))
        pipeline = load_xl_pipeline(args, dtype)
        scheduler, config = fit_to_model(args, accelerator, pipeline, prompts, resume_path)
        estimator = Estimator(args, rewards)
        baseline_vae = pipeline.vae
        if args.baseline_vae is not None:
            baseline_vae = load_vae(args, "baseline_vae", AutoencoderTiny, dtype)
        schedule = estimator.schedule()
        # As in the pipeline: original size, crop and target size of pictures that are as they were.
        size = (args.height, args.width)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=accelerator.device)
        # Every batch's chain is this one under the batch's prompts.
        promptless = StableDiffusionChain(
            pipeline.unet,
            scheduler,
            torch.zeros(1, 1, 1, device=accelerator.device),
            time_ids=time_ids,
            guidance_scale=args.guidance_scale,
            eta=args.eta,
        )
        estimator.check(schedule, promptless)
        trainable = make_trainable(args, pipeline)
        repo_id, base_license = claim_output_dir(args, accelerator, config, resume_path, TRACKER)

    promptless.unet = to_device(args, accelerator, pipeline, baseline_vae)
    optimizer, lr_scheduler = make_optimizer(args, accelerator, trainable)
    sampler = PromptSampler(
        prompts, args.seed, accelerator.process_index, accelerator.num_processes, args.images_per_prompt
    )
    scorer = Scorer(args, accelerator, rewards, pipeline.vae, baseline_vae)
    command = command_of(args, accelerator.num_processes, SCRIPT, parse_args([]))
    card = {"command": command, "repo_id": repo_id, "base_license": base_license, "prompt": prompts[0]}
    record = Record(args, accelerator, pipeline, sampler, estimator, heldout, config, card, first_step)

    embeds_of = make_embeds_of(pipeline, accelerator.device)
    negative, negative_pooled = negative_embeds(args, pipeline, embeds_of)

    def chain_of(batch_prompts):
        embeds, pooled = embeds_by_step(args, batch_prompts, embeds_of)
        return promptless.conditioned_on(embeds, negative, pooled, negative_pooled)

    shape = latents_shape(args, pipeline)
    trial = prompts[:1] * args.train_batch_size
    if is_compiled_module(promptless.unet) and not can_be_compiled(args, chain_of(trial), shape, schedule):
        promptless.unet = pipeline.unet
    record.start(resume_path, TRACKER)
    print_plan(accelerator, args, schedule, estimator.predicted_steps(schedule), len(prompts), trainable)
    with record.running():
        for step in record.steps():
            started = time.perf_counter()

            # prompt -> rollout -> reward
            schedule = estimator.schedule()
            predict = estimator.predicted_steps(schedule)
            batches = []
            for index in range(args.gradient_accumulation_steps):
                batch_prompts = sampler.next_batch(args.train_batch_size)
                chain = chain_of(batch_prompts)
                perturbation = WeightPerturbation(trainable, args.zo_scale, random.getrandbits(62), schedule.perturbed)
                generators = generators_of(args, accelerator, step, index)
                x_T = randn_tensor(shape, generators, device=accelerator.device) * scheduler.init_noise_sigma
                weights = schedule.draw_weights()
                keep = [k for k in schedule.swept if k <= args.keep_graphs and weights[k] > 0]
                trajectory = rollout(PerturbedChain(chain, perturbation), x_T, generators, predict, keep)
                scores, reward_grad = scorer(trajectory.latents[0], batch_prompts, estimator.with_gradient)
                predicted = scorer.predictions(trajectory, batch_prompts) if predict else None
                batches.append(
                    Batch(batch_prompts, chain, weights, trajectory, perturbation, scores, reward_grad, predicted)
                )

            # reward -> advantages, over the pictures of all ranks
            scores, advantages = estimator.advantages(accelerator, batches)

            # advantages -> sweep -> optimizer step
            swept = []
            for _ in range(args.num_inner_epochs):
                scale = loss_scale(accelerator)
                for batch, worth in zip(batches, advantages):
                    swept.append(sweep(args, batch, worth, schedule, scorer, pipeline.unet, scale))
                grad_norm = average_gradients(args, accelerator, trainable, record.clipping)
                optimizer.step()
                optimizer.zero_grad()
                if record.ema is not None:
                    record.ema.step(trainable)
            lr_scheduler.step()
            if math.isfinite(grad_norm):
                estimator.update(accelerator, swept)

            learning_rate, seconds = lr_scheduler.get_last_lr()[0], time.perf_counter() - started
            line = metrics_of(
                args, accelerator, step, schedule, predict, scores, swept, grad_norm, learning_rate, seconds
            )
            record.after_step(line)
    record.finish(load_xl_pipeline, rewards, prompts)


if __name__ == "__main__":
    main(parse_args())
