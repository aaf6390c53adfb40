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
"""What a run takes of the memory of its device, counted on its first calls."""

import math
import weakref
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from diffusion_models.quantize import bytes_of_weight, stored_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .chains import size_of


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
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
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
    if args.offload_blocks:  # what is brought for a step is among `swept_bytes`
        in_blocks = (weight for block in model.blocks for weight in block.parameters())
        weights -= sum(bytes_of_weight(weight) for weight in in_blocks if not weight.requires_grad)
    for size, is_offloaded in ((vae, args.vae_offload), (judges, args.reward_offload)):
        weights, brought = (weights, brought + size) if is_offloaded else (weights + size, brought)
    latents = torch.Size(model.latents_shape(args.train_batch_size, size_of(args))).numel() * 4
    kept = 0 if args.keep_graphs == "auto" else args.keep_graphs
    return Footprint(
        weights=weights,
        latents=args.gradient_accumulation_steps * (2 * args.num_inference_steps + 1) * latents,
        sweep=args.train_batch_size * swept_bytes * (1 + args.gradient_accumulation_steps * kept),
        scoring=brought + args.decode_batch_size * scored_bytes,
    )


def warn_before_loading(args, size):
    """Warn of a network whose weights, of so many bytes, a GPU does not hold, before they are read."""
    is_elsewhere = getattr(args, "offload_blocks", False) or getattr(args, "shard", False)
    if size > gpu_bytes() and not is_elsewhere:
        logger.warning(
            f"the weights of the network take {in_words(size)}, and the GPU has {in_words(gpu_bytes())}: use --mixed_precision"
            " bf16, --quantize, --offload_blocks or --shard"
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
