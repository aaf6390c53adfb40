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
"""Where the networks are: what rests on the CPU, and what the ranks share out."""

from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.training_utils import offload_models

from .sharding import shard


BUFFER = 2**30  # bytes of page-locked memory in a piece


class Visit(ModelHook):
    """Puts copies of a block's frozen weights on the device in their place for each call of the block.

    The copies are tensors of their own: the graph of a call holds them as long as it needs them, and no longer. diffusers' own
    group offloading changes the contents of the weights, and a backward pass would find those of the CPU.

    Args:
        block: with a LoRA, which stays on the device.
        device: of the copies.
    """

    def __init__(self, block, device):
        self.device = device
        self.resting = [
            (module, name, weight)
            for module in block.modules()
            for name, weight in module.named_parameters(recurse=False)
            if not weight.requires_grad
        ]

    def new_forward(self, module, *args, **kwargs):
        try:
            for owner, name, weight in self.resting:
                owner._parameters[name] = brought(weight, self.device)
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:  # also if memory runs out
            for owner, name, weight in self.resting:
                owner._parameters[name] = weight


def brought(weight, device):
    """A copy of a frozen weight on a device."""
    return torch.nn.Parameter(weight.to(device, non_blocking=True, copy=True), requires_grad=False)


def pinned(weights, pin_memory=True):
    """Move weights into page-locked memory, from which a GPU copies faster.

    Their buffers are of 1 GiB, the last of a power of two, since torch rounds page-locked memory up to that: weight by weight
    it would take up to twice as much.
    """
    left = sum(_aligned(weight.nbytes) for weight in weights)
    buffer, start = torch.empty(0, dtype=torch.uint8), 0
    for weight in weights:
        if start + weight.nbytes > len(buffer):
            size = max(min(left, BUFFER), weight.nbytes)
            buffer, start = torch.empty(_power_of_two(size), dtype=torch.uint8, pin_memory=pin_memory), 0
        place = buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = place.copy_(weight.data)
        start, left = start + _aligned(weight.nbytes), left - _aligned(weight.nbytes)


def _aligned(size):
    return -(-size // 64) * 64


def _power_of_two(size):
    return 1 << (size - 1).bit_length()


def frozen_weights(module):
    return [weight for weight in module.parameters() if not weight.requires_grad]


def offload_blocks(network, blocks, device):
    """Move a network to a device, but for the frozen weights of its blocks, which come for each call of their block.

    A backward pass needs them once more. Each block is checkpointed, so its call is repeated then.

    Args:
        network: with a LoRA.
        blocks: modules of the network, none part of another.
        device: a `torch.device`.
    """
    resting = {id(weight): weight for block in blocks for weight in frozen_weights(block)}
    if device.type == "cuda":
        pinned([weight for weight in resting.values() if type(weight.data) is torch.Tensor])
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.requires_grad:
                weight.data = weight.data.to(device)
            elif id(weight) not in resting:
                module._parameters[name] = brought(weight, device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    for block in blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Visit(block, device), "visit")
    network.enable_gradient_checkpointing(repeated_whole)


def repeated_whole(block, *args):
    """A checkpointed block whose call is repeated to its end, or its weights would stay on the device."""
    with set_checkpoint_early_stop(False):
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


def place(args, model, state):
    """Move network and VAE to the device, but for what --shard, --offload_blocks and --vae_offload leave elsewhere.

    Args:
        args: of a script; an evaluation has none of these flags.
        model: `DiffusionModel`, on the CPU, with its LoRA.
        state: accelerate's `PartialState`, or its `Accelerator`.
    """
    if getattr(args, "shard", False):
        shard(model, state)
    if getattr(args, "offload_blocks", False):
        offload_blocks(model.network, model.blocks, state.device)
    else:
        model.network.to(state.device)
    if not getattr(args, "vae_offload", False):
        model.pipeline.vae.to(state.device)


@contextmanager
def decoding(args, model, device, vae=None):
    """Within it, the VAE is on the device, which with --vae_offload it is not outside.

    Args:
        vae: the one that decodes, if not the model's own.
    """
    offload = getattr(args, "vae_offload", False) and vae is None  # an evaluation has no such flag
    with offload_models(model.pipeline.vae, device=device, offload=offload):
        yield
