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
"""Checkpoints: what they hold, how they are written so that none is ever half there, and which one a run resumes from."""

import json
import os
import random
import re
import shutil
from functools import partial

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, load
from diffusion_models.adapters import restore_lora, save_lora
from reward_models.loading import first_line, read_json
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector

from .errors import RunError, one_line, saving
from .processes import lock


logger = get_logger(__name__, log_level="INFO")

STATE_FILE = "rlr_state.json"
EMA_FILE = "ema.safetensors"
# What may differ on resume: the length of the run, what is kept, shown and uploaded, and what affects memory only.
MAY_CHANGE = (
    *("max_train_steps", "num_train_epochs", "resume_from_checkpoint", "overwrite_output_dir", "output_dir"),
    *("early_stop_patience", "checkpointing_steps", "checkpoints_total_limit", "logging_dir", "report_to"),
    *("num_eval_images", "validation_prompts", "num_validation_images", "validation_steps", "cache_dir"),
    *("push_to_hub", "push_every", "hub_token", "hub_model_id", "export_kohya"),
    *("decode_batch_size", "reward_batch_size", "reward_offload", "gradient_checkpointing", "keep_graphs"),
    "reward_timeout",
    *("guidance_batching", "vae_offload", "offload_blocks"),
)
# Flags that the script did not have before, and the values that stand for what it did then.
NEW_FLAGS = {"cuda_graphs": False, "shard": False, "reward_option": [], "reward_normalize": False, "reward_floor": []}
# Flags that the script had before and their defaults; `...` where the value does not matter.
FORMER_FLAGS = {
    **{"subchain_sampling": "uniform", "zo_scale": 0.02, "baseline_steps": None},
    **{"enable_xformers_memory_efficient_attention": False, "use_dora": False},
    **{name: ... for name in ("local_rank", "memory_budget_gb", "half_order_gb", "zeroth_order_gb")},
}


def checkpoints_of(output_dir):
    """The whole checkpoints of an output folder as {step: path}, in order."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    matches = filter(None, (re.fullmatch(r"checkpoint-(\d+)", name) for name in names))
    paths = {int(match[1]): os.path.join(output_dir, match[0]) for match in matches}
    return {step: paths[step] for step in sorted(paths) if os.path.isfile(os.path.join(paths[step], STATE_FILE))}


def incomplete_in(output_dir):
    """Names in an output folder of checkpoints that a killed run has not finished saving."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    whole = {os.path.basename(path) for path in checkpoints_of(output_dir).values()}
    return sorted(name for name in names if re.fullmatch(r"(checkpoint|partial)-\d+", name) and name not in whole)


def find_start(args, accelerator):
    """(path, step) of the checkpoint to resume from, or (None, 0); --seed is set if it was not given.

    Raises:
        ValueError: as `resume_point` does, if the ranks disagree, and if another run writes into the folder.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            lock(args.output_dir)
        except ValueError as error:
            problem = str(error)
    problem = next(filter(None, gather_object([problem])), None)
    if problem is not None:
        raise ValueError(problem)
    path, step = resume_point(args)
    if len(set(gather_object([step]))) > 1:
        raise ValueError(
            f"the ranks see different checkpoints in {args.output_dir!r}: put --output_dir on a disk that they share"
        )
    if args.seed is None and path is not None:
        args.seed = read_state(path)["config"]["seed"]
    elif args.seed is None:
        args.seed = broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
    return path, step


def resume_point(args):
    """(path, step) of the checkpoint to resume from, or (None, 0).

    Raises:
        ValueError: if it does not exist, lies beyond --max_train_steps, or a newer one would get in the way.
    """
    wanted, present = args.resume_from_checkpoint, checkpoints_of(args.output_dir)
    if wanted == "latest":
        for name in incomplete_in(args.output_dir):
            logger.warning(f"--resume_from_checkpoint latest: {name!r} is incomplete and is ignored")
        if not present:
            logger.warning(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir!r}, starting afresh")
        wanted = present[max(present)] if present else None
    if wanted is None:
        return None, 0
    folder, name = os.path.split(os.path.normpath(wanted))
    elsewhere = checkpoints_of(folder) if folder else {}
    found = [(path, step) for step, path in [*present.items(), *elsewhere.items()] if os.path.basename(path) == name]
    if not found:
        names = ", ".join(os.path.basename(path) for path in present.values()) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint!r} does not exist; whole checkpoints in"
            f" {args.output_dir!r}: {names}"
        )
    # A name alone means this folder, a path the folder it names.
    path, step = found[-1]
    if args.max_train_steps < step:
        raise ValueError(f"--max_train_steps {args.max_train_steps} ends before {path!r}")
    if present and max(present) > step:
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint!r}: {present[max(present)]!r} is newer, move it away to"
            " continue from the older one"
        )
    return path, step


def is_address(option):
    """Whether an entry of --reward_option says where a server is, or how long it may take."""
    name, _, setting = option.partition("=")[0].rpartition(".")
    return name.partition("@")[0] == "remote" and setting in ("url", "timeout")


def configuration(args, num_processes):
    """All arguments of the run without the token, and without where its servers are, as JSON holds them."""
    config = {name: value for name, value in vars(args).items() if name != "hub_token"}
    config["reward_option"] = [one for one in args.reward_option if not is_address(one)]
    return json.loads(json.dumps({**config, "num_processes": num_processes}))


def read_state(checkpoint):
    """The content of a checkpoint's `STATE_FILE`, with the configuration of the run that has written it.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with open(os.path.join(checkpoint, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
        if not isinstance(state["config"], dict):
            raise ValueError("its configuration is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot resume from {checkpoint!r}: {STATE_FILE} holds no configuration") from error
    return state


def check_same_run(config, resume_path):
    """Refuse to resume with another configuration than the checkpoint's.

    Raises:
        ValueError: naming what differs.
    """
    before = {**NEW_FLAGS, **read_state(resume_path)["config"]}
    # Held-out images are of the validation prompts: of others they could not be compared with those so far.
    may_change = set(MAY_CHANGE) - ({"validation_prompts"} if config["heldout_reward"] else set())
    differing = [
        f"{name} was {before.get(name)!r} and is {config.get(name)!r}"
        for name in sorted(before.keys() | config.keys())
        if name not in may_change and not _is_former(name, before) and before.get(name) != config.get(name)
    ]
    if differing:
        raise ValueError(
            f"cannot resume from {resume_path!r} with another configuration: {'; '.join(differing)};"
            f" repeat the command of the run, or train its adapter further with --adapter_path {resume_path} and another"
            " --output_dir"
        )


def _is_former(name, before):
    """Whether a flag is gone that the checkpoint's run did not use."""
    return name in FORMER_FLAGS and FORMER_FLAGS[name] in (..., before.get(name))


def check_whole(config, adapter_files, resume_path):
    """Refuse a checkpoint that lacks a part, or has one that cannot be read.

    accelerate goes on without some of them, and the run would be another one.

    Raises:
        ValueError: naming the part, and the latest checkpoint beside it that is whole.
    """
    damage = find_damage(config, adapter_files, resume_path)
    if damage is None:
        return
    folder, name = os.path.split(os.path.normpath(resume_path))
    step = int(name.rpartition("-")[2])
    older = [path for other, path in checkpoints_of(folder).items() if other < step]
    whole = next((path for path in reversed(older) if find_damage(config, adapter_files, path) is None), None)
    remedy = (
        "no older checkpoint is whole" if whole is None else f"move it away to continue from {whole!r}, which is whole"
    )
    raise ValueError(f"cannot resume from {resume_path!r}: {damage}; {remedy}")


def find_damage(config, adapter_files, checkpoint):
    """What keeps a checkpoint from being resumed, in words, or `None`.

    Args:
        config: from `configuration`, of the run.
        adapter_files: names of the files that hold the adapter.
    """
    readers = {STATE_FILE: read_json, **dict.fromkeys(adapter_files, load_file)}
    readers["optimizer.bin"] = partial(_read_torch, needed={"state", "param_groups"})
    readers["scheduler.bin"] = partial(_read_torch, needed={"last_epoch", "base_lrs"})
    for rank in range(config["num_processes"]):
        needed = {"random_state", "numpy_random_seed", "torch_manual_seed"}
        readers[f"random_states_{rank}.pkl"] = partial(_read_torch, needed=needed)
    if config["ema_decay"] is not None:
        readers[EMA_FILE] = load_file
    if config["mixed_precision"] == "fp16" and torch.cuda.is_available():
        readers["scaler.pt"] = partial(_read_torch, needed={"scale"})
    for name, read in readers.items():
        path = os.path.join(checkpoint, name)
        if not os.path.isfile(path):
            return f"{name} is missing"
        try:
            read(path)
        except Exception as error:  # safetensors, zip files and pickles have errors of their own
            # Others advise to load the file without the protection against code in it.
            reason = f" ({first_line(error)})" if isinstance(error, ValueError) else ""
            return f"{name} is damaged{reason}"
    return None


def _read_torch(path, needed):
    missing = sorted(needed - load(path, map_location="cpu").keys())
    if missing:
        raise ValueError(f"without {', '.join(missing)}")


def register_state(accelerator, model, config, sampler, rlr, others, ema=None):
    """Have accelerate's checkpoints hold the adapter, and the rest of the run's state as JSON and safetensors.

    accelerate itself adds the optimizer, its schedule, the scaler and the random states. It knows no network.

    Args:
        config: from `configuration`.
        sampler: `PromptSampler`.
        rlr: `RLRStep`.
        others: {name: anything with `state_dict` and `load_state_dict`, or `None` for what the run does not have}.
        ema: the moving average of the adapter, if there is one.
    """

    others = {name: part for name, part in others.items() if part is not None}

    def save(models, weights, directory):
        if not accelerator.is_main_process:
            return
        save_lora(model, directory)
        state = {"position": sampler.position, "config": config, **rlr.state_dict()}
        state.update({name: part.state_dict() for name, part in others.items()})
        if ema is not None:
            state["ema_step"] = ema.optimization_step
            average = {str(i): values.contiguous() for i, values in enumerate(ema.shadow_params)}
            save_file(average, os.path.join(directory, EMA_FILE))
        with open(os.path.join(directory, STATE_FILE), "w", encoding="utf-8") as file:
            json.dump(state, file)

    def load(models, directory):
        restore_lora(model, directory)
        state = read_state(directory)
        needed = {"position", *rlr.state_dict(), *others} | ({"ema_step"} if ema is not None else set())
        missing = sorted(needed - state.keys())
        if missing:
            raise ValueError(f"it is of an earlier version, which did not keep {', '.join(missing)}")
        sampler.position = state["position"]
        if ema is not None:
            ema.optimization_step = state["ema_step"]
            average = load_file(os.path.join(directory, EMA_FILE))
            if len(average) != len(ema.shadow_params):
                raise ValueError(f"{EMA_FILE} is not the average of this adapter")
            for i, values in enumerate(ema.shadow_params):
                values.copy_(average[str(i)])
        rlr.load_state_dict(state)
        for name, part in others.items():
            part.load_state_dict(state[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_checkpoint(accelerator, path):
    """Raise RunError if the checkpoint cannot be loaded."""
    try:
        accelerator.load_state(path)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # parts that can be read and do not fit, of which any may fail in its own way
        raise RunError(f"cannot resume from {path!r}: {one_line(error) or type(error).__name__}") from error


def save_checkpoint(accelerator, args, step, trainable):
    """Write checkpoint-N. It appears under its name only when it is whole, and older ones go only after that.

    Raises:
        RunError: if it cannot be written, or the ranks' adapters differ.
    """
    checksums = accelerator.gather(parameters_to_vector(trainable).detach().square().sum()[None])
    if (checksums != checksums[0]).any():
        raise RunError(f"the ranks' adapters differ, {checksums.tolist()}")
    path, partial = (os.path.join(args.output_dir, f"{kind}-{step}") for kind in ("checkpoint", "partial"))
    with saving(partial):
        if accelerator.is_main_process:
            for name in incomplete_in(args.output_dir):
                if name.startswith("partial-"):
                    shutil.rmtree(os.path.join(args.output_dir, name))
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        logger.info(f"saved {path!r}")
        if args.checkpoints_total_limit is not None:
            for old in list(checkpoints_of(args.output_dir).values())[: -args.checkpoints_total_limit]:
                # Renamed first, or a kill would leave a part of it under its name.
                gone = os.path.join(args.output_dir, f"partial-{old.rpartition('-')[2]}")
                os.rename(old, gone)
                shutil.rmtree(gone)
