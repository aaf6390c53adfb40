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
"""The calls of a network, replayed as CUDA graphs.

A GPU computes a call of a U-Net or transformer in less time than a CPU needs to launch its thousands of kernels one by one. A
CUDA graph launches them all at once.
"""

import torch
from accelerate.logging import get_logger
from diffusion_models.lora_layer import copies_of, lora_linears
from reward_models.loading import first_line
from torch.utils._pytree import tree_flatten, tree_unflatten


logger = get_logger(__name__, log_level="INFO")

# Relative difference from the network itself up to which a graph is taken for the same: some kernels add up in another order
# from call to call.
TOLERANCE = 0.05
# Each graph keeps the activations of a call.
MOST_GRAPHS = 2


class GraphedNetwork:
    """A network whose calls, forward and backward, are recorded once for each shape of their tensors and then replayed.

    A call that cannot be recorded, or that gives something else when replayed, is made as without this class, with a warning.
    So are calls without the adapter. Only one call is in memory at a time: a backward pass must come before the next call.

    Args:
        network: on a GPU, with a LoRA of `LoraLinear`s.
    """

    def __init__(self, network):
        self.network, self.recorded = network, {}
        self.layers = lora_linears(network)

    def __call__(self, *args, **kwargs):
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # Recordings have a gradient with respect to the latents, which come first.
        is_disabled = any(layer.disable_adapters for layer in self.layers)
        if is_disabled or any(tensor.requires_grad for tensor in tensors[1:]):
            return self.network(*args, **kwargs)
        others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        key = (str(form), str(others), *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self.recorded:
            self.recorded[key] = self._recording(leaves, form)
        recording = self.recorded[key]
        return self.network(*args, **kwargs) if recording is None else recording(tensors)

    def _recording(self, leaves, form):
        """A `Recording` of the call with these leaves, or `None` if there can be none."""
        if len(self.recorded) >= MOST_GRAPHS:
            return None
        try:
            recording = Recording(self.network, leaves, form)
            difference = recording.difference([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network may do anything that cannot be recorded
            logger.warning(f"the network's calls cannot be CUDA graphs and are made one by one: {first_line(error)}")
            return None
        if not difference <= TOLERANCE:
            logger.warning(
                f"CUDA graphs of the network differ from it by {difference:.2g}: its calls are made one by one"
            )
            return None
        return recording


class Recording:
    """A call of a network as CUDA graphs of its forward and its backward pass.

    Args:
        network: of `GraphedNetwork`.
        leaves, form: of the call's arguments, from `tree_flatten`.

    Raises:
        Exception: if the call cannot be recorded.
    """

    @torch.enable_grad()  # a rollout records nothing for a backward pass
    def __init__(self, network, leaves, form):
        self.call = TensorCall(network, leaves, form)
        # Replaying writes the tensors of a call into these.
        samples = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        samples[0].requires_grad_()
        torch.cuda.make_graphed_callables(self.call, tuple(samples), allow_unused_input=True)

    def __call__(self, tensors):
        self.call.refresh()
        # The next replay writes over the outputs.
        outputs = [output.clone() for output in self.call(*tensors)]
        return tree_unflatten(outputs, self.call.output_form)

    @torch.enable_grad()
    def difference(self, tensors):
        """The largest relative difference of output and gradients from those of the network itself."""
        results = []
        for call in (self.call.of_network, self.call):
            x = tensors[0].detach().requires_grad_()
            output = call(x, *tensors[1:])[0].clone()
            gradients = torch.autograd.grad(output, (x, self.call.copies), output.detach())
            results.append([output.detach(), *(gradient.clone() for gradient in gradients)])
        return max(((a - b).float().norm() / a.float().norm()).item() for a, b in zip(*results))


class TensorCall(torch.nn.Module):
    """A call of a network as a function of its tensors, from copies of the LoRA that stay in their place.

    Gradients of the copies are added to those of the LoRA.
    """

    def __init__(self, network, leaves, form):
        super().__init__()
        self.lora = copies_of(network)
        if sum(p.numel() for p in network.parameters() if p.requires_grad) != self.lora.vector().numel():
            raise ValueError("the adapter has layers that are not linear")
        self.copies = torch.nn.Parameter(self.lora.vector())
        self.copies.register_post_accumulate_grad_hook(self.lora.add_gradient)
        self.version = self.lora.version()
        self.network = (network,)  # no submodule: the graphs need to know no parameters but the copies
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.form, self.output_form = form, None

    def forward(self, *tensors):
        return self.of_network(*tensors)

    def of_network(self, *tensors):
        """The outputs of the network; `forward` is replaced by the recorded graphs."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.form)
        with self.lora.used(self.copies):
            outputs, self.output_form = tree_flatten(self.network[0](*args, **kwargs))
        return tuple(outputs)

    @torch.no_grad()
    def refresh(self):
        """Copy the LoRA anew if it has changed."""
        version = self.lora.version()
        if version != self.version:
            self.copies.copy_(self.lora.vector())
            self.version = version
