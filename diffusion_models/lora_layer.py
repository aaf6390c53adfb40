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
"""The linear layers of a LoRA in training: peft's, at two operators a call beside those of the frozen layer."""

from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear


TRAINED_ADAPTER = "default"  # peft's name for an adapter that gets none


class LoraLinear(Linear):
    """A frozen linear layer with its update, y = W x + b + s B A x.

    A and B are trained in float32. peft casts x and y to and fro for them, which in half precision takes longer than the
    products. Here they are cast instead, see `LoraCopies`.

    Attributes:
        copies: (A, B) in the dtype of W x, or `None` where A and B themselves have it.
    """

    copies = None

    @property
    def dtype(self):
        """The dtype of W x, which is not that of quantized weights."""
        base = self.base_layer
        return getattr(base, "compute_dtype", base.weight.dtype)

    def forward(self, x, *args, **kwargs):
        is_alone = self.active_adapters == [TRAINED_ADAPTER] and not (self.disable_adapters or self.merged)
        if args or kwargs or not is_alone or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        A, B = self.copies or self.matrices
        rows = x.flatten(0, -2)
        # Nobody else has seen y, and the backward pass does not need it: the update is added in its place.
        y = self.base_layer(rows).addmm_(rows @ A.mT, B.mT, alpha=self.scaling[TRAINED_ADAPTER])
        return y.unflatten(0, x.shape[:-1])

    @property
    def matrices(self):
        """(A, B) that are trained, (rank, inputs) and (outputs, rank)."""
        return self.lora_A[TRAINED_ADAPTER].weight, self.lora_B[TRAINED_ADAPTER].weight


class LoraCopies:
    """Gives the `LoraLinear`s of a network copies of their matrices in the dtype of the frozen weights.

    It is called before each forward pass, and casts all matrices at once if one has changed. In half precision the matrices
    themselves would not change: .05 + 1e-4 is .05 in bfloat16. Gradients of the copies are added to `.grad` of the matrices
    at the end of each backward pass, so that those of all steps of a chain add up in float32.

    Autograd's version counters tell whether a matrix has changed. What writes past autograd must increment them, as with
    `torch.autograd.graph.increment_version`.
    """

    def __init__(self, layers):
        self.layers, self.dtype = layers, layers[0].dtype
        self.matrices = [matrix for layer in layers for matrix in layer.matrices]
        self.state = None

    @torch.compiler.disable
    def __call__(self, network, args):
        """A forward pre-hook."""
        state = self.version()
        if state != self.state:
            self.cast()
            self.state = state

    def version(self):
        """What changes with every change of a matrix."""
        return sum(matrix._version for matrix in self.matrices), self.matrices[0].device

    def vector(self):
        """All matrices in one vector, in the dtype of the network."""
        return torch.cat([matrix.detach().flatten() for matrix in self.matrices]).to(self.dtype)

    def cast(self):
        """Make new copies. Graphs that hold the former ones stay valid."""
        flat = self.vector().requires_grad_()
        flat.register_post_accumulate_grad_hook(self.add_gradient)
        self.hand_out(flat)

    @torch.enable_grad()
    def hand_out(self, flat):
        """Have the layers use the parts of a vector as their copies."""
        copies = self.split(flat)
        for layer, A, B in zip(self.layers, copies[::2], copies[1::2]):
            layer.copies = A, B

    @contextmanager
    def used(self, flat):
        """Within it, the layers use the parts of a vector, and do not look whether a matrix has changed."""
        before, state = [layer.copies for layer in self.layers], self.state
        self.hand_out(flat)
        self.state = self.version()
        try:
            yield
        finally:
            for layer, copies in zip(self.layers, before):
                layer.copies = copies
            self.state = state

    @torch.no_grad()
    def add_gradient(self, flat):
        """Add the gradient of the copies to that of the matrices."""
        gradients, flat.grad = self.split(flat.grad.to(torch.float32, copy=True)), None
        if self.matrices[0].grad is not None:
            torch._foreach_add_([matrix.grad for matrix in self.matrices], gradients)
            return
        for matrix, gradient in zip(self.matrices, gradients):
            matrix.grad = gradient

    def split(self, flat):
        """The parts of a vector in the shapes of the matrices."""
        parts = flat.split([matrix.numel() for matrix in self.matrices])
        return [part.view_as(matrix) for part, matrix in zip(parts, self.matrices)]


def lora_linears(network):
    """The layers of a network with a LoRA that are linear."""
    return [module for module in network.modules() if isinstance(module, LoraLinear)]


def cast_in_forward(network):
    """Have a network in half precision, whose LoRA is in float32, make `LoraCopies` for its calls."""
    layers = [layer for layer in lora_linears(network) if layer.dtype != layer.matrices[0].dtype]
    if layers:
        network.register_forward_pre_hook(LoraCopies(layers))


def copies_of(network):
    """What gives a network its copies, or, for one in float32, what can."""
    for hook in network._forward_pre_hooks.values():
        if isinstance(hook, LoraCopies):
            return hook
    return LoraCopies(lora_linears(network))
