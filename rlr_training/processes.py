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
"""accelerate, the seeds of every process, and how a run is stopped."""

import datetime
import getpass
import hashlib
import logging
import os
import random
import signal
import tempfile
import time
from contextlib import contextmanager, suppress

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from diffusion_models.decoders import recompute_blocks
from filelock import FileLock, Timeout
from torch._functorch import config as functorch_config

import diffusers

from .cuda_graphs import GraphedNetwork
from .offload import place
from .sharding import check_sharding


logger = get_logger(__name__, log_level="INFO")

# {variable that `accelerate launch` sets: what shards or replaces the network under it}
ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "several kinds of parallelism",
}
# {output folder: the lock that this process holds until its run ends}
LOCKS = {}
# The dtype of the frozen models under each --mixed_precision.
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(args):
    """The accelerator; --mixed_precision is set to what accelerate's configuration says.

    Raises:
        ValueError: as `refuse_engines` and `check_sharding` do; if it does not see all processes, or its precision is too
            low to compare two means of a step.
    """
    refuse_engines(args.mixed_precision)
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
            # The other ranks wait while the first talks to the Hub; the default is ten minutes.
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=4)),
            # A likelihood ratio's cotangents reach 20 to 90 where they enter the U-Net: at the default of 2^16 they
            # overflow float16, and each halving costs a step. The gradients of rewards are large enough at 2^10.
            GradScalerKwargs(init_scale=2.0**10),
        ],
    )
    set_up_logging(accelerator.is_local_main_process)
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but accelerate sees {accelerator.num_processes} processes"
        )
    args.mixed_precision = accelerator.mixed_precision
    check_sharding(args, accelerator)
    _check_precision(args)
    return accelerator


def refuse_engines(mixed_precision):
    """Refuse what accelerate can be configured for and the sweep does not work with.

    Args:
        mixed_precision: of the command, or `None` for accelerate's configuration.

    Raises:
        ValueError: naming it.
    """
    for variable, engine in ENGINES.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"accelerate is configured for {engine}, which is not supported: choose plain multi-GPU training in"
                " `accelerate config`, or start with `accelerate launch --multi_gpu`; --shard of the training scripts shares"
                " the network out among the GPUs"
            )
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:
        raise ValueError(
            f"accelerate is configured for the mixed precision {precision}, which is not supported: use --mixed_precision"
            f" {', '.join(PRECISIONS)}"
        )


def set_up_logging(is_main_process):
    """Log to stderr; of libraries only warnings, and on other ranks only errors."""
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S")
    logging.getLogger().setLevel(logging.WARNING)  # accelerate's get_logger has set it to that of our own
    for package in ("rlr_training", "diffusion_models", "reward_models"):
        logging.getLogger(package).setLevel(logging.INFO)
    for library in (transformers, diffusers):
        if is_main_process:
            library.utils.logging.set_verbosity_warning()
        else:
            library.utils.logging.set_verbosity_error()
    # It is imported where it is needed, which takes a while, and then reads this.
    os.environ.setdefault("DATASETS_VERBOSITY", "warning" if is_main_process else "error")


def _check_precision(args):
    """Refuse half precision and TF32 where two means of a step are compared, and switch TF32 off there.

    TF32 has no more digits than float16. torch uses it for convolutions, and accelerate with --compile for matrix products.
    """
    if args.kl_weight > 0:
        comparing = f"--kl_weight {args.kl_weight}"
    elif args.num_inner_epochs > 1:
        comparing = f"--num_inner_epochs {args.num_inner_epochs}"
    else:
        return
    if frozen_dtype(args.mixed_precision) != torch.float32 or args.allow_tf32:
        used = "TF32" if args.allow_tf32 else args.mixed_precision
        raise ValueError(
            f"{comparing} needs --mixed_precision no and no --allow_tf32: in {used} rounding outweighs the difference of the"
            " two means"
        )
    # The penalty goes backward through a graph twice, which a compiled one allows only if told before.
    functorch_config.donated_buffer = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def frozen_dtype(mixed_precision):
    """The dtype of the frozen models under a --mixed_precision; what is trained stays in float32."""
    return PRECISIONS[mixed_precision]


def to_device(args, accelerator, model, baseline_vae):
    """Move the networks to the device; returns the trained one as rollout and sweep call it.

    accelerate's own `prepare` would add autocast, under which weights and activations are cast at every layer, and
    DistributedDataParallel, which would synchronise at each of a sweep's T backward calls. The network is in the precision
    of --mixed_precision already, and gradients are averaged over the ranks once a step, see `average_gradients`.

    Raises:
        ValueError: for --cuda_graphs without an NVIDIA GPU.
    """
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.gradient_checkpointing == "on":
        model.network.enable_gradient_checkpointing()
    # Costs one more decoding per image, as much as one or two steps of its chain.
    recompute_blocks(model.pipeline.vae.decoder)
    place(args, model, accelerator)
    if baseline_vae is not None:
        baseline_vae.to(accelerator.device)
    if args.cuda_graphs:
        if accelerator.device.type != "cuda":
            raise ValueError(f"--cuda_graphs needs an NVIDIA GPU, and this run is on {accelerator.device.type}")
        return GraphedNetwork(model.network)
    return model.network


def generators_of(args, accelerator, step, index):
    """A CPU generator for each image of a micro-batch.

    An image's noise depends on the seed, the step and its place among the step's images only, whatever the ranks and
    devices.
    """
    first = (index * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
    places = range(first, first + args.train_batch_size)
    seeds = [random.Random(f"{args.seed}/{step}/{place}").getrandbits(63) for place in places]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def lock(output_dir):
    """Keep other processes of this machine from running in the same output folder.

    A launcher may end at Ctrl-C while the run, which it leaves behind, finishes its step and writes a checkpoint.

    Raises:
        ValueError: if another process has it.
    """
    folder = os.path.realpath(output_dir)
    if folder in LOCKS:
        return
    name = hashlib.sha256(f"{getattr(os, 'getuid', getpass.getuser)()}:{folder}".encode()).hexdigest()[:16]
    held = FileLock(os.path.join(tempfile.gettempdir(), f"rlr-{name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--output_dir {output_dir!r}: a run is still writing into it; after Ctrl-C it finishes a step and saves a checkpoint"
        ) from None
    LOCKS[folder] = held


def unlock(output_dir):
    """Let other processes run in an output folder, after a run."""
    held = LOCKS.pop(os.path.realpath(output_dir), None)
    if held is not None:
        with suppress(OSError):
            os.remove(held.lock_file)
        held.release()


@contextmanager
def stopping_after_a_step(accelerator):
    """Within it, the first Ctrl-C or SIGTERM, on whatever rank, sets accelerate's trigger; a later one stops at once."""
    asked = None

    def stop(number, frame):
        nonlocal asked
        if asked is None:
            asked = time.monotonic()
            accelerator.set_trigger()
            if accelerator.is_main_process:  # print() must not be called within a handler
                with suppress(OSError):  # nobody may read it any more
                    os.write(
                        2,
                        b"\nstopping: this step is finished and a checkpoint saved; Ctrl-C again stops without one\n",
                    )
        # Within two seconds it is the same one: torchrun passes on what the terminal has already sent to the ranks.
        elif time.monotonic() - asked > 2:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
