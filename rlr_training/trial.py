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
"""The first calls of a model: whether it can draw, what its calls cost, and whether the compiler manages them."""

from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, gather_object
from reward_models.loading import first_line
from rlr_utils.kept_graphs import spare_bytes

from diffusers.training_utils import free_memory

from .chains import size_of
from .errors import is_out_of_memory
from .memory import LiveBytes, Operations, brought_bytes
from .offload import decoding


logger = get_logger(__name__, log_level="INFO")


class Costs(NamedTuple):
    """Floating-point operations of the calls for one image or video, as torch counts them, and bytes.

    Attributes:
        forward, swept: of the network, guided: a forward pass, and one with its vector-Jacobian product.
        decode: of the decoder, without a gradient.
        predict: of the decoder of predicted images.
        swept_bytes: that a swept step takes, but for weights that are brought for it.
    """

    forward: int
    swept: int
    decode: int
    predict: int
    swept_bytes: int


def settle_memory(args, model, chain, chain_of):
    """Set --guidance_batching and --gradient_checkpointing where they are auto.

    They are joint and off, or on a GPU the first of the slower ones with which a swept step of a batch leaves a tenth of the
    memory free.

    Args:
        model: `DiffusionModel`, on the device.
        chain: of the run, without prompts, which gets the setting of guidance.
        chain_of: `chain_of(chain) -> DenoisingChain` of a batch.
    """
    halves = ("joint", "split") if chain_of(chain).guided else ("joint",)
    settings = list(
        product(
            ("off", "on") if args.gradient_checkpointing == "auto" else [args.gradient_checkpointing],
            halves if args.guidance_batching == "auto" else [args.guidance_batching],
        )
    )
    x = torch.zeros(model.latents_shape(args.train_batch_size, size_of(args)), device=chain.timesteps.device)
    for checkpointing, batching in settings:
        chain.split_guidance = batching == "split"
        if checkpointing == "on" and not model.network.is_gradient_checkpointing:
            model.network.enable_gradient_checkpointing()
        is_last = (checkpointing, batching) == settings[-1]
        if is_last or has_room(partial(sweep_once, model, chain_of(chain), x), x.device):
            break
    args.gradient_checkpointing, args.guidance_batching = checkpointing, batching
    if (checkpointing, batching) != settings[0]:
        logger.info(f"to fit: --gradient_checkpointing {checkpointing} --guidance_batching {batching}")


def has_room(run, device):
    """Whether run() leaves a tenth of a GPU's memory free, on every rank.

    On other devices it is not called, and the answer is yes.
    """
    if device.type != "cuda":
        return True
    free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run()
        has_room_here = spare_bytes(device) > 0
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        has_room_here = False
    return all(gather_object([has_room_here]))


def sweep_once(model, chain, x):
    """Take a step of latents x (B, ...) with its gradient."""
    try:
        chain.mean(chain.num_steps, x.requires_grad_()).sum().backward()
    finally:
        model.network.zero_grad()


def try_model(args, model, chain, baseline_vae):
    """Call network and decoders once, so that a model that cannot draw is refused before anything is written.

    Args:
        model: `DiffusionModel`.
        chain: of one prompt, with the network that is not compiled.
        baseline_vae: that decodes predicted images, or `None` for the model's own.

    Returns:
        `Costs`.

    Raises:
        ValueError: naming the model, or --baseline_vae.
    """
    x = torch.zeros(model.latents_shape(1, size_of(args)), device=chain.timesteps.device, requires_grad=True)
    name = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r}"
    if args.shard:  # the first call makes all that weights are gathered in, which later ones fill and empty unseen
        with drawing_with(name):
            sweep_once(model, chain, x)
    with drawing_with(name), Operations() as counter, LiveBytes() as live:
        mean = chain.mean(chain.num_steps, x)
        forward = counter.total
        mean.sum().backward()
    model.network.zero_grad()
    decode = predict = try_decoder(args, name, model, mean.detach())
    if baseline_vae is not None:
        predict = try_decoder(args, f"--baseline_vae {args.baseline_vae!r}", model, mean.detach(), baseline_vae)
    swept_bytes = live.peak - (brought_bytes(args, model) if args.offload_blocks else 0)
    return Costs(forward, counter.total, decode, predict, swept_bytes)


@torch.no_grad()
def try_decoder(args, name, model, latents, vae=None):
    """The operations of decoding latents (1, ...).

    Raises:
        ValueError: naming what holds the decoder, if it cannot.
    """
    with drawing_with(name), Operations() as counter, decoding(args, model, latents.device, vae):
        images = model.decode(latents, vae)
    if not images.isfinite().all():
        raise ValueError(
            f"{name} draws images that are not finite: its weights are damaged, or overflow with --mixed_precision"
            f" {args.mixed_precision}"
        )
    return counter.total


@contextmanager
def drawing_with(name):
    """Within it, an error but for want of memory is a ValueError that says what cannot draw."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{name} cannot draw an image: {type(error).__name__}: {first_line(error)}") from error


def compile_blocks(args, accelerator, model, chain, schedule):
    """Compile the blocks that the network repeats, if accelerate is set to a compiler; where that fails they stay as they are.

    All blocks of a class share one compilation, where one of the whole network would take minutes.

    Args:
        chain: of a batch, with the calls that rollout and sweep will make.
        schedule: of the sweep.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    blocks = model.blocks
    for block in blocks:
        block.compile(**plugin.to_kwargs())
    x = torch.zeros(model.latents_shape(args.train_batch_size, size_of(args)), device=chain.timesteps.device)
    passed_on = schedule.mixing[2 : schedule.stop_after + 1]
    try:
        with torch.no_grad():
            chain.mean(chain.num_steps, x)
        chain.mean(chain.num_steps, x.requires_grad_(args.keep_graphs != 0 or any(passed_on))).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may raise anything
        logger.warning(f"the network cannot be compiled and runs as it is: {first_line(error)}")
        for block in blocks:
            block._compiled_call_impl = None
    finally:
        model.network.zero_grad()
