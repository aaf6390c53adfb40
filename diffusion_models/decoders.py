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
"""Decoders whose gradient takes little memory: the backward pass computes again what it needs, one block at a time."""

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


# What diffusers' decoders call their blocks, in lists and alone.
BLOCKS = ("resnets", "attentions", "upsamplers")
BLOCK = "upsampler"


def computed_again(function, *args, **kwargs):
    """function(*args, **kwargs), of which the backward pass computes again what it needs.

    The tensors in lists and dicts are found as well. Of others a `computed_again` around this one could not let go.
    """
    leaves, form = tree_flatten((args, kwargs))

    def call(*leaves):
        args, kwargs = tree_unflatten(leaves, form)
        return function(*args, **kwargs)

    return checkpoint(call, *leaves, use_reentrant=False)


def recompute_blocks(decoder):
    """Have the graph of a decoder keep the inputs of its blocks alone.

    The numbers stay the same. diffusers' own checkpointing would hold all blocks of a resolution at once, of which the last
    are the largest by far, and the decoders of Wan and Qwen-Image have none.
    """
    for block in decoder_blocks(decoder):
        block.forward = _recomputed(block)


def decoder_blocks(decoder):
    """The residual, attention and upsampling blocks of a decoder."""
    for name, module in decoder.named_modules():
        *_, parent, own = ("", *name.split("."))
        if parent in BLOCKS or own == BLOCK:
            yield module


def _recomputed(block):
    """The forward of a block of a decoder, computed again by the backward pass.

    A decoder of videos may hand on a list, of which each convolution replaces the entry of its number by the features that
    it will need at the next frames. The second call gets the entries as the first one found them.
    """
    forward = block.forward
    convolutions = sum(type(module).__name__.endswith("CausalConv3d") for module in block.modules())

    def call(x, *args, feat_cache=None, feat_idx=(0,), **kwargs):
        if args and isinstance(args[0], list):
            feat_cache, feat_idx, *args = args
        if feat_cache is None:
            return computed_again(forward, x, *args, **kwargs)
        first = feat_idx[0]
        own = slice(first, first + convolutions)

        def with_cache(x, found):
            cache, index = [None] * first + found, [first]
            return forward(x, feat_cache=cache, feat_idx=index), cache[own], index[0]

        x, feat_cache[own], feat_idx[0] = computed_again(with_cache, x, feat_cache[own])
        return x

    return call
