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
"""What a run takes of the memory of its device, counted on its first calls, and their operations."""

import math
import weakref
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from diffusion_models.quantize import bytes_of_weight, stored_bytes, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .chains import size_of
from .offload import frozen_weights
from .sharding import gathered_at_once


logger = get_logger(__name__, log_level="INFO")

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, until they are released.

    Attributes:
        now, peak: bytes at the moment, and at most so far.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return out

    def release(self, key, size):
        self.storages.remove(key)
        self.now -= size


class Operations(TorchDispatchMode):
    """Counts floating-point operations, by torch's formulas.

    torch's own `FlopCounterMode` also follows the modules, with hooks that keep the graphs of checkpointed blocks until a
    backward pass has ended.

    Attributes:
        total: of the operations so far.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _tensors(tree):
    """The tensors in a tree, those that hold quantized ones included."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield from tensors_of(leaf)


class Footprint(NamedTuple):
    """Bytes that a run holds on each device. Sweep and scoring follow one another.

    Attributes:
        weights: of all networks that stay on the device.
        latents: latents and noises of the images of an optimizer step.
        sweep: of a swept step of a batch, and of the graphs that are kept beside it.
        scoring: of decoding and scoring as many images as are decoded at a time, with what is brought for that.
    """

    weights: int
    latents: int
    sweep: int
    scoring: int

    @property
    def peak(self):
        return self.weights + self.latents + max(self.sweep, self.scoring)

    def __str__(self):
        weights, latents, sweep, scoring = map(in_words, self)
        return (
            f"about {in_words(self.peak)} = {weights} weights + {latents} latents + the larger of {sweep} for a swept step and"
            f" {scoring} for scoring"
        )


def in_words(size):
    """A number of bytes as a person reads it."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def footprint(args, model, rewards, baseline_vae, swept_bytes, scored_bytes):
    """The `Footprint` of a run, by what one image takes.

    A GPU needs some more: for rounding and gaps of its allocator, workspaces and its context.

    Args:
        rewards: the rewards' modules.
        swept_bytes: of a swept step of an image.
        scored_bytes: of decoding and scoring an image.
    """
    vae, judges = stored_bytes(model.pipeline.vae), sum(map(stored_bytes, rewards))
    weights, brought = stored_bytes(model.network) + (0 if baseline_vae is None else stored_bytes(baseline_vae)), 0
    if args.offload_blocks:
        weights -= sum(_frozen_bytes(block) for block in model.blocks)
    for size, is_offloaded in ((vae, args.vae_offload), (judges, args.reward_offload)):
        weights, brought = (weights, brought + size) if is_offloaded else (weights + size, brought)
    latents = torch.Size(model.latents_shape(args.train_batch_size, size_of(args))).numel() * 4
    kept = 0 if args.keep_graphs == "auto" else args.keep_graphs
    return Footprint(
        weights=weights,
        latents=args.gradient_accumulation_steps * (2 * args.num_inference_steps + 1) * latents,
        sweep=brought_bytes(args, model)
        + args.train_batch_size * swept_bytes * (1 + args.gradient_accumulation_steps * kept),
        scoring=brought + args.decode_batch_size * scored_bytes,
    )


def brought_bytes(args, model):
    """Bytes of frozen weights that come to the device for a call: of a block, or with --shard of two, the next one ahead."""
    if args.shard:
        return sum(sorted(_gathered_bytes(model))[-2:])
    return max(map(_frozen_bytes, model.blocks)) if args.offload_blocks else 0


def _frozen_bytes(block):
    return sum(map(bytes_of_weight, frozen_weights(block)))


def _gathered_bytes(model):
    """Bytes of the frozen weights that are gathered together, for each of `gathered_at_once`."""
    within = set()
    for module in gathered_at_once(model):
        own = {id(weight): weight for weight in frozen_weights(module) if id(weight) not in within}
        within |= own.keys()
        yield sum(weight.nbytes for weight in own.values())  # of all ranks together


def warn_before_loading(args, size):
    """Warn of a network whose weights, of so many bytes, a GPU does not hold, before they are read."""
    savers = ["--mixed_precision bf16", "--quantize"]
    savers += [f"--{name}" for name in ("offload_blocks", "shard") if hasattr(args, name)]
    is_elsewhere = getattr(args, "offload_blocks", False) or getattr(args, "shard", False)
    if size > gpu_bytes() and not is_elsewhere:
        logger.warning(
            f"the weights of the network take {in_words(size)}, and the GPU has {in_words(gpu_bytes())}: use"
            f" {', '.join(savers[:-1])} or {savers[-1]}"
        )


def warn_if_too_much(expected):
    """Warn of a `Footprint` that is more than a GPU has."""
    if expected.peak > gpu_bytes():
        logger.warning(
            f"about {in_words(expected.peak)} will be needed, and the GPU has {in_words(gpu_bytes())}; see docs/cost.md for"
            " what saves some"
        )


def gpu_bytes():
    """The memory of this process's GPU; without one there is no limit."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else math.inf
