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
"""Frozen weights in four or eight bits, by diffusers' own quantization."""

from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from diffusers import BitsAndBytesConfig, TorchAoConfig


# {what it is called: the library that it needs}
LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
# {what it is called: bytes of a weight}; nf4 has four bits and a float32 for each 64 weights.
BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}


def quantization_config(kind, dtype):
    """The `quantization_config` of a network's `from_pretrained`.

    Args:
        kind: "nf4" for the four bits of QLoRA (huggingface.co/papers/2305.14314), "int8" or "fp8" for eight, with a scale for
            each row.
        dtype: that the network computes in.

    Raises:
        ValueError: if its library, or for nf4 a GPU, is missing.
    """
    library = LIBRARIES[kind]
    if find_spec(library) is None:
        raise ValueError(f"quantization to {kind} needs {library}: pip install {library}")
    if kind == "nf4":
        if not torch.accelerator.is_available():
            raise ValueError("quantization to nf4 needs a GPU: without one use int8")
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig({"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]())


class FrozenLinear(torch.autograd.Function):
    """y = W x + b, whose graph keeps W as it is stored, and not the copy in half precision that torchao multiplies with."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        y = F.linear(x, weight, bias)
        return y.clone() if y._is_view() else y  # a LoRA adds to it in its place

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight.dequantize().to(grad.dtype), None, None


def keep_quantized(network):
    """Have the frozen layers of a network that torchao has quantized keep nothing else for the backward pass."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear) and hasattr(layer.weight, "__tensor_flatten__"):
            layer.forward = partial(_forward, layer)


def _forward(layer, x):
    return FrozenLinear.apply(x, layer.weight, layer.bias)


def stored_bytes(module):
    """Bytes of the weights of a module as they are stored in this process, the scales of quantized ones included."""
    return sum(map(bytes_of_weight, module.parameters()))


def bytes_of_weight(weight):
    """Bytes of a weight as it is stored in this process."""
    return sum(tensor.nbytes for part in tensors_of(weight) for tensor in _with_scales(part))


def tensors_of(tensor):
    """The plain tensors that hold a tensor, or this process's part of it."""
    if isinstance(tensor, DTensor):
        yield from tensors_of(tensor.to_local())
    elif hasattr(tensor, "__tensor_flatten__"):  # torchao
        for name in tensor.__tensor_flatten__()[0]:
            yield from tensors_of(getattr(tensor, name))
    else:
        yield tensor


def _with_scales(weight):
    yield weight
    state = getattr(weight, "quant_state", None)  # bitsandbytes
    if state is not None:
        yield from (tensor for tensor in state.as_dict(packed=True).values())
