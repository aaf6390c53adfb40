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
"""The frozen weights of a network, shared out among the ranks."""

import torch
from accelerate.utils import DynamoBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusers import ModelMixin


def check_sharding(args, accelerator):
    """Refuse --shard where nothing can be shared out, or a compiler is set.

    Raises:
        ValueError: saying what is in the way.
    """
    if not args.shard:
        return
    if accelerator.num_processes == 1:
        raise ValueError(
            "--shard shares the network out among several processes, and there is one: start it with `accelerate launch"
            " --multi_gpu` or torchrun"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("--shard and accelerate's compiler: give one of them")


def shard(model, accelerator):
    """Leave each rank a part of every frozen weight, on its device; a block's are gathered while it is called.

    Every rank must call the network equally often from then on, since all of them take part in each call. What is trained
    stays whole on all ranks.

    Args:
        model: `DiffusionModel`, whose networks are on the CPU, so that no device ever holds more than a block of them.
        accelerator: accelerate's.
    """
    model.network.to(memory_format=torch.contiguous_format)  # FSDP shards no others, and U-Nets have them
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    trained = {parameter for parameter in model.network.parameters() if parameter.requires_grad}
    for module in gathered_at_once(model):
        # Also the outermost: a state_dict on one rank would shard it again, and the next call wait for the others.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def gathered_at_once(model):
    """The modules of a network whose weights are gathered together, the inner ones first, which an outer one leaves out.

    They are the blocks that it repeats, the levels of a U-Net, and the network itself, or each of several and all of them.
    """
    network = model.network
    levels = [level for name in ("down_blocks", "up_blocks") for level in getattr(network, name, ())]
    levels += [level for level in [getattr(network, "mid_block", None)] if level is not None]
    several = [part for part in network.children() if isinstance(part, ModelMixin)]
    return [*model.blocks, *levels, *several, network]
