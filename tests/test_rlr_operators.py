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
"""The benchmark that counts the operators of a denoising step, and what a layer of the LoRA adds to them."""

import csv

import operators
import torch
from diffusion_models.lora_layer import LoraLinear
from operators import Operators, add_run_lora, counted, in_bf16, networks


def test_operators_are_counted_with_what_they_read_and_write():
    x, weight = torch.zeros(4, 10), torch.zeros(10, 10)
    with Operators() as seen:
        product = x @ weight  # 160 and 400 bytes in, 160 out
        product.view(40).add_(1)  # 160 in and out; the view is none
        torch.empty(1000).view(10, 100).T.detach()
        weight[:1].expand(4, 10) + x  # 40 and 160 in, 160 out
    assert (seen.count, seen.bytes) == (3, 720 + 320 + 360)


def test_flops_are_those_of_products_and_of_attention():
    q = torch.zeros(1, 2, 8, 4, requires_grad=True)
    result, _, _, tflop = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert round(1e12 * tflop) == 2 * 2 * 2 * 8 * 8 * 4  # two products of 8 x 8 x 4 in each of two heads
    _, _, _, tflop = counted(lambda: result.sum().backward())
    assert round(1e12 * tflop) == 5 * 2 * 2 * 8 * 8 * 4


def test_a_layer_adds_two_operators_to_a_forward_and_seven_to_a_swept_step(tmp_path, capsys):
    """For the layers whose input has no gradient, as of prompts, two less; and three for the gradients of all."""
    bare, ours = operators.main(["--quick", "--out", str(tmp_path)])
    (network,) = networks(quick=True)
    called = in_bf16(network)
    add_run_lora(called, network.family)
    names = [name for name, module in called.named_modules() if isinstance(module, LoraLinear)]
    of_prompts = [name for name in names if "attn2.to_k" in name or "attn2.to_v" in name]
    assert ours["forward_operators"] - bare["forward_operators"] == 2 * len(names)
    assert ours["swept_operators"] - bare["swept_operators"] == 7 * len(names) - 2 * len(of_prompts) + 3
    assert ours["swept_operators"] == ours["forward_operators"] + ours["kept_operators"]
    assert 0 < bare["graph_gib_per_image"] < ours["graph_gib_per_image"] < 1.2 * bare["graph_gib_per_image"]
    assert "swept step 1." in capsys.readouterr().out
    with open(tmp_path / "operators.csv", encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# python benchmarks/operators.py --quick")
        assert [row["lora"] for row in csv.DictReader(file)] == ["False", "True"]
