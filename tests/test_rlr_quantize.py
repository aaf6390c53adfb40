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
"""Frozen weights in eight and in four bits: the gradient is that of the same weights written out."""

import sys

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.adapters import add_lora
from diffusion_models.lora_layer import LoraLinear
from diffusion_models.quantize import bytes_of_weight, quantization_config, stored_bytes
from peft import LoraConfig, inject_adapter_in_model
from rlr_chains import gradients
from rlr_flow_models import tiny_flux, tiny_qwen_image, tiny_sd3
from rlr_models import PROMPTS, add_random_lora, chain_of, tiny_sdxl, train_on
from rlr_testing import TINY_SD, same_adapter
from rlr_training.memory import LiveBytes
from rlr_training.offload import offload_blocks
from rlr_utils import backward_sweep, full_bp, rollout
from rlr_video_models import tiny_wan_a14b

from diffusers import StableDiffusionXLPipeline


pytest.importorskip("torchao")
FOLDERS = {"sd3": tiny_sd3, "flux": tiny_flux, "qwen": tiny_qwen_image, "sdxl": tiny_sdxl, "wan": tiny_wan_a14b}


def written_out(folder, quantized):
    """The model of a folder with the weights of a quantized one."""
    model, weights = load_model(folder), dict(quantized.network.named_parameters())
    assert sum(type(weight.data) is not torch.Tensor for weight in weights.values()) > 10
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            other = weights[name]
            weight.copy_(other if type(other.data) is torch.Tensor else other.dequantize())
    return model


def swept(model, size):
    """Where a rollout ends, and the gradient of the LoRA."""
    for network in model.networks.values():
        add_random_lora(network)
    chain = chain_of(model, 3, size=size)
    x_T = torch.randn(model.latents_shape(len(PROMPTS), size), generator=torch.Generator().manual_seed(0))
    trajectory = rollout(chain, x_T, torch.Generator().manual_seed(1))
    backward_sweep(chain, trajectory, full_bp(3), reward_grad=torch.ones_like(x_T))
    return trajectory.latents[0], gradients(model.network)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_gradient_is_that_of_the_same_weights_written_out(name, kind):
    """To 1e-5 in float32, with a fraction of the bytes; the LoRA is in float32."""
    folder, size = FOLDERS[name](), (32, 32, 5) if name == "wan" else (32, 32)
    quantized = load_model(folder, quantize=kind)
    plain = written_out(folder, quantized)
    assert stored_bytes(quantized.network) < 0.6 * stored_bytes(plain.network)
    (x_0, found), (expected_x_0, expected) = swept(quantized, size), swept(plain, size)
    assert expected.norm() > 0 and found.dtype == torch.float32
    assert (x_0 - expected_x_0).norm() < 1e-5 * expected_x_0.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_graph_keeps_the_weights_as_they_are_stored(kind):
    """Not the copies in half precision with which they multiply: it is no larger than that of the plain model."""
    kept = []
    for quantize in (None, kind):
        model = load_model(tiny_flux(), quantize=quantize)
        chain, sizes = chain_of(model, 3), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            chain.mean(3, torch.randn(model.latents_shape(len(PROMPTS), (32, 32)), requires_grad=True))
        own = {weight.data_ptr() for weight in model.network.parameters()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in own))
    assert kept[1] <= 1.05 * kept[0]


def test_quantized_weights_are_counted_as_they_are_stored():
    weight = load_model(tiny_flux(), quantize="int8").network.transformer_blocks[0].attn.to_q.weight
    with LiveBytes() as live, torch.no_grad():
        copy = torch.clone(weight)
    assert live.now == bytes_of_weight(copy) == bytes_of_weight(weight) < 0.5 * 4 * weight.numel()


def test_quantized_blocks_may_rest_on_the_cpu():
    results = []
    for is_offloaded in (False, True):
        model = load_model(tiny_flux(), quantize="int8")
        add_random_lora(model.network)
        if is_offloaded:
            offload_blocks(model.network, model.blocks, torch.device("cpu"))
        chain = chain_of(model, 3)
        chain.mean(3, torch.ones(model.latents_shape(len(PROMPTS), (32, 32)))).square().sum().backward()
        results.append(gradients(model.network))
    torch.testing.assert_close(*results)


def test_in_half_precision_the_lora_stays_in_float32():
    """The error beside the weights written out is that of bfloat16."""
    model = load_model(tiny_flux(), dtype=torch.bfloat16, quantize="int8")
    add_lora(model, rank=4, alpha=4, layers=model.lora_layers.split(","))
    trained = [p for p in model.network.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    conditions = {name: value.bfloat16() for name, value in model.embed(PROMPTS).items()}
    chain = model.make_chain(model.network, 3, (32, 32)).conditioned_on(conditions)
    x = torch.randn(model.latents_shape(len(PROMPTS), (32, 32)))
    chain.mean(3, x).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert {layer.copies[0].dtype for layer in model.network.modules() if isinstance(layer, LoraLinear)} == {
        torch.bfloat16
    }


def test_a_lora_on_four_bits_is_one_on_their_values():
    """bitsandbytes' layer itself, on a CPU, as diffusers puts it into a network on a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain, dtype = torch.nn.Linear(64, 64), torch.float32
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer.to("cpu").requires_grad_(False)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert stored_bytes(layer) < 0.3 * stored_bytes(plain)
    network = torch.nn.ModuleDict({"to_q": layer})
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"])
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    lora = inject_adapter_in_model(config, network)["to_q"]
    A, B = lora.matrices
    torch.nn.init.normal_(B)
    assert type(lora) is LoraLinear and lora.dtype == dtype
    x = torch.randn(5, 64, requires_grad=True)
    y = lora(x)
    expected = torch.nn.functional.linear(x, weight, layer.bias) + x @ A.T @ B.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, A, B), cotangent)
    for one, other in zip(found, torch.autograd.grad(expected, (x, A, B), cotangent)):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_an_adapter_of_quantized_weights_is_one_of_the_model(tmp_path):
    """A run, resumed, ends in the adapter of the run in one go; the plain pipeline loads it."""
    flags = ["--quantize", "int8", "--num_eval_images", "2", "--max_train_steps"]
    train_on(tiny_sdxl(), tmp_path / "whole", *flags, "2")
    train_on(tiny_sdxl(), tmp_path / "parts", *flags, "1")
    train_on(tiny_sdxl(), tmp_path / "parts", *flags, "2", "--resume_from_checkpoint", "latest")
    assert same_adapter(tmp_path / "whole", tmp_path / "parts")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl())
    pipeline.load_lora_weights(str(tmp_path / "whole"))
    assert pipeline.unet.peft_config


def test_four_bits_need_a_gpu_and_every_kind_its_library(monkeypatch):
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="nf4 needs a GPU: without one use int8"):
            load_model(tiny_sd3(), quantize="nf4")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="quantization to int8 needs torchao: pip install torchao"):
        quantization_config("int8", torch.float32)


def test_a_single_file_cannot_be_quantized(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a single file cannot be quantized"):
        load_model(str(path), quantize="int8")


def test_what_is_not_asked_for_is_not_quantized():
    assert all(type(p.data) is torch.Tensor for p in load_model(TINY_SD).network.parameters())
