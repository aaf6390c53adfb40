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
"""What is wrong with the arguments of a training script, as far as it shows without loading a model."""

import math
import sys
from dataclasses import fields
from importlib.util import find_spec

from diffusion_models.levels import levels_of_steps
from reward_models import check_options, parse_reward, parse_reward_floors, parse_reward_options, parse_reward_paths
from rlr_utils import Settings
from rlr_utils.settings import NEED_GRADIENT, check_settings

from .errors import naming


# Flags that have another name than the keyword of `RLRStep`.
FLAGS = {"estimator": "gradient_estimator", "num_steps": "num_inference_steps"}


def flag_of(keyword):
    """The flag of a keyword of `RLRStep`, as a message names it."""
    return f"--{FLAGS.get(keyword, keyword)}"


def rlr_settings(args):
    """The keywords of `RLRStep` that the flags set."""
    flags = {field.name: FLAGS.get(field.name, field.name) for field in fields(Settings)}
    return {keyword: getattr(args, flag) for keyword, flag in flags.items() if hasattr(args, flag)}


def check_args(args, default_of):
    """Refuse arguments that do not go together.

    Args:
        default_of: `default_of(name)`, the default of a flag.

    Raises:
        ValueError: one line that names the flag and what it should be.
    """
    check_settings(Settings(**rlr_settings(args)), args.num_inference_steps or sys.maxsize, name=flag_of)
    check_shared_flags(args)
    _check_noise(args)
    _check_adapter(args, default_of)
    _check_rewards(args)
    _check_run(args)


def check_shared_flags(args):
    """The part of `check_args` that is about flags of training and evaluation alike.

    Raises:
        ValueError: one line that names the flag and what it should be.
    """
    scheduler = getattr(args, "scheduler", "ddim")
    if scheduler != "ddim" and args.eta < 1:
        raise ValueError(f"--eta {args.eta} is for --scheduler ddim, and {scheduler} has a noise of its own")
    with naming("--dcot_boundaries:"):
        levels_of_steps(args.num_inference_steps or 1, args.dcot_boundaries)
    parse_reward(args.reward)
    parse_reward_paths(args.reward_path)
    _check_options(args)


def _check_options(args):
    """Refuse options of rewards that the run does not have."""
    check_options(parse_reward_options(args.reward_option), _scored(args))


def _scored(args):
    """The names of the rewards that a run scores; an evaluation has none that is held out."""
    sums = filter(None, (args.reward, getattr(args, "heldout_reward", None)))
    return {name for one in sums for name in parse_reward(one)}


def _check_noise(args):
    if args.eta == 0 and args.gradient_estimator not in NEED_GRADIENT:
        raise ValueError(f"--eta 0 leaves no noise in the chain, which {args.gradient_estimator} needs: use --eta 1")
    if args.eta == 0 and args.kl_weight > 0:
        raise ValueError(
            f"--eta 0 leaves no noise in the chain, which --kl_weight {args.kl_weight} needs: use --eta 1"
        )
    if getattr(args, "final_noise", "auto") != "auto":
        if args.noise != "ddim":
            raise ValueError(
                f"--final_noise {args.final_noise} is for --noise ddim, and {args.noise} has a noise of its own"
            )
        if not 0 <= args.final_noise < 1:
            raise ValueError(f"--final_noise {args.final_noise} is neither auto nor a number in [0, 1)")
    if args.baseline_vae is not None and args.baseline not in ("auto", "predicted_x0"):
        raise ValueError(f"--baseline_vae {args.baseline_vae!r} needs --baseline auto or predicted_x0")


def _check_adapter(args, default_of):
    for name in ("rank", "lora_alpha", "lora_layers"):
        if args.adapter_path is not None and getattr(args, name) != default_of(name):
            raise ValueError(f"--{name} is for a new adapter, and --adapter_path {args.adapter_path!r} has its own")
    if args.lora_layers is not None and not all(name.strip() for name in args.lora_layers.split(",")):
        raise ValueError(f"--lora_layers {args.lora_layers!r} has an empty name: give names, separated by commas")


def _check_rewards(args):
    if args.heldout_reward is not None:
        parse_reward(args.heldout_reward)
    for name in parse_reward_floors(args.reward_floor).keys() - _scored(args):
        raise ValueError(
            f"--reward_floor {name}...: the reward {name!r} is neither in --reward nor in --heldout_reward"
        )
    if args.decode_batch_size != "auto" and (args.reward_batch_size or 0) > args.decode_batch_size:
        raise ValueError(
            f"--reward_batch_size {args.reward_batch_size} is more than --decode_batch_size {args.decode_batch_size}:"
            f" raise --decode_batch_size {args.decode_batch_size} with it"
        )
    if args.early_stop_patience is not None and args.heldout_reward is None:
        raise ValueError(f"--early_stop_patience {args.early_stop_patience} needs --heldout_reward")
    if args.num_heldout_images % 4:
        raise ValueError(f"--num_heldout_images {args.num_heldout_images} must be a multiple of 4")


def _check_run(args):
    if args.seed is not None and args.seed >= 2**32:
        raise ValueError(f"--seed {args.seed} must be in 0..2^32 - 1")
    if args.num_eval_images == 1:
        raise ValueError("--num_eval_images 1 has no standard deviation: use 0 or at least 2")
    is_norm = isinstance(args.max_grad_norm, float) and 0 < args.max_grad_norm < math.inf
    if args.max_grad_norm != "auto" and not is_norm:
        raise ValueError(f"--max_grad_norm {args.max_grad_norm!r} is neither auto nor a positive number")
    if args.prompts is not None and args.dataset_name is not None:
        raise ValueError(f"--prompts {args.prompts!r} and --dataset_name {args.dataset_name!r}: give one of them")
    if args.report_to not in ("tensorboard", "none") and args.hub_token is not None:
        raise ValueError(
            f"--report_to {args.report_to} with --hub_token would log the token: log in with `hf auth login` instead"
        )
    if args.report_to in ("wandb", "comet_ml") and find_spec(args.report_to) is None:
        raise ValueError(f"--report_to {args.report_to}: {args.report_to} is not installed")
    _check_device(args)
    if args.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam: bitsandbytes is not installed")
    if args.push_every is not None and not args.push_to_hub:
        raise ValueError(f"--push_every {args.push_every} needs --push_to_hub")
    if args.overwrite_output_dir and args.resume_from_checkpoint is not None:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint: give one of them")


def _check_device(args):
    """Refuse flags about memory and calls of the network that do not go together."""
    if args.cuda_graphs:
        given = {name: getattr(args, name) for name in ("compile", "keep_graphs", "kl_weight", "offload_blocks")}
        given["gradient_checkpointing"] = args.gradient_checkpointing == "on"
        given["guidance_batching"] = args.guidance_batching == "split"
        for name in (name for name, value in given.items() if value):
            raise ValueError(f"--cuda_graphs and --{name}: give one of them")
    if args.shard:
        others = ("compile", "cuda_graphs", "keep_graphs", "offload_blocks", "quantize")
        for name in (name for name in others if getattr(args, name)):
            raise ValueError(f"--shard and --{name}: give one of them")
    if args.offload_blocks:
        if args.gradient_checkpointing == "off":
            raise ValueError("--offload_blocks needs --gradient_checkpointing on, which brings the weights back")
        if args.compile:
            raise ValueError("--offload_blocks and --compile: give one of them")
        if args.quantize == "nf4":
            raise ValueError("--offload_blocks cannot move weights of --quantize nf4: use int8 or fp8")
        if args.keep_graphs != 0 and args.keep_graphs != "auto":
            raise ValueError("--offload_blocks and --keep_graphs: give one of them")
