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
"""The chains of a run: those that it trains on, and those that draw images for validation and evaluation."""

import copy

from diffusion_models.embeddings import PromptEmbeds
from diffusion_models.video import VideoModel

from .prompts import conditions_of, texts_of


# Up to so many prompts are encoded before training. Of more, each is encoded when its turn comes.
MAX_ENCODED_BEFORE = 10_000
# What --final_noise auto stands for where the estimator needs noise at the last step: it is hardly visible.
FINAL_NOISE = 0.03
# Flow-GRPO's level of noise.
FLOW_SDE_LEVEL = 0.7


def set_defaults(args, model):
    """Set the steps, the guidance scale and the layers of the LoRA where they are not given: to the model's own."""
    for name in ("num_inference_steps", "guidance_scale", "lora_layers"):
        if getattr(args, name, "") is None:
            setattr(args, name, getattr(model, name))


def set_size(args, model):
    """Set --height and --width where they are not given: to --resolution, or else to the model's own size.

    For a model of videos --num_frames and --fps, too.

    Raises:
        ValueError: if the model cannot draw images, or videos, of that size.
    """
    height, width = (args.resolution,) * 2 if args.resolution else model.default_size[:2]
    args.height, args.width = args.height or height, args.width or width
    args.resolution = args.resolution or height
    if isinstance(model, VideoModel):
        args.num_frames, args.fps = args.num_frames or model.default_size[2], args.fps or model.fps
    model.check_size(size_of(args))


def size_of(args):
    """(height, width) of the images of a run in pixels, or (height, width, frames) of its videos."""
    frames = getattr(args, "num_frames", None)
    return (args.height, args.width) if frames is None else (args.height, args.width, frames)


def kind_of(args):
    """What a run makes: "image" or "video"."""
    return "image" if len(size_of(args)) == 2 else "video"


def sampling_options(args, model):
    """The arguments of `DiffusionModel.make_chain` beside the guidance scale that the flags set."""
    return {name: getattr(args, name) for name in model.sampling_options if hasattr(args, name)}


def sampler_of(args):
    """How a message names the sampler."""
    return f"--scheduler {args.scheduler}" if hasattr(args, "scheduler") else f"--noise {args.noise}"


def settle_noise(args, model, rlr, schedule):
    """Set --eta and --final_noise where they are left open.

    Args:
        model: `DiffusionModel`.
        rlr: `RLRStep`.
        schedule: one of its schedules.
    """
    if args.eta is None:
        args.eta = FLOW_SDE_LEVEL if args.noise == "flow_sde" else 1.0
    if "final_noise" in model.sampling_options and args.final_noise == "auto":
        args.final_noise = FINAL_NOISE if 1 in rlr.noisy_steps(schedule) else 0.0


def make_chain(args, model, network, device, options):
    """The model's chain without prompts, under the sampling flags.

    Args:
        options: from `sampling_options`, or from `DiffusionModel.drawing_options`.
    """
    chain = model.make_chain(
        *(network, args.num_inference_steps, size_of(args)),
        guidance_scale=args.guidance_scale,
        device=device,
        **options,
    )
    chain.split_guidance = getattr(args, "guidance_batching", "joint") == "split"
    return chain


def conditioned(args, chain, embeds):
    """`chain_of(prompts) -> DenoisingChain`, a chain with the prompts of a batch and the negative prompt.

    Args:
        chain: without prompts.
        embeds: `PromptEmbeds`.
    """
    negative = embeds.negative(args.negative_prompt)

    def chain_of(prompts):
        return chain.conditioned_on(conditions_of(args, prompts, embeds), negative)

    return chain_of


def drawing_chain_of(args, model, embeds=None):
    """`chain_of(prompts) -> DenoisingChain` of the images that the pipeline draws under the sampling flags.

    Args:
        embeds: `PromptEmbeds` of the model; made here if not given.
    """
    device = model.network.device
    chain = make_chain(args, model, model.network, device, model.drawing_options(sampling_options(args, model)))
    return conditioned(args, chain, embeds or PromptEmbeds(model, device))


def encode_prompts_of_run(args, embeds, sampler, others, first_step, show_progress):
    """Encode all prompts that a run will meet and free the text encoders, unless there are very many.

    Args:
        embeds: `PromptEmbeds`.
        sampler: `PromptSampler`, as at the beginning of the run; it is left unchanged.
        others: prompts beside those of training.
        first_step: the step that the run starts after.
        show_progress: whether this process shows a bar.
    """
    # The first is what the first calls are made with.
    upcoming, ahead = dict.fromkeys(sampler.prompts[:1]), copy.copy(sampler)
    for _ in range(first_step * args.gradient_accumulation_steps):
        ahead.next_batch(args.train_batch_size)
    for _ in range((args.max_train_steps - first_step) * args.gradient_accumulation_steps):
        upcoming.update(dict.fromkeys(ahead.next_batch(args.train_batch_size)))
        if len(upcoming) > MAX_ENCODED_BEFORE:
            return
        if len(upcoming) == sampler.num_distinct:
            break
    embeds.encode_all(texts_of(args.prompts, [*upcoming, *others]), show_progress)
    embeds.free_encoders()
