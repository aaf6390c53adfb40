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
"""Fine-tune a LoRA of Stable Diffusion on a reward with RLR (huggingface.co/papers/2502.00639).

    accelerate launch train_rlr_sd.py --reward aesthetic

prompt -> rollout -> reward -> advantages -> backward sweep -> optimizer step; see the README beside this file.
"""

import argparse
import datetime
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Optional

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from datasets import load_dataset
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from matplotlib.figure import Figure
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from reward_models import load_rewards, parse_reward, parse_reward_paths
from reward_models.features import diversity, drift, load_features
from reward_models.loading import first_line
from rlr_utils import (
    BOUNDARIES,
    SCHEDULERS,
    AdaptiveMixing,
    ChainOfThought,
    ClippedRatio,
    GaussianKL,
    PerturbedChain,
    PredictedReward,
    PromptEmbeds,
    PromptSampler,
    RunningReward,
    StableDiffusionChain,
    SubchainSampler,
    SweepStatistics,
    Trajectory,
    Transport,
    WeightPerturbation,
    alignprop,
    backward_sweep,
    branch,
    ddpo,
    decode_latents,
    draft_lv,
    embed,
    full_bp,
    leave_one_out,
    levels_of_steps,
    likelihood_ratio,
    load_levels,
    load_prompts,
    make_scheduler,
    normalize,
    per_prompt,
    renoise,
    rlr,
    rlr_paper,
    rollout,
    subchain_length,
    text_encoders_of,
    truncated_bp,
    unique_prompts,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch._functorch import config as functorch_config
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

import diffusers
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    EMAModel,
    _collate_lora_metadata,
    cast_training_params,
    free_memory,
    offload_models,
)
from diffusers.utils import (
    check_min_version,
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
    is_wandb_available,
    is_xformers_available,
)
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor


if is_wandb_available():
    import wandb

# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.42.0")

logger = get_logger(__name__, log_level="INFO")

ESTIMATORS = ("rlr", "rlr_paper", "full_bp", "truncated_bp", "draft_lv", "alignprop", "ddpo")
# The schedules that need no further arguments than those there are.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# Pictures that are compared have these seeds, whatever the seed of the run: other noise than any run trains on.
EVALUATION_SEED = 1_000_000
# Those by which the best adapter is chosen are others again, or the comparison would flatter it.
HELDOUT_SEED = 2_000_000
# The loss scale starts at 2^10 and is halved at each overflow: where it gets here, more than scale is amiss.
SMALLEST_LOSS_SCALE = 2.0**-10
NEED_NOISE = ("rlr", "rlr_paper", "ddpo")
DATASET_FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
LORA_FILE = "pytorch_lora_weights.safetensors"
STATE_FILE = "rlr_state.json"
EMA_FILE = "ema.safetensors"
# What a run leaves in its output folder, beside its checkpoints and the logs of its trackers.
RUN_FILES = (
    *(LORA_FILE, "metrics.jsonl", "training_args.json", "evaluation.json", "reward_curve.png", "before_after.png"),
    *("README.md", os.path.join("best", LORA_FILE), os.path.join("ema", LORA_FILE)),
)
TRACKER = "rlr-sd"
# What --preset_low_memory sets, unless the command says otherwise: the pictures of a step one by one, and next to nothing
# on the device that is not in use.
LOW_MEMORY = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "decode_batch_size": 1,
    "reward_offload": True,
    "mixed_precision": "bf16",
}
# What may be another on resume: how long the run is, what is kept, shown and sent of it, and what is a matter of memory
# alone. All else is the run.
MAY_CHANGE = (
    *("max_train_steps", "num_train_epochs", "resume_from_checkpoint", "overwrite_output_dir", "output_dir"),
    *("early_stop_patience", "checkpointing_steps", "checkpoints_total_limit", "logging_dir", "report_to"),
    *("num_eval_images", "validation_prompts", "num_validation_images", "validation_steps", "cache_dir", "local_rank"),
    *("push_to_hub", "push_every", "hub_token", "hub_model_id"),
    *("decode_batch_size", "reward_batch_size", "reward_offload", "gradient_checkpointing", "keep_graphs"),
)


class Batch(NamedTuple):
    """A micro-batch between its rollout and its sweep."""

    prompts: list
    chain: StableDiffusionChain
    weights: list
    trajectory: Trajectory
    perturbation: WeightPerturbation
    scores: dict
    reward_grad: Optional[torch.Tensor]
    predicted: Optional[dict]


class Advantages(NamedTuple):
    """What the pictures of a micro-batch are worth to the sweep.

    Attributes:
        total, black_box: (B,), or (T + 1, B) where the baseline differs by step; of the reward, and of its part without a
            gradient.
        mean: of the micro-batch against other micro-batches, for the weight perturbation that its pictures share.
        kl_weight: reward per nat of divergence, in the unit of the advantages.
    """

    total: torch.Tensor
    black_box: torch.Tensor
    mean: float
    kl_weight: float


class Swept(NamedTuple):
    """What the sweep of a micro-batch has seen, each `None` or empty where there was nothing to see.

    Attributes:
        statistics: (4, T + 1), the rows of `SweepStatistics`.
        divergence: from the base model, in nats.
        clipped: the fraction of the batch that PPO has cut, of each step.
    """

    statistics: Optional[torch.Tensor] = None
    divergence: Optional[torch.Tensor] = None
    clipped: tuple = ()


class RunError(Exception):
    """What ends a run, in one line that names the culprit and the remedy."""


class RunStopped(RunError):
    """The run ends as it was asked to."""


@contextmanager
def ending_in_one_line(
    script,
    memory_savers="a smaller --train_batch_size with more --gradient_accumulation_steps, no --keep_graphs,"
    " --decode_batch_size 1, --gradient_checkpointing, --mixed_precision bf16, or --preset_low_memory",
):
    """Around the main of a script: what ends the run is said in one line, out of memory with what to use instead."""
    try:
        yield
    except RunStopped as error:
        raise SystemExit(f"{script}: {error}") from error
    except RunError as error:
        raise SystemExit(f"{script}: error: {error}") from error
    except RuntimeError as error:
        # On the CPU it is no OutOfMemoryError but a message of the allocator.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        message = f"{script}: error: out of memory: use {memory_savers} ({str(error).splitlines()[0]})"
        raise SystemExit(message) from error


@contextmanager
def refusing_bad_input():
    """Within it, what is wrong with the input ends the run."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError(" ".join(str(error).split())) from error


def license_of(model, token):
    """The licence that a model's card states, or `None`."""
    card = os.path.join(model, "README.md") if os.path.isdir(model) else model
    try:
        return ModelCard.load(card, token=token).data.license
    except Exception as error:  # a card is not needed: there may be none, or no Hub to ask
        logger.info(f"no licence is known for {model!r}: {first_line(error)}")
        return None


def command_of(args, num_processes, script="train_rlr_sd.py", defaults=None):
    """The command that starts the same run: the arguments that are not the default's, less what is nobody's business."""
    words = ["accelerate", "launch", "--num_processes", str(num_processes), script]
    defaults = parse_args([]) if defaults is None else defaults
    for name, default in vars(defaults).items():
        value = getattr(args, name)
        if value == default or name in ("hub_token", "local_rank", "resume_from_checkpoint", "overwrite_output_dir"):
            continue
        if name == "reward_path":
            words += [word for entry in value for word in ("--reward_path", entry)]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def save_model_card(args, pipeline_class, command, repo_id, base_license, prompt, step, results):
    """Write README.md into the output folder: what the adapter is, how to use it, and the scores if there are any."""
    local = os.path.isdir(args.pretrained_model_name_or_path)
    # Of SDXL's script alone.
    vae = getattr(args, "pretrained_vae_model_name_or_path", None)
    family = "stable-diffusion" if pipeline_class is StableDiffusionPipeline else "stable-diffusion-xl"
    data = ModelCardData(
        base_model=None if local else args.pretrained_model_name_or_path,
        library_name="diffusers",
        license=base_license,
        tags=[family, f"{family}-diffusers", "text-to-image", "diffusers", "lora", "rlr"],
        inference=True,
    )
    source = repo_id or args.output_dir
    scheduler_class, settings = SCHEDULERS[args.scheduler]
    scheduler = scheduler_class.__name__
    settings = "".join(f", {name}={value!r}" for name, value in settings.items())
    loaded = repr(args.pretrained_model_name_or_path)
    if vae is not None:
        loaded += f", vae=AutoencoderKL.from_pretrained({vae!r})"
    negative = "" if args.negative_prompt is None else f", negative_prompt={args.negative_prompt!r}"
    text = f"""
# LoRA fine-tuned with RLR - {source}

LoRA weights for `{args.pretrained_model_name_or_path}`, trained to raise the reward `{args.reward}` with the
`{args.gradient_estimator}` estimator of RLR (https://huggingface.co/papers/2502.00639); {step} optimizer steps.

```py
from diffusers import {"" if vae is None else "AutoencoderKL, "}{scheduler}, {pipeline_class.__name__}

pipeline = {pipeline_class.__name__}.from_pretrained({loaded})
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config{settings})
pipeline.load_lora_weights({source!r}, weight_name={LORA_FILE!r})
image = pipeline(
    {prompt!r}{negative}, height={args.height}, width={args.width},
    num_inference_steps={args.num_inference_steps}, guidance_scale={args.guidance_scale}, eta={args.eta}
).images[0]
```
"""
    if levels_of(args, [prompt]) is not None:
        text += f"""
It was trained, and its pictures below are drawn, with a coarse, a middle and a fine prompt one after the other, which
change after {args.dcot_boundaries[0]} and {args.dcot_boundaries[1]} of the steps.
"""
    if results is not None:
        rows = {args.reward: results, **(results["members"] if len(results["members"]) > 1 else {})}
        text += "\n| reward | base | tuned |\n|---|---|---|\n"
        for name, row in rows.items():
            cells = (f"{row[model]['mean']:.4f} (deviation {row[model]['std']:.4f})" for model in ("base", "tuned"))
            text += f"| `{name}` | {' | '.join(cells)} |\n"
        text += f"""
Over {results["num_images"]} pictures of fixed seeds; the gain is {results["gain"]["mean"]:+.4f} with a standard error of
{results["gain"]["standard_error"]:.4f}. Some of them, base above tuned:

![base above tuned](./before_after.png)
"""
    text += f"""
## How it was trained

![reward by optimizer step](./reward_curve.png)

```bash
{command}
```

Seed {args.seed}; {", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate", "peft"))}. Every step's figures are in `metrics.jsonl`, all arguments in `training_args.json`.
"""
    if base_license is None:
        text += (
            "\nThe licence of the base model, which applies to what is derived from it, is not known to this card.\n"
        )
    else:
        text += f"\nThe licence is the base model's: {base_license}.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(os.path.join(args.output_dir, "README.md"))


def push(args, repo_id, message):
    """Upload the output folder.

    Raises:
        ValueError: one line with the command that does it later, whatever has gone wrong.
    """
    ignored = ["checkpoint-*", "partial-*"]
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message=message,
            ignore_patterns=ignored,
            token=args.hub_token,
        )
    except Exception as error:  # the client lets the errors of its HTTP library through
        excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in ignored)
        raise ValueError(
            f"--push_to_hub: the upload to {repo_id!r} has failed ({first_line(error)}); everything is in"
            f" {args.output_dir!r}, to push it later: hf upload {repo_id} {shlex.quote(args.output_dir)} . {excluded}"
        ) from error


@torch.no_grad()
def generate(pipeline, prompts, args, desc=None, first_seed=EVALUATION_SEED):
    """One picture per prompt, from one seed after the other: (N, 3, H, W) in [0, 1] on the CPU."""
    images = []
    for start in tqdm(range(0, len(prompts), args.train_batch_size), desc=desc, disable=desc is None):
        batch = prompts[start : start + args.train_batch_size]
        # Generators of the CPU, so that a seed is the same picture on every device.
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))]
        # The text encoders rest on the CPU in training. Decoded is by hand: in mixed precision the U-Net under training
        # hands on float32 to a VAE in half precision.
        with offload_models(*text_encoders_of(pipeline), device=pipeline.unet.device):
            levels, prompts_of_first_step, thought = levels_of(args, batch), batch, {}
            if levels is not None:
                callback = ChainOfThought(pipeline, *levels, args.num_inference_steps, args.dcot_boundaries)
                prompts_of_first_step = callback.first
                thought = {"callback_on_step_end": callback, **callback.inputs}
            latents = pipeline(
                prompts_of_first_step,
                height=args.height,
                width=args.width,
                negative_prompt=None if args.negative_prompt is None else [args.negative_prompt] * len(batch),
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                eta=args.eta,
                generator=generators,
                output_type="latent",
                **thought,
            ).images
        images += [decode_latents(pipeline.vae, part).cpu() for part in latents.split(args.decode_batch_size)]
    return torch.cat(images)


def log_validation(pipeline, args, accelerator, step):
    """Pictures of the validation prompts to every tracker, from the same seeds each time."""
    logger.info(f"Running validation: {args.num_validation_images} pictures of each validation prompt")
    prompts = [prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)]
    images = generate(pipeline, prompts, args).permute(0, 2, 3, 1).numpy()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", images, step, dataformats="NHWC")
        if tracker.name == "wandb":
            pictures = [wandb.Image(image, caption=prompt) for image, prompt in zip(images, prompts)]
            tracker.log({"validation": pictures}, step=step)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose error is the error alone, not the usage of every flag before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(script, family):
    """The parser of a training script for a family of models, which may add to it and set other defaults."""
    parser = OneLineParser(prog=script, description=f"Fine-tune a LoRA of {family} on a reward with RLR.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=str,
        default="CompVis/stable-diffusion-v1-4",
        help=f"Path to a {family} pipeline or its name on huggingface.co/models.",
    )
    model.add_argument("--revision", type=str, default=None, help="Revision of the model to take from the Hub.")
    model.add_argument("--variant", type=str, default=None, help="Variant of the model files, such as fp16.")
    model.add_argument(
        "--cache_dir", type=str, default=None, help="Where the downloaded pipeline and datasets are kept."
    )
    model.add_argument(
        "--adapter_path",
        type=str,
        default=None,
        help="Go on from this LoRA (folder, file or Hub name), whose rank, scale and layers then stand.",
    )
    model.add_argument("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    model.add_argument("--lora_alpha", type=int, default=None, help="Scale of the LoRA update; default: the rank.")
    model.add_argument(
        "--lora_layers",
        type=str,
        default="to_k,to_q,to_v,to_out.0",
        help="Comma-separated names of the U-Net layers that get a LoRA.",
    )
    model.add_argument("--use_dora", action="store_true", help="Train a DoRA (huggingface.co/papers/2402.09353).")

    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--reward",
        type=str,
        default="aesthetic",
        help="A reward, or a weighted sum such as hpsv2:15,aesthetic:1. NAME@REVISION takes that revision of its Hub"
        " repository; a reward of your own is package.module:callable or path/to/file.py:callable, and may have a"
        " :WEIGHT too. `python -m reward_models --help` lists those there are.",
    )
    reward.add_argument(
        "--reward_path",
        type=str,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="Local folder of a reward's model instead of the Hub's; may be repeated.",
    )
    reward.add_argument(
        "--reward_offload",
        action="store_true",
        help="Keep the reward models on the CPU and move them to the device for scoring only.",
    )
    reward.add_argument(
        "--reward_batch_size",
        type=int,
        default=None,
        help="Pictures that a reward sees at a time, gradient included; memory, not result. Default: as many as are"
        " decoded at a time.",
    )

    estimator = parser.add_argument_group("gradient estimator")
    estimator.add_argument("--gradient_estimator", type=str, default="rlr", help=f"One of {', '.join(ESTIMATORS)}.")
    estimator.add_argument(
        "--mixing",
        type=str,
        default="auto",
        help="For rlr: the share gamma of the pathwise cotangent at the steps k >= 2, a number in [0, 1], or auto for"
        " those of least variance.",
    )
    estimator.add_argument("--truncation_steps", type=int, default=1, help="For truncated_bp: the last K steps.")
    estimator.add_argument("--lv_samples", type=int, default=2, help="For draft_lv: re-noisings of each picture.")
    estimator.add_argument(
        "--subchain_length",
        type=str,
        default="2",
        help="For rlr_paper: steps h of the half-order sub-chain, 0 for none, or auto for the paper's equation 8.",
    )
    estimator.add_argument(
        "--subchain_range",
        type=int,
        nargs=2,
        default=None,
        metavar=("A", "B"),
        help="For rlr_paper: the sub-chain starts at a step from A to B, counted from the last; default: anywhere.",
    )
    estimator.add_argument(
        "--subchain_sampling",
        type=str,
        default="uniform",
        choices=["uniform", "grad_norm"],
        help="For rlr_paper: how the start is drawn; grad_norm by the softmax of the steps' running gradient norms.",
    )
    estimator.add_argument(
        "--rest",
        type=str,
        default="zeroth_order",
        choices=["zeroth_order", "likelihood_ratio", "none"],
        help="For rlr_paper: what the steps outside of the last one and the sub-chain take; none is biased.",
    )
    estimator.add_argument(
        "--zo_scale", type=float, default=0.02, help="For rlr_paper: deviation of the weight perturbations."
    )
    estimator.add_argument(
        "--memory_budget_gb", type=float, default=24.0, help="For --subchain_length auto: the memory to spend."
    )
    estimator.add_argument(
        "--half_order_gb",
        type=float,
        default=8.0,
        help="For auto: memory of a half-order step; the paper's on SD 1.4.",
    )
    estimator.add_argument(
        "--zeroth_order_gb", type=float, default=0.24, help="For auto: memory of a zeroth-order step; likewise."
    )
    estimator.add_argument(
        "--branches",
        type=int,
        default=0,
        help="For rlr with a black-box reward: compare this many pairs of branches at one random step of each picture"
        " instead of sweeping all steps; 0 for the sweep.",
    )
    estimator.add_argument(
        "--baseline",
        type=str,
        default="auto",
        choices=["auto", "none", "leave_one_out", "per_prompt", "predicted_x0"],
        help="What a picture's reward is compared with: nothing, all other pictures of the optimizer step, those of the"
        " same prompt, or the reward of the picture predicted at each step, which costs a decoding and a scoring. auto:"
        " predicted_x0 at those steps of rlr at which it matters (all with a black-box reward, none with a smooth one),"
        " and leave_one_out.",
    )
    estimator.add_argument(
        "--baseline_vae",
        type=str,
        default=None,
        help="For auto and predicted_x0: an AutoencoderTiny (path or Hub name, such as madebyollin/taesd, taesdxl for SDXL) that"
        " decodes the predictions; default: the pipeline's own decoder.",
    )
    estimator.add_argument(
        "--baseline_steps",
        type=int,
        default=None,
        help="For auto and predicted_x0: predict at the last so many steps at most, leave-one-out before; default: all.",
    )
    estimator.add_argument(
        "--sweep_fraction",
        type=str,
        default="auto",
        help="The share of the steps that are swept, but for the last three: drawn anew for each batch and weighted by its"
        " inverse, while cotangents pass the others as they do in the mean: unbiased, cheaper, noisier."
        " auto: .5 for rlr where all of the reward has a gradient and the likelihood ratio next to no share, else 1.",
    )
    estimator.add_argument("--ppo_clip_range", type=float, default=0.2, help="For ddpo: clipping of the ratio.")
    estimator.add_argument(
        "--num_inner_epochs",
        type=int,
        default=1,
        help="For ddpo: optimizer updates on each batch of pictures; more than one needs --mixed_precision no.",
    )

    hacking = parser.add_argument_group("protection from reward hacking")
    hacking.add_argument(
        "--kl_weight",
        type=float,
        default=0.0,
        help="Reward per nat that a step's divergence from the base model costs; one more U-Net call per step, and where"
        " a pathwise cotangent passes one more backward pass.",
    )
    hacking.add_argument(
        "--ema_decay",
        type=float,
        default=None,
        help="Keep a moving average of the adapter in ema/ too, and look at that in validation and on held-out rewards.",
    )
    hacking.add_argument(
        "--heldout_reward",
        type=str,
        default=None,
        help="A reward, or a sum, that is not trained on; scored on pictures of fixed seeds, with their diversity and"
        " drift from the base model.",
    )
    hacking.add_argument(
        "--heldout_steps", type=int, default=50, help="Score the held-out reward every so many steps."
    )
    hacking.add_argument(
        "--num_heldout_images", type=int, default=32, help="Pictures for the held-out reward, four of each prompt."
    )
    hacking.add_argument(
        "--early_stop_patience",
        type=int,
        default=None,
        help="Stop when the held-out reward has not risen for so many scorings; the best adapter is kept in best/.",
    )
    hacking.add_argument(
        "--feature_model",
        type=str,
        default=None,
        metavar="DIR",
        help="Folder of the CLIPModel for diversity and drift instead of the Hub's ViT-L/14.",
    )

    data = parser.add_argument_group("prompts and pictures")
    data.add_argument(
        "--prompts",
        type=str,
        default=None,
        help="simple_animals (default), activities, a text file with one prompt a line, or a JSONL file with a field"
        ' "prompt", and for a chain of thought "coarse", "mid" and "fine". "a {red|blue} cat" stands for two prompts.',
    )
    data.add_argument(
        "--dataset_name", type=str, default=None, help="Take the prompts from this dataset, folder or file."
    )
    data.add_argument("--dataset_config_name", type=str, default=None, help="Configuration of the dataset.")
    data.add_argument("--dataset_split", type=str, default="train", help="Split of the dataset.")
    data.add_argument(
        "--dataset_streaming", action="store_true", help="Read the captions without downloading the dataset."
    )
    data.add_argument("--caption_column", type=str, default="text", help="Column of the dataset with the prompts.")
    data.add_argument("--max_prompts", type=int, default=None, help="Take the first so many prompts only.")
    data.add_argument(
        "--dcot_boundaries",
        type=float,
        nargs=2,
        default=list(BOUNDARIES),
        metavar=("A", "B"),
        help="Shares of the chain after which mid follows coarse, and fine follows mid.",
    )
    data.add_argument(
        "--images_per_prompt",
        type=int,
        default=1,
        help="How often a prompt comes in a row, for --baseline per_prompt.",
    )
    data.add_argument(
        "--resolution", type=int, default=None, help="Side of the pictures in pixels; default: the model's own."
    )
    data.add_argument("--height", type=int, default=None, help="Height in pixels, instead of --resolution.")
    data.add_argument("--width", type=int, default=None, help="Width in pixels, instead of --resolution.")
    data.add_argument(
        "--scheduler",
        type=str,
        default="ddim",
        choices=SCHEDULERS,
        help="Sampler of the chain, whose configuration is the model's: dpm_sde is the SDE form of DPM-Solver++ of first"
        " order. All but ddim end without noise, for which rlr needs a reward with a gradient.",
    )
    data.add_argument("--num_inference_steps", type=int, default=50, help="Steps T of the denoising chain.")
    data.add_argument("--guidance_scale", type=float, default=5.0, help="Classifier-free guidance; off at 1.")
    data.add_argument("--negative_prompt", type=str, default=None, help="Negative prompt of all pictures.")
    data.add_argument("--eta", type=float, default=1.0, help="Noise of --scheduler ddim, from 0 (none) to 1 (DDPM).")
    data.add_argument(
        "--decode_batch_size", type=int, default=1, help="Pictures decoded and scored at a time; memory, not result."
    )
    data.add_argument("--validation_prompts", type=str, nargs="+", default=None, help="Prompts of the validation.")
    data.add_argument("--num_validation_images", type=int, default=4, help="Pictures per validation prompt.")
    data.add_argument("--validation_steps", type=int, default=100, help="Validate every so many steps.")
    data.add_argument(
        "--num_eval_images",
        type=int,
        default=64,
        help="Pictures of fixed seeds on which base and tuned model are compared at the end; 0 for no comparison.",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", type=str, default="rlr-sd-lora", help="Where everything is written.")
    training.add_argument("--seed", type=int, default=None, help="Seed of everything that is random.")
    training.add_argument("--train_batch_size", type=int, default=4, help="Pictures per forward pass and device.")
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Batches per optimizer step; memory, not quality."
    )
    training.add_argument("--num_train_epochs", type=int, default=100, help="Passes over the prompts.")
    training.add_argument(
        "--max_train_steps", type=int, default=None, help="Optimizer steps; overrides num_train_epochs."
    )
    training.add_argument(
        "--preset_low_memory",
        action="store_true",
        help="For small cards; sets, unless they are given too: "
        + " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in LOW_MEMORY.items())
        + ".",
    )
    training.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="For the U-Net: less memory from a batch of 2 on, a sweep slower by a third. The decoder, which takes the most"
        " at a batch of 1 with --reward_offload, is always checkpointed.",
    )
    training.add_argument(
        "--keep_graphs",
        type=int,
        default=0,
        help="Keep the U-Net's graphs of the last so many denoising steps for the sweep instead of computing them again:"
        " less time, for the memory of as many more steps of all pictures of an optimizer step on a device.",
    )
    training.add_argument(
        "--compile",
        action="store_true",
        help="Compile the U-Net with torch.compile, for the rollout and for the sweep.",
    )
    training.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    training.add_argument(
        "--scale_lr", action="store_true", help="Multiply the learning rate by the pictures per optimizer step."
    )
    training.add_argument("--lr_scheduler", type=str, default="constant", choices=LR_SCHEDULERS, help="Schedule.")
    training.add_argument("--lr_warmup_steps", type=int, default=0, help="Warm-up steps of the schedule.")
    training.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit states.")
    training.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW beta1.")
    training.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW beta2.")
    training.add_argument("--adam_weight_decay", type=float, default=1e-2, help="AdamW weight decay.")
    training.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW epsilon.")
    training.add_argument(
        "--max_grad_norm",
        type=str,
        default="auto",
        help="Gradients are clipped to this norm, or with auto to the 10th percentile of the norms of this run so far and divided"
        " by it, whatever the reward's unit is.",
    )
    training.add_argument(
        "--mixed_precision", type=str, default=None, choices=["no", "fp16", "bf16"], help="Default: accelerate's."
    )
    training.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    training.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention."
    )
    training.add_argument("--local_rank", type=int, default=-1, help="Set by the launcher.")

    saving = parser.add_argument_group("checkpoints, trackers, Hub")
    saving.add_argument("--checkpointing_steps", type=int, default=500, help="Save the state every so many steps.")
    saving.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Remove what an earlier run has left in the output folder, its checkpoints too, and start afresh.",
    )
    saving.add_argument("--checkpoints_total_limit", type=int, default=None, help="Keep at most so many.")
    saving.add_argument(
        "--resume_from_checkpoint",
        type=str,
        default=None,
        help="A checkpoint-N of the output folder, the path of one, or latest, which starts afresh if there is none.",
    )
    saving.add_argument("--logging_dir", type=str, default="logs", help="Folder of the trackers in the output folder.")
    saving.add_argument(
        "--report_to",
        type=str,
        default="tensorboard",
        choices=["tensorboard", "wandb", "comet_ml", "all", "none"],
        help="Where the metrics go besides metrics.jsonl.",
    )
    saving.add_argument("--push_to_hub", action="store_true", help="Upload the result to the Hub.")
    saving.add_argument(
        "--push_every", type=int, default=None, help="Upload the adapter every so many steps too, with --push_to_hub."
    )
    saving.add_argument(
        "--hub_token",
        type=str,
        default=None,
        help="Token for the upload. Launchers print the command of a run that fails: better is `hf auth login` or the"
        " environment variable HF_TOKEN.",
    )
    saving.add_argument(
        "--hub_model_id", type=str, default=None, help="Repository; default: the output folder's name."
    )

    return parser


def parse_args(input_args=None):
    return parse_and_check(make_parser("train_rlr_sd.py", "Stable Diffusion"), input_args)


def parse_and_check(parser, input_args):
    """The arguments with what --preset_low_memory and the launcher say; what is wrong with them ends the program."""
    args = parser.parse_args(input_args)
    if args.preset_low_memory:
        parser.set_defaults(**LOW_MEMORY)
        args = parser.parse_args(input_args)
    del args.preset_low_memory  # the run is what it stands for
    shape = [
        name
        for name in ("rank", "lora_alpha", "lora_layers", "use_dora")
        if getattr(args, name) != parser.get_default(name)
    ]
    if args.adapter_path is not None and shape:
        parser.error(f"--{shape[0]} is for a new adapter, and --adapter_path {args.adapter_path!r} has its own")
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def number_or_auto(name, text, fits, kind):
    """The value of a flag that takes either.

    Args:
        fits: whether a number will do.
        kind: what one that does is called.

    Raises:
        ValueError: if it is neither.
    """
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise ValueError(f"--{name} {text!r} is neither auto nor {kind}")
    return value


def check_args(args):
    """Everything about the arguments that can be known without loading a model; turns --mixing, --max_grad_norm and
    --sweep_fraction into their values.

    Raises:
        ValueError: one line that names the argument and what it should be.
    """
    for name in (
        *("train_batch_size", "gradient_accumulation_steps", "num_inference_steps", "num_train_epochs", "rank"),
        *("max_train_steps", "resolution", "height", "width", "decode_batch_size", "num_inner_epochs", "max_prompts"),
        *("truncation_steps", "checkpoints_total_limit", "validation_steps", "num_validation_images", "lora_alpha"),
        *("lv_samples", "baseline_steps", "images_per_prompt", "reward_batch_size", "push_every", "heldout_steps"),
        *("checkpointing_steps", "early_stop_patience"),
    ):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} must be at least 1")
    for name in (
        *("num_eval_images", "lr_warmup_steps", "guidance_scale", "branches", "adam_weight_decay", "kl_weight"),
        "keep_graphs",
    ):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)} must be a number that is not negative")
    for name in ("learning_rate", "ppo_clip_range", "zo_scale", "memory_budget_gb", "adam_epsilon"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise ValueError(f"--{name} {getattr(args, name)} must be a positive number")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be in [0, 1)")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must be in 0..2^32 - 1")
    if args.num_eval_images == 1:
        raise ValueError("--num_eval_images 1 has no standard deviation: use 0 or at least 2")
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta {args.eta} must be in [0, 1]")
    if args.eta < 1 and args.scheduler != "ddim":
        raise ValueError(f"--eta {args.eta} is of --scheduler ddim, and {args.scheduler} has a noise of its own")

    if args.gradient_estimator not in ESTIMATORS:
        raise ValueError(
            f"unknown --gradient_estimator {args.gradient_estimator!r}, known are: {', '.join(ESTIMATORS)}"
        )
    if args.eta == 0 and args.gradient_estimator in NEED_NOISE:
        raise ValueError(f"--eta 0 leaves no noise in the chain, which {args.gradient_estimator} needs: use --eta 1")
    if args.gradient_estimator == "truncated_bp" and args.truncation_steps > args.num_inference_steps:
        raise ValueError(
            f"--truncation_steps {args.truncation_steps} is more than --num_inference_steps {args.num_inference_steps}"
        )
    if args.num_inner_epochs > 1 and args.gradient_estimator != "ddpo":
        raise ValueError(f"--num_inner_epochs {args.num_inner_epochs} needs --gradient_estimator ddpo")
    for name, fits, kind in (
        ("mixing", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
        ("sweep_fraction", lambda value: 0 < value <= 1, "a number in (0, 1]"),
        ("max_grad_norm", lambda value: 0 < value < math.inf, "a positive number"),
    ):
        setattr(args, name, number_or_auto(name, getattr(args, name), fits, kind))

    if args.subchain_length == "auto":
        if not args.half_order_gb > args.zeroth_order_gb > 0:
            raise ValueError(
                f"--half_order_gb {args.half_order_gb} must be more than --zeroth_order_gb {args.zeroth_order_gb}, and"
                " that more than 0"
            )
        args.subchain_length = subchain_length(
            args.num_inference_steps, args.memory_budget_gb, args.half_order_gb, args.zeroth_order_gb
        )
    elif args.subchain_length.isdecimal():
        args.subchain_length = int(args.subchain_length)
    else:
        raise ValueError(f"--subchain_length {args.subchain_length!r} is neither auto nor a number of steps")
    if args.branches and args.gradient_estimator != "rlr":
        raise ValueError(f"--branches {args.branches} needs --gradient_estimator rlr, not {args.gradient_estimator}")
    if args.keep_graphs and (
        args.branches
        or args.gradient_estimator == "draft_lv"
        or (args.gradient_estimator == "rlr_paper" and args.rest == "zeroth_order")
    ):
        raise ValueError(
            f"--keep_graphs {args.keep_graphs} needs a sweep of the rollout's own graphs, which draft_lv, --branches and the"
            " perturbed weights of --rest zeroth_order have not"
        )
    if args.baseline_vae is not None and args.baseline not in ("auto", "predicted_x0"):
        raise ValueError(f"--baseline_vae {args.baseline_vae!r} needs --baseline auto or predicted_x0")

    if args.sweep_fraction not in ("auto", 1):
        flag = f"--sweep_fraction {args.sweep_fraction}"
        if args.gradient_estimator == "draft_lv" or args.branches:
            raise ValueError(f"{flag} needs an estimator that sweeps the chain of the rollout")
        if args.num_inner_epochs > 1:
            # In a later epoch the parameters have learned from the very steps that were drawn.
            raise ValueError(f"{flag} is biased with --num_inner_epochs {args.num_inner_epochs}: use 1")
    if args.kl_weight > 0 and (args.gradient_estimator == "draft_lv" or args.branches):
        raise ValueError(f"--kl_weight {args.kl_weight} needs an estimator that sweeps the chain of the rollout")
    if args.kl_weight > 0 and args.eta == 0:
        raise ValueError(
            f"--eta 0 leaves no noise in the chain, which --kl_weight {args.kl_weight} needs: use --eta 1"
        )
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise ValueError(f"--ema_decay {args.ema_decay} must be in (0, 1)")
    if args.early_stop_patience is not None and args.heldout_reward is None:
        raise ValueError(f"--early_stop_patience {args.early_stop_patience} needs --heldout_reward")
    if args.num_heldout_images < 4 or args.num_heldout_images % 4:
        raise ValueError(f"--num_heldout_images {args.num_heldout_images} must be a multiple of 4")

    parse_reward(args.reward)
    if args.heldout_reward is not None:
        parse_reward(args.heldout_reward)
    parse_reward_paths(args.reward_path)
    if args.reward_batch_size is None:
        args.reward_batch_size = args.decode_batch_size
    if args.reward_batch_size > args.decode_batch_size:
        raise ValueError(
            f"--reward_batch_size {args.reward_batch_size} is more than there are at a time: raise --decode_batch_size"
            f" {args.decode_batch_size} with it"
        )
    if args.prompts is not None and args.dataset_name is not None:
        raise ValueError(f"--prompts {args.prompts!r} and --dataset_name {args.dataset_name!r}: give one of them")
    levels_of_steps(args.num_inference_steps, args.dcot_boundaries)
    if args.report_to not in ("tensorboard", "none") and args.hub_token is not None:
        raise ValueError(
            f"--report_to {args.report_to} with --hub_token would log the token: log in with `hf auth login` instead"
        )
    if args.push_every is not None and not args.push_to_hub:
        raise ValueError(f"--push_every {args.push_every} needs --push_to_hub")
    if args.overwrite_output_dir and args.resume_from_checkpoint is not None:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint: give one of them")
    if args.report_to == "wandb" and not is_wandb_available():
        raise ValueError("--report_to wandb: wandb is not installed")


def load_training_prompts(args):
    """The prompts of --prompts or of the dataset's caption column.

    Raises:
        ValueError: for a missing or empty file, for a dataset that cannot be loaded, and for a missing column.
    """
    if args.dataset_name is None:
        prompts = load_prompts("simple_animals" if args.prompts is None else args.prompts)
        return prompts[: args.max_prompts]
    name, options = args.dataset_name, {"split": args.dataset_split, "streaming": args.dataset_streaming}
    try:
        options["cache_dir"] = args.cache_dir
        if os.path.isfile(name):
            kind = DATASET_FILES.get(os.path.splitext(name)[1])
            if kind is None:
                raise ValueError(f"a file of this kind cannot be read, only {', '.join(DATASET_FILES)}")
            dataset = load_dataset(kind, data_files=name, **options)
        else:
            dataset = load_dataset(name, args.dataset_config_name, **options)
        # A stream may not know its columns before it has begun.
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if args.caption_column not in columns:
            raise ValueError(f"no --caption_column {args.caption_column!r} in it, only {', '.join(columns)}")
        # Nothing else is read, or every picture of the dataset would be.
        rows = itertools.islice(dataset.select_columns(args.caption_column), args.max_prompts)
        captions = [row[args.caption_column] for row in rows]
        # Where a picture has several captions, the first.
        captions = [caption[0] if isinstance(caption, list) and caption else caption for caption in captions]
        return unique_prompts(caption for caption in captions if isinstance(caption, str))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--dataset_name {name!r}: {first_line(error.__cause__ or error)}") from error


def levels_of(args, prompts):
    """For each of the three levels of --prompts' chain of thought the prompts of it, or `None` where they have none.

    Raises:
        ValueError: as `load_levels` does.
    """
    levels = {} if args.prompts is None else load_levels(args.prompts)
    if not any(prompt in levels for prompt in prompts):
        return None
    # What has no levels is its own.
    return [list(level) for level in zip(*(levels.get(prompt, (prompt,) * 3) for prompt in prompts))]


def warn_of_long_prompts(args, prompts, tokenizer):
    """Say how many prompts are longer than the text encoder reads, and what it does not see of the first of them."""
    levels = levels_of(args, prompts)
    if levels is not None:
        prompts = list(dict.fromkeys(itertools.chain(*levels)))
    limit = tokenizer.model_max_length
    long = [
        (prompt, ids) for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids) if len(ids) > limit
    ]
    if long:
        prompt, ids = long[0]
        logger.warning(
            f"{len(long)} of {len(prompts)} prompts are longer than the {limit} tokens that the text encoder reads: of"
            f" {prompt!r} it does not see {tokenizer.decode(ids[limit - 1 : -1]).strip()!r}"
        )


def load_pipeline(args, dtype, pipeline_class=StableDiffusionPipeline, **components):
    """The pipeline to train, with a scheduler of --scheduler made from its own.

    Args:
        dtype: or {component or "default": dtype}.
        components: what the pipeline is to have instead of what its folder or repository has.

    Raises:
        ValueError: if the path or name does not lead to a pipeline of this class.
    """
    if pipeline_class is StableDiffusionPipeline:
        components = {"safety_checker": None, "requires_safety_checker": False, **components}
    name = args.pretrained_model_name_or_path
    try:
        pipeline = pipeline_class.from_pretrained(
            name, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir, dtype=dtype, **components
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--pretrained_model_name_or_path {name!r} cannot be loaded: {error}") from error
    # Either class loads the other's models, and the U-Net would fail at its first call.
    is_xl = pipeline.unet.config.addition_embed_type == "text_time"
    if is_xl != ("text_encoder_2" in pipeline.components):
        kind, script = ("an SDXL", "train_rlr_sdxl.py") if is_xl else ("a Stable Diffusion", "train_rlr_sd.py")
        raise ValueError(f"--pretrained_model_name_or_path {name!r} is {kind} model: use {script}")
    pipeline.scheduler = make_scheduler(args.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    # The order that convolutions are fastest in on a CPU; on a GPU it has not been compared.
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)
    for module in (pipeline.unet, pipeline.vae, *text_encoders_of(pipeline)):
        module.requires_grad_(False)
    return pipeline


def set_size(args, pipeline):
    """Height and width where they are not given: --resolution, or else the model's own.

    Raises:
        ValueError: if the model cannot draw pictures of that size.
    """
    args.resolution = args.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    args.height, args.width = args.height or args.resolution, args.width or args.resolution
    multiple = math.lcm(8, pipeline.vae_scale_factor)
    if args.height % multiple or args.width % multiple:
        raise ValueError(f"pictures of {args.height} x {args.width} pixels: no multiples of {multiple}")


def checkpoints_of(output_dir):
    """The whole checkpoints of an output folder as {step: path}, in order."""
    if not os.path.isdir(output_dir):
        return {}
    found = {
        int(m.group(1)): m.group(0)
        for m in (re.fullmatch(r"checkpoint-(\d+)", f) for f in os.listdir(output_dir))
        if m
    }
    paths = {step: os.path.join(output_dir, found[step]) for step in sorted(found)}
    return {step: path for step, path in paths.items() if os.path.isfile(os.path.join(path, STATE_FILE))}


def incomplete_in(output_dir):
    """Names in an output folder of what a killed run has not finished saving."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    whole = {os.path.basename(path) for path in checkpoints_of(output_dir).values()}
    return sorted(name for name in names if re.fullmatch(r"(checkpoint|partial)-\d+", name) and name not in whole)


def resume_point(args):
    """(path, step) of the checkpoint to go on from, or (None, 0).

    Raises:
        ValueError: if it does not exist, lies beyond --max_train_steps, or a newer one would get in the way.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None, 0
    there = checkpoints_of(args.output_dir)
    if wanted == "latest":
        for name in incomplete_in(args.output_dir):
            logger.warning(f"--resume_from_checkpoint latest: {name!r} is not whole and is left out")
        if not there:
            logger.warning(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir!r}, starting afresh")
            return None, 0
        wanted = there[max(there)]
    folder, name = os.path.split(os.path.normpath(wanted))
    elsewhere = checkpoints_of(folder) if folder else {}
    found = [(path, step) for step, path in [*there.items(), *elsewhere.items()] if os.path.basename(path) == name]
    if not found:
        names = ", ".join(os.path.basename(path) for path in there.values()) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint!r} does not exist; whole checkpoints in"
            f" {args.output_dir!r}: {names}"
        )
    # A name alone means this folder, a path the folder it names.
    path, step = found[-1]
    if args.max_train_steps < step:
        raise ValueError(f"--max_train_steps {args.max_train_steps} ends before {path!r}")
    if there and max(there) > step:
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint!r}: {there[max(there)]!r} is newer, move it away to"
            " go on from the older one"
        )
    return path, step


def check_output_dir(args, resume_path):
    """Refuse to write over what another run, or somebody, has left in the output folder.

    Raises:
        ValueError: if the folder cannot be written to, holds a run that this one neither resumes nor overwrites, or a
            README.md or checkpoint that no run of this script has written.
    """
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir!r} is a file")
    if os.path.exists(args.output_dir) and not os.access(args.output_dir, os.W_OK):
        raise ValueError(f"--output_dir {args.output_dir!r} cannot be written to")
    has_adapter = os.path.exists(os.path.join(args.output_dir, LORA_FILE))
    has_metrics = os.path.exists(os.path.join(args.output_dir, "metrics.jsonl"))
    holds_run = checkpoints_of(args.output_dir) or has_adapter or has_metrics
    if resume_path is None:
        # A run that was killed before its first checkpoint has nothing to go on from, and nothing to lose.
        resumed = args.resume_from_checkpoint == "latest" and not has_adapter
    else:
        resumed = os.path.abspath(os.path.dirname(resume_path)) == os.path.abspath(args.output_dir)
    for name in ("README.md", *incomplete_in(args.output_dir)):
        if os.path.exists(os.path.join(args.output_dir, name)) and not holds_run:
            raise ValueError(
                f"--output_dir {args.output_dir!r} holds {name!r}, which is of no run of this script and would be replaced:"
                " name another folder"
            )
    if holds_run and not (resumed or args.overwrite_output_dir):
        remedies = "name another folder"
        if checkpoints_of(args.output_dir):
            remedies += ", continue it with --resume_from_checkpoint latest"
        elif has_adapter:
            remedies += ", train its adapter on in another folder with --adapter_path"
        raise ValueError(
            f"--output_dir {args.output_dir!r} already holds a run: {remedies}, or start afresh with --overwrite_output_dir"
        )


def clear_run(args, tracker):
    """Remove what an earlier run has left in the output folder; what is not a run's stays."""
    incomplete = [os.path.join(args.output_dir, name) for name in incomplete_in(args.output_dir)]
    for path in [*checkpoints_of(args.output_dir).values(), *incomplete]:
        shutil.rmtree(path)
    logs = Path(args.output_dir, args.logging_dir, tracker).resolve()
    if Path(args.output_dir).resolve() in logs.parents:  # an absolute --logging_dir may hold other runs' as well
        shutil.rmtree(logs, ignore_errors=True)
    for name in RUN_FILES:
        if os.path.isfile(os.path.join(args.output_dir, name)):
            os.remove(os.path.join(args.output_dir, name))


def configuration(args, num_processes):
    """All that makes the run what it is, without the token, as JSON holds it."""
    config = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return json.loads(json.dumps({**config, "num_processes": num_processes}))


def stored_configuration(checkpoint):
    """The configuration of the run that has written a checkpoint.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with open(os.path.join(checkpoint, STATE_FILE), encoding="utf-8") as file:
            return json.load(file)["config"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"cannot resume from {checkpoint!r}: {STATE_FILE} holds no configuration") from error


def check_same_run(config, resume_path):
    """Refuse to go on from a checkpoint of another configuration.

    Raises:
        ValueError: naming what differs.
    """
    before = stored_configuration(resume_path)
    # Held-out pictures are of the validation prompts: of others they could not be compared with those so far.
    may_change = set(MAY_CHANGE) - ({"validation_prompts"} if config["heldout_reward"] else set())
    differing = [
        f"{name} was {before.get(name)!r} and is {config.get(name)!r}"
        for name in sorted(before.keys() | config.keys())
        if name not in may_change and before.get(name) != config.get(name)
    ]
    if differing:
        raise ValueError(f"cannot resume from {resume_path!r} with another configuration: {'; '.join(differing)}")


@contextmanager
def stopping_at_a_step(accelerator):
    """Within it, the first Ctrl-C or SIGTERM sets accelerate's trigger, on whatever rank; a later one stops at once."""
    asked = None

    def stop(number, frame):
        nonlocal asked
        if asked is None:
            asked = time.monotonic()
            accelerator.set_trigger()
        elif time.monotonic() - asked > 2:  # torchrun hands on at once what the terminal has sent to the ranks already
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def loss_scale(accelerator):
    """The factor by which cotangents are enlarged so that half precision can hold them; 1 but in fp16.

    The sweep is linear in its cotangents, and the optimizer's wrapper divides the gradients by the same factor.
    """
    if accelerator.scaler is None:
        return 1.0
    # The scaler has no scale before it has scaled something.
    return accelerator.scaler.scale(torch.ones((), device=accelerator.device)).item()


def score_latents(vae, rewards, latents, prompts, decode_batch_size, with_gradient, scale=1.0):
    """Decode latents (B, C, h, w) and score the pictures, a few at a time.

    Args:
        scale: of the cotangents while they pass through the decoder, see `loss_scale`; the result is free of it.

    Returns:
        scores: {"total", "black_box", member names...} -> (B,).
        reward_grad: (B, C, h, w), the gradient of the differentiable part with respect to the latents, or `None`.
    """
    scores, reward_grad = [], []
    for start in range(0, len(latents), decode_batch_size):
        x_0 = latents[start : start + decode_batch_size].detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            images = decode_latents(vae, x_0)
        result = rewards(images, prompts[start : start + decode_batch_size], with_gradient)
        if with_gradient:
            reward_grad += [g / scale for g in torch.autograd.grad(images, x_0, scale * result.gradient)]
        scores.append({"total": result.total, "black_box": result.black_box, **result.members})
    scores = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
    return scores, torch.cat(reward_grad) if with_gradient else None


def add_adapter(args, unet):
    """A new LoRA.

    Raises:
        ValueError: if the U-Net has none of the layers of --lora_layers.
    """
    layers = [name.strip() for name in args.lora_layers.split(",")]
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name, _ in unet.named_modules()):
            raise ValueError(f"--lora_layers {args.lora_layers!r}: the U-Net has no layer {layer!r}")
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha or args.rank,
            init_lora_weights="gaussian",
            target_modules=layers,
            use_dora=args.use_dora,
        )
    )


def adapter_file(source, cache_dir=None):
    """The name of the adapter in a folder or Hub repository of this script, which holds others in best/ and ema/ too, or
    `None` where it has another name."""
    if os.path.exists(source):
        return LORA_FILE if os.path.isfile(os.path.join(source, LORA_FILE)) else None
    try:
        hf_hub_download(source, LORA_FILE, cache_dir=cache_dir)
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:  # and the Hub cannot be asked, as who loads it will say
        pass
    return LORA_FILE


def set_adapter(unet, layers):
    """Give the adapter the weights of a state dict as diffusers saves it, in float32 whatever the U-Net is in.

    Raises:
        ValueError: if the adapter has not all of its layers.
    """
    cast_training_params(unet, dtype=torch.float32)
    layers = {key.removeprefix("unet."): value for key, value in layers.items()}
    found = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(layers), adapter_name="default")
    if found.unexpected_keys:
        raise ValueError(f"the U-Net has no layer {found.unexpected_keys[0]!r}")


def load_adapter(args, pipeline):
    """The LoRA of --adapter_path, to be trained further.

    Raises:
        ValueError: if it cannot be loaded, or is not of the U-Net alone, which is all that is trained and saved.
    """
    try:
        options = {"weight_name": adapter_file(args.adapter_path, args.cache_dir), "cache_dir": args.cache_dir}
        # With its configuration, SDXL's layers are known by the names of other trainers, too.
        layers, _ = pipeline.lora_state_dict(args.adapter_path, unet_config=pipeline.unet.config, **options)
        others = sorted(key for key in layers if not key.startswith("unet."))
        if others:
            raise ValueError(f"it holds more than layers of the U-Net, such as {others[0]!r}")
        pipeline.load_lora_weights(args.adapter_path, adapter_name="default", **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--adapter_path {args.adapter_path!r} cannot be loaded: {error}") from error
    for name, parameter in pipeline.unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    set_adapter(pipeline.unet, layers)  # again: it has been rounded to the U-Net's precision


def load_vae(args, flag, vae_class, dtype):
    """The autoencoder of `vae_class` that --{flag} names.

    Raises:
        ValueError: if it cannot be loaded, or is of another class, whose weights diffusers would leave out.
    """
    name = getattr(args, flag)
    try:
        found = vae_class.load_config(name, cache_dir=args.cache_dir).get("_class_name")
        if found != vae_class.__name__:
            raise ValueError(f"its config.json says {found}, and {vae_class.__name__} is needed")
        return vae_class.from_pretrained(name, cache_dir=args.cache_dir, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--{flag} {name!r} cannot be loaded: {error}") from error


class Estimator:
    """--gradient_estimator and --baseline, with what they remember of earlier batches.

    Attributes:
        with_gradient: whether the sweep starts from the reward's gradient at the pictures of the rollout.
        statistics: {name: what it remembers}, for the checkpoints.
    """

    def __init__(self, args, rewards):
        self.args, self.rewards = args, rewards
        # draft_lv takes its gradient at other noises of the same pictures.
        self.with_gradient = rewards.has_gradient and args.gradient_estimator not in ("ddpo", "draft_lv")
        self.adaptive = AdaptiveMixing(args.num_inference_steps)
        self.subchain = SubchainSampler(
            args.num_inference_steps,
            args.subchain_length if args.gradient_estimator == "rlr_paper" else 0,
            *(args.subchain_range or ()),
            by_gradient_norm=args.subchain_sampling == "grad_norm",
        )
        self.running = {"total": RunningReward(), "black_box": RunningReward()}
        self.predictors = {name: PredictedReward(args.num_inference_steps) for name in self.running}
        self.transport = Transport(args.num_inference_steps)
        self.statistics = {"mixing": self.adaptive, "subchain": self.subchain, "transport": self.transport}
        for name in self.running:
            self.statistics[f"running_{name}"] = self.running[name]
            self.statistics[f"predictor_{name}"] = self.predictors[name]

    def schedule(self):
        """The schedule of the next optimizer step."""
        args, has_gradient = self.args, self.rewards.has_gradient
        num_steps = args.num_inference_steps
        if args.gradient_estimator == "rlr":
            schedule = rlr(num_steps, self.adaptive if args.mixing == "auto" else args.mixing, has_gradient)
        elif args.gradient_estimator == "rlr_paper":
            schedule = rlr_paper(num_steps, self.subchain.draw(), args.subchain_length, args.rest, has_gradient)
        elif args.gradient_estimator == "truncated_bp":
            schedule = truncated_bp(num_steps, args.truncation_steps)
        else:
            simple = {"full_bp": full_bp, "draft_lv": draft_lv, "alignprop": alignprop, "ddpo": ddpo}
            schedule = simple[args.gradient_estimator](num_steps)
        fraction = args.sweep_fraction
        if fraction == "auto":
            # Where the likelihood ratio has a share, its noise is most of all noise, and fewer steps would make it more.
            gammas = [schedule.mixing[k] for k in schedule.swept[1:]]
            leans = sum(gammas) >= 0.95 * len(gammas)
            fraction = 0.5 if args.gradient_estimator == "rlr" and self.rewards.differentiable and leans else 1.0
        return schedule._replace(transport=list(self.transport.gains), fraction=fraction)

    def predicted_steps(self, schedule):
        """The steps at which the reward of the predicted picture is to be the baseline."""
        args = self.args
        steps = range(1, args.num_inference_steps + 1)[: args.baseline_steps]
        if args.baseline != "auto":
            return list(steps) if args.baseline == "predicted_x0" else []
        if args.gradient_estimator != "rlr" or args.branches:
            return []
        swept = [k for k in schedule.swept if k in steps]
        if self.rewards.differentiable:
            # Where the likelihood ratio has a share, a much less noisy one is worth its price; and in the last half of the
            # chain, where the prediction knows most of the picture, and small sigmas make for the most noise.
            swept = [k for k in swept if k <= args.num_inference_steps / 2 and 1 - schedule.mixing[k] > 0.05]
        return swept

    def check(self, schedule, chain):
        """Refuse a schedule that the chain cannot be swept by.

        Raises:
            ValueError: if there is no noise where it is needed.
        """
        args, rewards = self.args, self.rewards
        noisy = [k for k, gamma in enumerate(schedule.mixing) if k > 0 and gamma is not None and gamma < 1]
        if rewards.has_gradient and not rewards.differentiable:
            noisy.append(1)
        if args.kl_weight > 0:
            noisy += [k for k, gamma in enumerate(schedule.mixing) if k > 0 and gamma is not None]
        silent = [k for k in noisy if chain.sigma(k) == 0]
        if silent:
            raise ValueError(
                f"the model's scheduler adds no noise at step {silent[0]} from the end, where {args.gradient_estimator}"
                f" needs it for --reward {args.reward!r}{' and --kl_weight' if args.kl_weight > 0 else ''}"
            )

    def advantages(self, accelerator, batches):
        """Over the pictures of all ranks: the scores {name: (N,)}, and the `Advantages` of each of this rank's batches.
        What the baseline remembers is brought up to date after it has been used."""
        args, rank = self.args, accelerator.process_index
        scores = {name: torch.cat([batch.scores[name] for batch in batches]) for name in batches[0].scores}
        scores = accelerator.gather(scores)
        prompts = None
        if args.baseline == "per_prompt":
            prompts = gather_object([prompt for batch in batches for prompt in batch.prompts])
        # All pictures of a micro-batch share its weight perturbation, so it is compared with other micro-batches.
        means = leave_one_out(scores["total"].view(-1, args.train_batch_size).mean(1), self.running["total"].mean)
        found = {}
        for name, running in self.running.items():
            if args.baseline == "none":
                found[name] = scores[name]
            elif args.baseline == "per_prompt":
                found[name] = per_prompt(scores[name], prompts, running.mean)
            elif batches[0].predicted is not None:
                predicted = accelerator.gather(torch.cat([batch.predicted[name] for batch in batches])).T
                found[name] = self.predictors[name].advantages(scores[name], predicted, running.mean)
                self.predictors[name].update(scores[name], predicted, running.mean)
            else:
                found[name] = leave_one_out(scores[name], running.mean)
            running.update(scores[name])
        kl_weight = args.kl_weight
        if args.gradient_estimator == "ddpo":
            # In units of the rewards' deviation, as what the divergence costs then is too.
            found["total"], kl_weight = (
                normalize(value, scores["total"], self.running["total"].largest_std)
                for value in (found["total"], kl_weight)
            )
        local_images = args.train_batch_size * len(batches)
        mine = slice(rank * local_images, (rank + 1) * local_images)
        total, black_box = (found[name][..., mine].split(args.train_batch_size, -1) for name in self.running)
        means = means[rank * len(batches) :].tolist()
        return scores, [Advantages(*parts, kl_weight) for parts in zip(total, black_box, means)]

    def update(self, accelerator, swept):
        """Take in what the sweeps of an optimizer step have seen."""
        seen = [one.statistics for one in swept if one.statistics is not None]
        if seen:
            # Of each step, what those ranks have seen that have swept it.
            seen = SweepStatistics(*accelerator.gather(torch.stack(seen)).nanmean(0))
            self.adaptive.update(seen)
            self.subchain.update(seen)
            self.transport.update(seen)


def swept_steps(args, schedule):
    """How many steps of the chain are swept, in the mean."""
    if args.branches:
        return 1
    return args.lv_samples if args.gradient_estimator == "draft_lv" else schedule.expected_steps


def print_plan(accelerator, args, schedule, predicted_steps, num_prompts, trainable):
    """The arithmetic of the run as one table."""
    images_per_step = images_of_a_step(args, accelerator)
    epochs = args.max_train_steps * images_per_step / (num_prompts * args.images_per_prompt)
    num_steps, guided = args.num_inference_steps, 2 if args.guidance_scale > 1 else 1
    others = {
        "predictions": len(predicted_steps),
        "branches": 2 * args.branches,
        "other last steps": args.lv_samples if args.gradient_estimator == "draft_lv" else 0,
    }
    if args.gradient_estimator == "alignprop":
        schedule = schedule._replace(stop_after=num_steps, fraction=1.0)
    forwards, swept = num_steps, swept_steps(args, schedule)
    probabilities = schedule.probabilities
    kept = sum(p for k, p in probabilities.items() if k <= args.keep_graphs)
    if args.branches:
        forwards += args.branches * (num_steps - 1)
    if args.kl_weight > 0:
        forwards += swept
    forwards, swept = (round(guided * images_per_step * calls) for calls in (forwards - kept, swept))
    rows = {
        "model": args.pretrained_model_name_or_path,
        "reward": args.reward,
        "gradient estimator": args.gradient_estimator,
        "prompts": num_prompts,
        "images per step": f"{images_per_step} = {args.train_batch_size} batch x {args.gradient_accumulation_steps}"
        f" accumulation x {accelerator.num_processes} ranks",
        "U-Net calls per step": f"{forwards} forward + {swept} with backward"
        + (" at most" if args.gradient_estimator == "alignprop" else "")
        + (" (on average)" if args.branches or min(probabilities.values()) < 1 else "")
        + (f", the latter x {args.num_inner_epochs} inner epochs" if args.num_inner_epochs > 1 else "")
        + (", at first" if min(probabilities.values()) < 1 and args.sweep_fraction == "auto" else ""),
        "pictures scored per step": f"{images_per_step * (1 + sum(others.values()))}"
        + (f" = {images_per_step}" if any(others.values()) else "")
        + "".join(f" + {number} {what} of each" for what, number in others.items() if number),
        "steps": f"{args.max_train_steps} = {epochs:.1f} passes over the prompts",
        "trainable parameters": f"{sum(p.numel() for p in trainable):,}",
    }
    width = max(map(len, rows))
    accelerator.print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))


def plot_reward_curve(metrics_file, path):
    """Mean reward with its standard deviation by step, from metrics.jsonl."""
    with open(metrics_file, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    steps, mean, std = ([line[key] for line in lines] for key in ("step", "reward_mean", "reward_std"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(steps, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], alpha=0.2, lw=0)
    axes.plot(steps, mean)
    axes.set(xlabel="optimizer step", ylabel="reward", title="Reward of the training pictures, mean and deviation")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def literal(text):
    """A text as matplotlib shows it as it is: between two dollar signs it would set a formula, or fail to.

    Its own switch for that, parse_math, does not hold where lines are wrapped (3.11).
    """
    return text.replace("$", r"\$")


def plot_before_after(images, scores, prompts, path, columns=8):
    """Pictures {"base", "tuned"} -> (N, 3, H, W) of the same prompts and seeds, one model a row, with their rewards."""
    columns = min(columns, len(prompts))
    picks = [round(i * (len(prompts) - 1) / max(columns - 1, 1)) for i in range(columns)]
    figure = Figure(figsize=(1.5 * columns, 3.8), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for row, name in enumerate(("base", "tuned")):
        for column, pick in enumerate(picks):
            cell = axes[row][column]
            cell.imshow(images[name][pick].permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[], xlabel=f"{scores[name][pick]:.2f}")
            if row == 0:
                cell.set_title(literal(prompts[pick]), fontsize=8, wrap=True)
        axes[row][0].set_ylabel(name, fontsize=12)
    figure.suptitle("Same prompts, same seeds; the reward under each picture")
    figure.savefig(path, dpi=120)


def compare_with_base(args, rewards, prompts, pipeline):
    """Base against tuned model on fixed seeds, the adapter loaded from disk into a plain pipeline; on one process.

    Args:
        pipeline: without an adapter, on the device of the rewards.

    Returns:
        {"num_images", "base": {"mean", "std"}, "tuned": {...}, "gain": {"mean", "standard_error"}, "members": {name:
        {"base": {...}, "tuned": {...}}}}; also written to evaluation.json, with the pictures in before_after.png.
    """
    pool = args.validation_prompts or prompts
    prompts = [pool[i % len(pool)] for i in range(args.num_eval_images)]
    device = pipeline.unet.device
    images, scores, members = {}, {}, {member: {} for member in rewards.members}
    for name in ("base", "tuned"):
        if name == "tuned":
            pipeline.load_lora_weights(args.output_dir, weight_name=LORA_FILE)
        images[name] = generate(pipeline, prompts, args, desc=f"{name} pictures")
        with offload_models(*rewards.modules, device=device, offload=args.reward_offload):
            result = rewards(images[name], prompts, device=device)
        scores[name] = result.total.cpu()
        for member, values in result.members.items():
            members[member][name] = {"mean": values.mean().item(), "std": values.std().item()}
    gain = scores["tuned"] - scores["base"]
    results = {"num_images": len(prompts), "members": members}
    for name, values in scores.items():
        results[name] = {"mean": values.mean().item(), "std": values.std().item()}
    results["gain"] = {"mean": gain.mean().item(), "standard_error": gain.std().item() / len(gain) ** 0.5}
    with open(os.path.join(args.output_dir, "evaluation.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
    plot_before_after(images, scores, prompts, os.path.join(args.output_dir, "before_after.png"))
    return results


class HeldOut:
    """A reward that is not trained on, and what tells of hacking besides, on pictures of fixed seeds."""

    def __init__(self, args, rewards, heldout, features, prompts, device):
        self.args, self.rewards, self.heldout, self.features = args, rewards, heldout, features
        self.device = device
        self.modules = (*rewards.modules, *heldout.modules, features)
        pool = args.validation_prompts or prompts
        self.prompts = [pool[i // 4 % len(pool)] for i in range(args.num_heldout_images)]
        self.base_embeds = None

    def _look(self, pipeline):
        """What is known of the adapter in use, and the embeddings (N, D) of its pictures."""
        args = self.args
        try:
            images = generate(pipeline, self.prompts, args, first_seed=HELDOUT_SEED)
            with offload_models(*self.modules, device=self.device, offload=args.reward_offload):
                embeds = self.features(images, args.decode_batch_size)
                trained = self.rewards(images, self.prompts, device=self.device).total
                held = self.heldout(images, self.prompts, device=self.device).total
        except ValueError as error:
            raise RunError(f"held-out pictures: {error}") from error
        return {
            "heldout_mean": held.mean().item(),
            "heldout_std": held.std().item(),
            "heldout_trained_mean": trained.mean().item(),
            "diversity": diversity(embeds, self.prompts),
        }, embeds

    def look_at_base(self, pipeline):
        """Keep the embeddings of the base model's pictures, and say the rest."""
        pipeline.unet.disable_adapters()
        found, self.base_embeds = self._look(pipeline)
        pipeline.unet.enable_adapters()
        told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        logger.info(f"base model on {len(self.prompts)} pictures: {told}")

    def look(self, pipeline):
        """What is known of the adapter in use, {name: number}."""
        found, embeds = self._look(pipeline)
        return {**found, "drift": drift(self.base_embeds, embeds).mean().item()}


class GradientClipping:
    """What the gradient of an optimizer step is clipped to: a norm that is given, or one that is learned from the run.

    A reward has a unit of its own, and so has its gradient: no fixed norm fits an aesthetic score, a file size and a cosine.
    And gradients through a chain are heavy-tailed: a batch with a picture whose chain amplifies has several times the usual
    norm, which Adam's second moments then remember for a thousand steps. With "auto" the limit is the 10th percentile of the
    norms so far (AutoClip, huggingface.co/papers/2007.14469), but for those that are nothing beside the others: where all
    rewards of a batch are the same, as those of a rare success often are, its gradient is 0 but for rounding. The gradient
    is then divided by the limit as well, so that what is clipped has norm 1: the percentile of the first batches is one of
    themselves, and an outlier among them would else weigh in the second moments what no later batch may.
    """

    def __init__(self, max_norm):
        self.max_norm, self.norms = max_norm, []

    def factor(self, norm):
        """For a gradient of this norm, which is taken in: what it is to be multiplied by, 1 where it is 0 or not finite."""
        if self.max_norm != "auto":
            return self.max_norm / max(norm, self.max_norm)
        if not math.isfinite(norm):  # float16 has overflowed, and the step is left out
            return 1.0
        self.norms.append(norm)
        norms = torch.tensor(self.norms, dtype=torch.float64)
        norms = norms[norms > 1e-3 * max(self.norms)]
        return 1.0 / max(norm, norms.quantile(0.1).item()) if len(norms) > 0 else 1.0

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state):
        self.norms = state["norms"]


class EarlyStopping:
    """The best held-out score so far, and how long ago that was."""

    def __init__(self, patience):
        self.patience = patience
        self.best, self.best_step, self.waited = -math.inf, 0, 0

    def update(self, step, score):
        """Whether this is the best score; then why to stop, or `None`."""
        if score > self.best:
            self.best, self.best_step, self.waited = score, step, 0
            return True, None
        self.waited += 1
        if self.patience is None or self.waited < self.patience:
            return False, None
        reason = f"the held-out reward has not risen above {self.best:.4f} of step {self.best_step} in {self.waited}"
        return False, f"stopped early after step {step}: {reason} scorings; that adapter is in best/"

    def state_dict(self):
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state):
        self.best = -math.inf if state["best"] is None else state["best"]
        self.best_step, self.waited = state["best_step"], state["waited"]


def images_of_a_step(args, accelerator):
    """Pictures per optimizer step, of all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def make_accelerator(args):
    """The accelerator, and how much is logged; --mixed_precision is set to what accelerate has made of it.

    Raises:
        ValueError: if it does not see all processes, or its precision is too low to compare two means of a step.
    """
    # Without cpu=True two CPU processes under torchrun would each believe to be alone.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
        cpu=not torch.accelerator.is_available(),
        dynamo_backend="inductor" if args.compile else None,
        kwargs_handlers=[
            # The other ranks wait while the first draws pictures or talks to the Hub; theirs is ten minutes by default.
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=4)),
            # A likelihood ratio's cotangents reach 20 to 90 where they enter the U-Net: at the default of 2^16 they overflow
            # float16, and each halving would cost a step. The gradients of rewards are large enough for it at 2^10.
            GradScalerKwargs(init_scale=2.0**10),
        ],
    )
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in (datasets, transformers, diffusers):
        if accelerator.is_local_main_process:
            library.utils.logging.set_verbosity_warning()
        else:
            library.utils.logging.set_verbosity_error()
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but accelerate sees {accelerator.num_processes} processes"
        )
    # What accelerate's configuration says is the run's as much as what the command does.
    args.mixed_precision = accelerator.mixed_precision
    comparing = None
    if args.kl_weight > 0:
        comparing = f"--kl_weight {args.kl_weight}"
    elif args.num_inner_epochs > 1:
        comparing = f"--num_inner_epochs {args.num_inner_epochs}"
    if comparing is not None:
        if frozen_dtype(accelerator) != torch.float32 or args.allow_tf32:
            used = "TF32" if args.allow_tf32 else args.mixed_precision
            raise ValueError(
                f"{comparing} needs --mixed_precision no and no --allow_tf32: in {used} rounding outweighs what the two"
                " means differ by"
            )
        # The penalty goes backward through a graph twice, which a compiled one allows if told before.
        functorch_config.donated_buffer = False
        # TF32 has no more digits than float16, and is what torch takes for convolutions, and accelerate with --compile for
        # matrix products.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return accelerator


def frozen_dtype(accelerator):
    """The frozen models run in half precision under mixed precision; what is trained stays in float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def load_judges(args, prompts, accelerator):
    """The reward, and on the main process, which alone looks at held-out pictures, `HeldOut`, or `None`.

    Raises:
        ValueError: for a reward that cannot be loaded, or whose gradient the estimator cannot do without, or with.
    """
    device = accelerator.device

    def load(text):
        return load_rewards(
            parse_reward(text),
            parse_reward_paths(args.reward_path),
            device=device,
            size=(args.height or args.resolution or 512, args.width or args.resolution or 512),
            prompts=(prompts[0], prompts[-1]),
            batch_size=args.reward_batch_size,
        )

    rewards, heldout = load(args.reward), None
    if args.heldout_reward is not None and accelerator.is_main_process:
        features = load_features(args.feature_model, device)
        heldout = HeldOut(args, rewards, load(args.heldout_reward), features, prompts, device)
    if args.reward_offload:  # not before: they are tried where they will be called
        for module in rewards.modules if heldout is None else heldout.modules:
            module.to("cpu")
    if not rewards.differentiable and args.gradient_estimator not in NEED_NOISE:
        raise ValueError(
            f"--reward {args.reward!r} is not differentiable, which {args.gradient_estimator} needs: use rlr or ddpo"
        )
    if rewards.has_gradient and args.branches:
        raise ValueError(f"--branches {args.branches} is for black boxes, and --reward {args.reward!r} has a gradient")
    return rewards, heldout


def find_start(args, accelerator, num_prompts):
    """(path, step) of the checkpoint to go on from, or (None, 0); --max_train_steps and --seed are set if they are not.

    Raises:
        ValueError: as `resume_point` does, and if the ranks disagree.
    """
    if args.max_train_steps is None:
        images = args.num_train_epochs * num_prompts * args.images_per_prompt
        args.max_train_steps = math.ceil(images / images_of_a_step(args, accelerator))
    path, step = resume_point(args)
    if len(set(gather_object([step]))) > 1:
        raise ValueError(
            f"the ranks see different checkpoints in {args.output_dir!r}: put --output_dir on a disk that they share"
        )
    if args.seed is None and path is not None:
        args.seed = stored_configuration(path)["seed"]
    elif args.seed is None:
        args.seed = broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
    return path, step


def fit_to_model(args, accelerator, pipeline, prompts, resume_path):
    """Complete the arguments by what the model says.

    Returns:
        (scheduler of the chain at its timesteps, `configuration` of the run).

    Raises:
        ValueError: if the model cannot draw such pictures in so many steps, or the checkpoint is of another run.
    """
    set_size(args, pipeline)
    warn_of_long_prompts(args, prompts, pipeline.tokenizer)
    config = configuration(args, accelerator.num_processes)
    if resume_path is not None:
        check_same_run(config, resume_path)
    scheduler = make_scheduler(args.scheduler, pipeline.scheduler.config)
    scheduler.set_timesteps(args.num_inference_steps)
    if scheduler.timesteps.max() >= scheduler.config.num_train_timesteps:
        raise ValueError(
            f"--num_inference_steps {args.num_inference_steps} reaches beyond the model's timesteps: lower it"
        )
    return scheduler, config


def make_trainable(args, pipeline):
    """The parameters of the LoRA that the U-Net is given here, in float32.

    Raises:
        ValueError: if there is none to give, or no xformers.
    """
    # The same adapter on every rank; what else is drawn, such as perturbations and branches, is each rank's own.
    set_seed(args.seed)
    if args.adapter_path is None:
        add_adapter(args, pipeline.unet)
    else:
        load_adapter(args, pipeline)
    cast_training_params(pipeline.unet, dtype=torch.float32)
    set_seed(args.seed, device_specific=True)
    if args.enable_xformers_memory_efficient_attention:
        if not is_xformers_available():
            raise ValueError("--enable_xformers_memory_efficient_attention: xformers is not installed")
        pipeline.unet.enable_xformers_memory_efficient_attention()
    return [p for p in pipeline.unet.parameters() if p.requires_grad]


def claim_output_dir(args, accelerator, config, resume_path, tracker):
    """The output folder with training_args.json in it.

    Returns:
        (repository on the Hub, licence of the base model), `None` where there is none, and on all ranks but the first.

    Raises:
        ValueError: if the folder or the repository is not to be had.
    """
    check_output_dir(args, resume_path)
    # No rank may look into the output folder after another has begun to write there.
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None, None
    repo_id, base_license = None, license_of(args.pretrained_model_name_or_path, args.hub_token)
    if args.push_to_hub:
        name = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
        try:
            repo_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        except Exception as error:  # the client lets the errors of its HTTP library through
            raise ValueError(f"--push_to_hub: cannot create {name!r} on the Hub: {error}") from error
    os.makedirs(args.output_dir, exist_ok=True)
    if args.overwrite_output_dir:
        clear_run(args, tracker)
    with open(os.path.join(args.output_dir, "training_args.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    return repo_id, base_license


def to_device(args, accelerator, pipeline, baseline_vae):
    """The U-Net as rollout and sweep call it; the pipeline keeps it without what accelerate may have wrapped around it."""
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    # At the price of one more decoding a picture, as much as one or two steps of its chain.
    pipeline.vae.enable_gradient_checkpointing()
    for module in (pipeline.unet, pipeline.vae, baseline_vae):
        module.to(accelerator.device)
    # evaluation_mode: autocast, but no DistributedDataParallel, which would synchronise at each of a sweep's T backward
    # calls; the gradients are averaged over the ranks once a step, see `average_gradients`.
    return accelerator.prepare_model(pipeline.unet, evaluation_mode=True)


def make_optimizer(args, accelerator, trainable):
    """(optimizer, schedule of its learning rate)."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(
        trainable,
        lr=args.learning_rate * (images_of_a_step(args, accelerator) if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    # accelerate's scheduler takes one step for every process at each call.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    return accelerator.prepare(optimizer, lr_scheduler)


def make_embeds_of(pipeline, device):
    """`PromptEmbeds` of the pipeline's text encoders."""
    return PromptEmbeds(lambda prompt: embed(pipeline, prompt, device), text_encoders_of(pipeline), device)


def embeds_by_step(args, prompts, embeds_of):
    """What the text encoders make of B prompts, tensors (B, ...), or (T, B, ...) where the prompts have levels."""
    levels = levels_of(args, prompts)
    if levels is None:
        return embeds_of(prompts)
    level_of_step = levels_of_steps(args.num_inference_steps, args.dcot_boundaries)
    return [torch.stack(parts)[level_of_step] for parts in zip(*map(embeds_of, levels))]


def can_be_compiled(args, chain, shape, schedule):
    """Whether the compiler manages what rollout and sweep will ask for, of latents of a shape (B, C, h, w)."""
    x, handed_on = torch.zeros(shape, device=chain.timesteps.device), schedule.mixing[2 : schedule.stop_after + 1]
    with_input_grad = args.keep_graphs > 0 or any(handed_on)
    try:
        with torch.no_grad():
            chain.mean(chain.num_steps, x)
        chain.mean(chain.num_steps, x.requires_grad_(with_input_grad)).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may say
        logger.warning(f"the U-Net cannot be compiled and runs as it is: {first_line(error)}")
        return False
    finally:
        chain.unet.zero_grad()
    return True


def latents_shape(args, pipeline):
    """(B, C, h, w) of a micro-batch."""
    size = args.height // pipeline.vae_scale_factor, args.width // pipeline.vae_scale_factor
    return (args.train_batch_size, pipeline.unet.config.in_channels, *size)


def generators_of(args, accelerator, step, index):
    """One for each picture of a micro-batch, on the CPU: its noise depends on the seed, the step and its place among the
    step's pictures alone, whatever ranks and devices there are."""
    first = (index * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
    places = range(first, first + args.train_batch_size)
    seeds = [random.Random(f"{args.seed}/{step}/{place}").getrandbits(63) for place in places]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Scorer:
    """The reward of latents."""

    def __init__(self, args, accelerator, rewards, vae, baseline_vae):
        self.args, self.accelerator, self.rewards = args, accelerator, rewards
        self.vae, self.baseline_vae = vae, baseline_vae

    def __call__(self, latents, prompts, with_gradient=False, vae=None):
        """As `score_latents`, with --reward_offload; what goes wrong ends the run."""
        args, device, scale = self.args, self.accelerator.device, loss_scale(self.accelerator)
        vae = self.vae if vae is None else vae
        try:
            with offload_models(*self.rewards.modules, device=device, offload=args.reward_offload):
                return score_latents(vae, self.rewards, latents, prompts, args.decode_batch_size, with_gradient, scale)
        except ValueError as error:
            raise RunError(str(error)) from error

    def predictions(self, trajectory, prompts):
        """The rewards of the pictures predicted at each step, {"total", "black_box"} -> (B, T + 1), NaN where none was."""
        steps = list(trajectory.predictions)
        scores, _ = self(torch.cat(list(trajectory.predictions.values())), prompts * len(steps), vae=self.baseline_vae)
        shape, device = (self.args.num_inference_steps + 1, len(prompts)), self.accelerator.device
        predicted = {name: torch.full(shape, float("nan"), device=device) for name in ("total", "black_box")}
        for name, by_step in predicted.items():
            by_step[steps] = scores[name].view(len(steps), -1)
        return {name: by_step.T for name, by_step in predicted.items()}


def base_mean(chain, unet):
    """The chain's means with the adapter disabled: the base model, without a second one in memory."""

    @torch.no_grad()
    def mean(k, x):
        unet.disable_adapters()
        try:
            return chain.mean(k, x)
        finally:
            unet.enable_adapters()

    return mean


def branch_batch(args, batch, scorer, scale):
    """Branches instead of a sweep: one random step of each picture."""
    for i, prompt in enumerate(batch.prompts):
        k = random.randint(1, batch.chain.num_steps)
        copies = [prompt] * (2 * args.branches)
        branch(
            batch.chain.repeat(i, 1),
            batch.chain.repeat(i, 2 * args.branches),
            Trajectory([x[i : i + 1] for x in batch.trajectory.latents], None),
            k,
            lambda x_0: scorer(x_0, copies)[0]["total"],
            args.branches,
            weight=scale * batch.chain.num_steps / args.train_batch_size,
        )


def sweep_renoised(args, batch, schedule, scorer, scale):
    """The last step again from other noises of the same pictures, for draft_lv."""
    for _ in range(args.lv_samples):
        renoised = renoise(batch.chain, batch.trajectory.latents[0])
        _, reward_grad = scorer(renoised.latents[0], batch.prompts, with_gradient=True)
        reward_grad = scale / args.lv_samples * reward_grad
        backward_sweep(batch.chain, renoised, schedule.mixing, reward_grad=reward_grad, stop_after=1)


def sweep(args, batch, advantages, schedule, scorer, unet, scale):
    """Add the gradient of -(mean reward) of a micro-batch to `.grad`, as --gradient_estimator estimates it.

    Args:
        unet: the pipeline's, with the adapter.
        scale: of all cotangents, and so of the gradient, see `loss_scale`.

    Returns:
        Swept
    """
    chain, trajectory = batch.chain, batch.trajectory
    penalty, common = None, {"weights": batch.weights, "transport": schedule.transport}
    if args.kl_weight > 0:
        kl_weight = scale * advantages.kl_weight
        penalty = common["penalty"] = GaussianKL(chain, base_mean(chain, unet), trajectory, kl_weight)
    swept = Swept()
    if args.branches:
        branch_batch(args, batch, scorer, scale)
    elif args.gradient_estimator == "draft_lv":
        sweep_renoised(args, batch, schedule, scorer, scale)
    elif args.num_inner_epochs > 1:
        ratio = ClippedRatio(chain, trajectory, scale * advantages.total, args.ppo_clip_range)
        backward_sweep(chain, trajectory, schedule.mixing, cotangent=ratio, **common)
        swept = swept._replace(clipped=tuple(ratio.clipped))
    else:
        reward_grad = batch.reward_grad
        if reward_grad is not None and not scorer.rewards.differentiable:
            reward_grad = reward_grad + likelihood_ratio(chain, trajectory, 1, advantages.black_box)
        by_norm, trainable = args.subchain_sampling == "grad_norm", batch.perturbation.parameters
        rows = backward_sweep(
            chain,
            trajectory,
            schedule.mixing,
            reward_grad=None if reward_grad is None else scale * reward_grad,
            advantages=scale * advantages.total,
            stop_after=schedule.stop_after,
            parameters=trainable if by_norm else None,
            **common,
        )
        batch.perturbation.add_gradient(scale * advantages.mean)
        norms = rows.pathwise / scale**2, rows.likelihood_ratio / scale**2, rows.gradient_norm / scale, rows.gain
        swept = swept._replace(statistics=torch.stack(norms))
    if penalty is not None:
        # By the weights, since the steps that were left out diverge as well.
        swept = swept._replace(divergence=sum(batch.weights[k] * value for k, value in penalty.divergences.items()))
    return swept


def average_gradients(args, accelerator, trainable, clipping):
    """The gradients of all ranks and micro-batches averaged and clipped; their norm before the latter."""
    gradients = [p.grad for p in trainable]
    flat = accelerator.reduce(parameters_to_vector(gradients), "mean") / args.gradient_accumulation_steps
    vector_to_parameters(flat, gradients)
    grad_norm = accelerator.clip_grad_norm_(trainable, math.inf).item()  # which takes out the loss scale
    if not math.isfinite(grad_norm):
        if accelerator.scaler is None:
            raise RunError(f"the gradient is not finite ({grad_norm})")
        scale = loss_scale(accelerator)
        if scale < SMALLEST_LOSS_SCALE:
            raise RunError(f"float16 overflows even at a loss scale of {scale:g}: use --mixed_precision bf16 or no")
        logger.warning(
            f"float16 overflows at a loss scale of {scale:g}: this step is left out, the next has half of it"
        )
    torch._foreach_mul_(gradients, clipping.factor(grad_norm))
    return grad_norm


def metrics_of(args, accelerator, step, schedule, predicted_steps, scores, swept, grad_norm, learning_rate, seconds):
    """The line of an optimizer step in metrics.jsonl."""
    num_images = len(scores["total"])
    figures = {
        name: (values.mean().item(), values.std(correction=int(num_images > 1)).item())
        for name, values in scores.items()
    }
    gammas = [schedule.mixing[k] for k in schedule.swept]
    line = {
        "step": step,
        "reward_mean": figures["total"][0],
        "reward_std": figures["total"][1],
        "num_images": num_images,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "gamma_mean": sum(gammas) / len(gammas),
        "predicted_steps": len(predicted_steps),
        "swept_steps": swept_steps(args, schedule),
        "seconds": seconds,
        "images_per_second": num_images / seconds,
        "learning_rate": learning_rate,
    }
    divergences = [one.divergence for one in swept if one.divergence is not None]
    clipped = [fraction for one in swept for fraction in one.clipped]
    for name, values in (("kl", divergences), ("clip_fraction", clipped)):
        if values:
            line[name] = accelerator.reduce(torch.stack(values).mean(), "mean").item()
    for name, (mean, std) in figures.items():
        if name not in ("total", "black_box"):
            line[f"{name}_mean"], line[f"{name}_std"] = mean, std
    return line


@contextmanager
def saving(path):
    """Within it, what cannot be written ends the run; what has been saved before stays."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        message = " ".join(str(error).split())
        raise RunError(
            f"cannot write {path!r}: {message}; mend that, and go on from the last checkpoint with"
            " --resume_from_checkpoint latest"
        ) from error


class Record:
    """What is kept, shown and sent of a run: checkpoints, adapters, metrics, held-out and validation pictures, the Hub.

    Args:
        pipeline: whose U-Net has the adapter.
        card: `save_model_card`'s "command", "repo_id", "base_license" and "prompt".
        step: the step that the run starts after.

    Attributes:
        step: the step that is being taken, or has been.
        stopped: whether somebody has asked for the end.
        is_over: whether that step is the last.
        ema: the moving average of the adapter, or `None`.
    """

    def __init__(self, args, accelerator, pipeline, sampler, estimator, heldout, config, card, step):
        self.args, self.accelerator, self.pipeline, self.sampler = args, accelerator, pipeline, sampler
        self.heldout, self.config, self.card, self.step = heldout, config, card, step
        self.trainable = [p for p in pipeline.unet.parameters() if p.requires_grad]
        self.ema = None if args.ema_decay is None else EMAModel(self.trainable, decay=args.ema_decay)
        self.clipping = GradientClipping(args.max_grad_norm)
        self.stopping = EarlyStopping(args.early_stop_patience)
        self.stopped = self.is_over = False
        self.statistics = {**estimator.statistics, "clipping": self.clipping, "early_stopping": self.stopping}
        self.metrics_file, self.partial_adapter = (
            os.path.join(args.output_dir, name) for name in ("metrics.jsonl", "partial-adapter")
        )
        self.bar, self.times = None, []
        accelerator.register_save_state_pre_hook(self.save_state_hook)
        accelerator.register_load_state_pre_hook(self.load_state_hook)

    @contextmanager
    def averaged(self):
        """Within it, the U-Net has the moving average of the adapter, if there is one."""
        if self.ema is not None:
            self.ema.store(self.trainable)
            self.ema.copy_to(self.trainable)
        yield
        if self.ema is not None:
            self.ema.restore(self.trainable)

    @contextmanager
    def naming_the_step(self):
        """Within it, what ends the run says at which step."""
        try:
            yield
        except RunError as error:
            raise RunError(f"step {self.step}: {error}") from error

    def save_adapter(self, directory):
        # The pipeline keeps the U-Net as it is, without what accelerate may have wrapped around it.
        unet = self.pipeline.unet
        self.pipeline.save_lora_weights(
            directory,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            **_collate_lora_metadata({"unet": unet}),
        )

    def place_adapter(self, name=""):
        """The adapter as it is now into a folder of the output folder, where it is never half there."""
        self.save_adapter(self.partial_adapter)
        directory = os.path.join(self.args.output_dir, name)
        os.makedirs(directory, exist_ok=True)
        os.replace(os.path.join(self.partial_adapter, LORA_FILE), os.path.join(directory, LORA_FILE))
        shutil.rmtree(self.partial_adapter)

    def save_state_hook(self, models, weights, directory):
        weights.clear()  # or accelerate writes the whole U-Net beside the adapter
        if self.accelerator.is_main_process:
            self.save_adapter(directory)
            state = {"position": self.sampler.position, "config": self.config}
            state.update({name: kept.state_dict() for name, kept in self.statistics.items()})
            if self.ema is not None:
                state["ema_step"] = self.ema.optimization_step
                average = {str(i): values.contiguous() for i, values in enumerate(self.ema.shadow_params)}
                save_file(average, os.path.join(directory, EMA_FILE))
            with open(os.path.join(directory, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump(state, file)

    def load_state_hook(self, models, directory):
        models.clear()
        layers, _ = self.pipeline.lora_state_dict(directory)
        set_adapter(self.pipeline.unet, layers)
        with open(os.path.join(directory, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
        self.sampler.position = state["position"]
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]
            average = load_file(os.path.join(directory, EMA_FILE))
            for i, values in enumerate(self.ema.shadow_params):
                values.copy_(average[str(i)])
        unknown = sorted(self.statistics.keys() - state.keys())
        if unknown:
            raise ValueError(f"it is of an earlier version, which did not keep {', '.join(unknown)}")
        for name, kept in self.statistics.items():
            kept.load_state_dict(state[name])

    def save_checkpoint(self):
        """checkpoint-N appears under its name only when it is whole, and older ones go only after that."""
        args, accelerator = self.args, self.accelerator
        checksums = accelerator.gather(parameters_to_vector(self.trainable).detach().square().sum()[None])
        if (checksums != checksums[0]).any():
            raise RunError(f"the ranks' adapters differ, {checksums.tolist()}")
        path = os.path.join(args.output_dir, f"checkpoint-{self.step}")
        partial = os.path.join(args.output_dir, f"partial-{self.step}")
        with saving(partial):
            if accelerator.is_main_process:
                for name in incomplete_in(args.output_dir):
                    if name.startswith("partial-"):
                        shutil.rmtree(os.path.join(args.output_dir, name))
            accelerator.wait_for_everyone()
            accelerator.save_state(partial)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(path, ignore_errors=True)
                os.rename(partial, path)
                if args.checkpoints_total_limit is not None:
                    for old in list(checkpoints_of(args.output_dir).values())[: -args.checkpoints_total_limit]:
                        # In one go, or a kill would leave a part of it under its name.
                        gone = os.path.join(args.output_dir, f"partial-{old.rpartition('-')[2]}")
                        os.rename(old, gone)
                        shutil.rmtree(gone)

    def save_card(self, results=None):
        save_model_card(self.args, type(self.pipeline), step=self.step, results=results, **self.card)

    def save_result(self):
        """The adapter, and what tells of it, into the output folder."""
        with saving(self.partial_adapter):
            self.place_adapter()
            if self.ema is not None:
                with self.averaged():
                    self.place_adapter("ema")
            plot_reward_curve(self.metrics_file, os.path.join(self.args.output_dir, "reward_curve.png"))
            self.save_card()

    def start(self, resume_path, tracker):
        """Trackers, the state of a checkpoint, and the metrics up to it."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            # TensorBoard takes no lists.
            shown = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in self.config.items()}
            accelerator.init_trackers(tracker, shown, {"tensorboard": {"purge_step": self.step + 1}})
        if resume_path is not None:
            try:
                accelerator.load_state(resume_path)
            except (ValueError, RuntimeError, OSError, KeyError, EOFError) as error:
                message = " ".join(str(error).split())
                raise RunError(f"cannot resume from {resume_path!r}: {message}") from error
        if not accelerator.is_main_process:
            return
        # The steps after the checkpoint will be taken again: their lines go.
        kept = []
        if resume_path is not None and os.path.isfile(self.metrics_file):
            with open(self.metrics_file, encoding="utf-8") as file:
                # A line that a killed run has not finished has no end.
                kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        with open(self.metrics_file + ".partial", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(self.metrics_file + ".partial", self.metrics_file)

    @contextmanager
    def running(self):
        """Within it, the first Ctrl-C or SIGTERM ends the run after the step in progress, and an error says at which."""
        show = self.accelerator.is_local_main_process
        bar = {"total": self.args.max_train_steps, "initial": self.step, "desc": "Steps", "disable": not show}
        with self.naming_the_step():
            if self.heldout is not None:
                self.heldout.look_at_base(self.pipeline)
            with stopping_at_a_step(self.accelerator), tqdm(**bar) as self.bar:
                yield

    def steps(self):
        """The steps that are to be taken."""
        for self.step in range(self.step + 1, self.args.max_train_steps + 1):
            yield self.step
            if self.is_over:
                return

    def after_step(self, line):
        """Held-out pictures, metrics, checkpoint, validation and upload, as they are due after a step.

        Args:
            line: from `metrics_of`.
        """
        args, accelerator, step = self.args, self.accelerator, self.step
        reason = None
        if args.heldout_reward is not None and step % args.heldout_steps == 0:
            if self.heldout is not None:
                with self.averaged():
                    line.update(self.heldout.look(self.pipeline))
                    is_best, reason = self.stopping.update(step, line["heldout_mean"])
                    if is_best:
                        with saving(self.partial_adapter):
                            self.place_adapter("best")
            reason = broadcast_object_list([reason])[0]
        if accelerator.is_main_process:
            with saving(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=step)
        self.bar.update()
        self.bar.set_postfix(reward=f"{line['reward_mean']:.3f}", seconds=f"{line['seconds']:.2f}")
        self.times.append(time.perf_counter())
        if len(self.times) == 3:  # the first step has warmed up
            per_step, num_steps = (self.times[2] - self.times[0]) / 2, args.max_train_steps - step + 3
            total = datetime.timedelta(seconds=round(per_step * num_steps))
            logger.info(
                f"about {total} for {num_steps} steps in all, at {per_step:.1f} seconds a step as the last two"
            )
        if reason is not None:
            logger.info(reason)
            self.is_over = True
            return
        self.is_over = self.stopped = accelerator.check_trigger()
        # What is pushed can be gone on from.
        pushing = args.push_every is not None and step % args.push_every == 0 and step < args.max_train_steps
        if step % args.checkpointing_steps == 0 or self.stopped or pushing:
            self.save_checkpoint()
        if self.stopped or not accelerator.is_main_process:
            return
        if args.validation_prompts and step % args.validation_steps == 0:
            with self.averaged():
                log_validation(self.pipeline, args, accelerator, step)
        if pushing:
            self.save_result()
            try:
                push(args, self.card["repo_id"], f"Step {step}")
            except ValueError as error:
                logger.warning(str(error))

    def finish(self, load_pipeline, rewards, prompts):
        """The adapter into the output folder, its comparison with the base model, the upload.

        Args:
            load_pipeline: `load_pipeline(args, dtype)`, for a plain pipeline.
        """
        args, accelerator = self.args, self.accelerator
        if self.stopped:
            accelerator.end_training()
            if not accelerator.is_main_process:
                raise SystemExit(1)
            how = "go on with the same command and --resume_from_checkpoint latest"
            raise RunStopped(f"stopped after step {self.step}; {how}")
        accelerator.wait_for_everyone()
        failures = []
        if accelerator.is_main_process:
            with self.naming_the_step():
                self.save_result()
            self.pipeline.to("cpu", silence_dtype_warnings=True)  # in fp16 it is only kept there
            free_memory()
            if args.num_eval_images > 0:
                # The adapter is there: what goes wrong from here on is said at the end.
                try:
                    plain = load_pipeline(args, frozen_dtype(accelerator)).to(accelerator.device)
                    results = compare_with_base(args, rewards, prompts, plain)
                    self.save_card(results)
                except (ValueError, OSError, torch.OutOfMemoryError) as error:
                    failures.append(f"the comparison with the base model has failed: {' '.join(str(error).split())}")
                else:
                    print_comparison(args, results)
            if self.card["repo_id"] is not None:
                try:
                    push(args, self.card["repo_id"], "End of training")
                except ValueError as error:
                    failures.append(str(error))
        accelerator.end_training()
        if failures:
            raise RunError("; ".join(failures))


def print_comparison(args, results):
    """What `compare_with_base` has found."""
    for name in ("base", "tuned"):
        mean, std = results[name]["mean"], results[name]["std"]
        print(f"{name:>6} {args.reward}: {mean:.4f} mean, {std:.4f} standard deviation")
    gain = results["gain"]
    print(
        f"  gain {gain['mean']:+.4f} with a standard error of {gain['standard_error']:.4f}, over"
        f" {results['num_images']} pictures of the same prompts and seeds"
    )


@ending_in_one_line("train_rlr_sd.py")
def main(args):
    with refusing_bad_input():
        accelerator = make_accelerator(args)
        dtype = frozen_dtype(accelerator)
        prompts = load_training_prompts(args)
        rewards, heldout = load_judges(args, prompts, accelerator)
        resume_path, first_step = find_start(args, accelerator, len(prompts))
        pipeline = load_pipeline(args, dtype)
        scheduler, config = fit_to_model(args, accelerator, pipeline, prompts, resume_path)
        estimator = Estimator(args, rewards)
        baseline_vae = pipeline.vae
        if args.baseline_vae is not None:
            baseline_vae = load_vae(args, "baseline_vae", AutoencoderTiny, dtype)
        schedule = estimator.schedule()
        # Every batch's chain is this one under the batch's prompts.
        nothing = torch.zeros(1, 1, 1, device=accelerator.device)
        promptless = StableDiffusionChain(
            pipeline.unet, scheduler, nothing, guidance_scale=args.guidance_scale, eta=args.eta
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
    command = command_of(args, accelerator.num_processes)
    card = {"command": command, "repo_id": repo_id, "base_license": base_license, "prompt": prompts[0]}
    record = Record(args, accelerator, pipeline, sampler, estimator, heldout, config, card, first_step)

    embeds_of = make_embeds_of(pipeline, accelerator.device)
    (negative,) = embeds_of([args.negative_prompt or ""])

    def chain_of(batch_prompts):
        (embeds,) = embeds_by_step(args, batch_prompts, embeds_of)
        return promptless.conditioned_on(embeds, negative)

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
    record.finish(load_pipeline, rewards, prompts)


if __name__ == "__main__":
    main(parse_args())
