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
"""What a denoising step asks of a GPU with and without the LoRA that is trained: operators, bytes, FLOPs and graph.

    python benchmarks/operators.py              or, for a short test on small networks, with --quick

The networks have the configurations of the Hub and run in bf16 on tensors without values: each operator that would launch a
kernel is counted, with the bytes that it reads and writes, and nothing is computed. The forward is a guided one. A swept step
is a forward and its vector-Jacobian product; if its graph was kept from the rollout, only the product. The LoRA has been
called before, so its matrices are already in bf16 and have gradients, as in all but the first step of a sweep. Prints a table
and writes operators.csv.
"""

import math
import os
import platform
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import torch
from bench_common import VERSIONS, make_parser, parse_benchmark, write_csv
from bench_networks import SD14_UNET
from diffusion_models.adapters import add_lora
from diffusion_models.base import DiffusionModel
from diffusion_models.stable_diffusion import StableDiffusion
from diffusion_models.stable_diffusion_3 import StableDiffusion3
from diffusion_models.stable_diffusion_xl import StableDiffusionXL
from rlr_training.memory import GIB, LiveBytes
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm
from train_rlr_sd import parse_args

from diffusers import SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel


aten = torch.ops.aten
# Beside views and questions about a tensor, the operators that only hand out memory.
WITHOUT_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
# Of the shapes of their arguments. torch itself counts the attention of a GPU only.
ATTENTION_FLOPS = {
    ATTENTION: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    ATTENTION_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}

# The entries of the Hub's config.json files that are not the classes' defaults.
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# Of the same classes, for --quick.
TINY_UNET = {"sample_size": 8, "block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8}
TINY_SD14 = {
    **{**TINY_UNET, "cross_attention_dim": 32},
    **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
}


class Network(NamedTuple):
    """A network to count.

    Attributes:
        model: what the table calls it.
        make: its class.
        config: the arguments of the class.
        latents: shape of an image's or a video's latents.
        family: whose layers get the LoRA.
        conditions: `conditions(batch) -> {name: shape}` of what it is given beside latents and timestep.
    """

    model: str
    make: Callable
    config: dict
    latents: tuple
    family: Any
    conditions: Callable

    def call(self, network, x):
        """The prediction for latents (B, ...)."""
        given = {name: torch.zeros(shape, dtype=x.dtype) for name, shape in self.conditions(len(x)).items()}
        if "time_ids" in given:
            given["added_cond_kwargs"] = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
        return network(x, timestep=torch.ones(len(x)), return_dict=False, **given)[0]


def text(width, length, **pooled):
    """The conditions of a network that reads embeddings (B, length, width) and others, (B, width) each."""
    return lambda batch: {
        "encoder_hidden_states": (batch, length, width),
        **{name: (batch, width) for name, width in pooled.items()},
    }


def networks(quick):
    """The `Network`s of the table."""
    if quick:
        return [Network("tiny", UNet2DConditionModel, TINY_SD14, (4, 8, 8), StableDiffusion, text(32, 7))]
    sdxl, sd35 = text(2048, 77, text_embeds=1280, time_ids=6), text(4096, 333, pooled_projections=2048)
    return [
        Network("SD 1.4", UNet2DConditionModel, SD14_UNET, (4, 64, 64), StableDiffusion, text(768, 77)),
        Network("SDXL", UNet2DConditionModel, SDXL_UNET, (4, 128, 128), StableDiffusionXL, sdxl),
        Network("SD 3.5 M", SD3Transformer2DModel, SD35_MEDIUM, (16, 128, 128), StableDiffusion3, sd35),
        Network("Wan 2.1 1.3B", WanTransformer3DModel, WAN_SMALL, (16, 21, 60, 104), DiffusionModel, text(4096, 512)),
    ]


class Operators(TorchDispatchMode):
    """Counts the operators that launch kernels, one over a list of tensors once, and the bytes that they read and write.

    Attributes:
        count, bytes: so far.
    """

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim" and not func.is_view and func.overloadpacket not in WITHOUT_KERNEL:
            self.count += 1
            self.bytes += sum(map(size_of, tree_leaves((args, kwargs, out))))
        return out


def size_of(value):
    """Bytes of a tensor, where it is expanded those of one; 0 for anything else."""
    if not isinstance(value, torch.Tensor):
        return 0
    return value.itemsize * math.prod(size for size, stride in zip(value.shape, value.stride()) if stride != 0)


def counted(run):
    """(result, operators, GB moved, TFLOP) of `run()`."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as flops, Operators() as operators:
        result = run()
    return result, operators.count, operators.bytes / 1e9, flops.get_total_flops() / 1e12


def in_bf16(network):
    """A frozen network in bf16, but for the modules that its class keeps in float32; its weights are never written."""
    with torch.device("meta"):
        made = network.make(**network.config).requires_grad_(False)
    kept = made._keep_in_fp32_modules or ()
    for name, module in made.named_modules():
        if not any(part in name.split(".") for part in kept):
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                tensor.data = tensor.data.bfloat16()
    return made.to_empty(device="cpu")


def add_run_lora(network, family):
    """Give the network the LoRA of a run without flags."""
    rank, model = parse_args([]).rank, SimpleNamespace(networks={family.trained: network})
    add_lora(model, rank=rank, alpha=rank, layers=family.lora_layers.split(","))


def count(network, batch_size, lora):
    """A row: counts of a batch, guided, with a new LoRA or without one."""
    called = in_bf16(network)
    if lora:
        add_run_lora(called, network.family)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(2 * batch_size, *network.latents, dtype=torch.bfloat16, requires_grad=True)
        cotangent = torch.zeros_like(x)
        network.call(called, x).backward(cotangent)
        with LiveBytes() as live:
            prediction, *forward = counted(lambda: network.call(called, x))
            graph = live.now
        _, *product = counted(lambda: prediction.backward(cotangent))
    row = {"model": network.model, "lora": lora, "batch_size": batch_size}
    swept = [a + b for a, b in zip(forward, product)]
    for phase, figures in {"forward": forward, "swept": swept, "kept": product}.items():
        row.update(zip((f"{phase}_operators", f"{phase}_gb", f"{phase}_tflop"), figures))
    return {**row, "graph_gib_per_image": graph / GIB / batch_size}


def print_table(rows):
    phases = {"forward": "forward", "swept": "swept step", "kept": "graph kept"}
    heads = "".join(f"{f'{name}: operators, GB, TFLOP':>40}" for name in phases.values())
    print(f"{'model':<14}{'LoRA':<6}{'batch':>5}{heads}{'graph, GiB an image':>22}")
    for row in rows:
        figures = "".join(
            f"{row[f'{phase}_operators']:>20}{row[f'{phase}_gb']:>10.1f}{row[f'{phase}_tflop']:>10.2f}"
            for phase in phases
        )
        print(
            f"{row['model']:<14}{'yes' if row['lora'] else 'no':<6}{row['batch_size']:>5}{figures}"
            f"{row['graph_gib_per_image']:>22.2f}"
        )
    for bare, ours in zip(rows[::2], rows[1::2]):
        ratios = [
            f"{name} {ours[f'{phase}_operators'] / bare[f'{phase}_operators']:.2f} times the operators and"
            f" {ours[f'{phase}_gb'] / bare[f'{phase}_gb']:.2f} times the bytes"
            for phase, name in phases.items()
        ]
        print(f"{bare['model']}, with the LoRA over without: {'; '.join(ratios)}")


def main(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=4, help="Images; the network sees twice as many.")
    args = parse_benchmark(parser, input_args)
    cases = [(network, lora) for network in networks(args.quick) for lora in (False, True)]
    rows = [count(network, args.batch_size, lora) for network, lora in tqdm(cases, desc="Networks")]
    header = (
        f"python benchmarks/operators.py{' --quick' if args.quick else ''}, {platform.machine()}, {VERSIONS}, counted in"
        " bf16, not computed"
    )
    print(header)
    print_table(rows)
    write_csv(rows, os.path.join(args.out, "operators.csv"), header)
    return rows


if __name__ == "__main__":
    main()
