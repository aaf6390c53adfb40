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
"""What the first calls of a model tell: what its calls cost, and whether its blocks compile."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from diffusion_models import load_model
from reward_models.loading import first_line
from rlr_chains import gradients
from rlr_flow_models import FLOW_FOLDERS
from rlr_models import FOLDERS, PROMPTS, add_random_lora, chain_of
from rlr_testing import TINY_SD, tiny_model
from rlr_training.memory import Operations
from rlr_training.trial import compile_blocks, try_model
from rlr_utils import full_bp
from rlr_video_models import tiny_wan, tiny_wan_a14b
from rlr_video_models_other import tiny_animatediff, tiny_cogvideox, tiny_ltx
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from diffusers import AutoencoderTiny


VIDEO_FOLDERS = {make.__name__: make for make in (tiny_wan, tiny_wan_a14b, tiny_animatediff, tiny_cogvideox, tiny_ltx)}
ARGS = SimpleNamespace(
    **{"height": 32, "width": 32, "pretrained_model_name_or_path": TINY_SD, "mixed_precision": "no"},
    **{"baseline_vae": "taesd", "train_batch_size": 2, "keep_graphs": 0, "shard": False, "offload_blocks": False},
)


def lora_model():
    model = tiny_model()
    add_random_lora(model.network)
    return model


def test_the_costs_are_those_of_the_calls():
    """A guided call takes two of the network; its gradient with respect to the latents passes every product once more."""
    model = lora_model()
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    plain, guided = (chain_of(model, prompts=PROMPTS[:1], guidance_scale=scale) for scale in (1.0, 5.0))
    one, two = (try_model(ARGS, model, chain, vae) for chain, vae in ((plain, None), (guided, small)))
    assert two.forward == 2 * one.forward > 0 and two.swept == 2 * one.swept
    assert 1.9 < one.swept / one.forward < 2.4
    assert one.decode == one.predict == two.decode and 0 < two.predict < two.decode / 4
    assert all(parameter.grad is None for parameter in model.network.parameters())


@pytest.mark.parametrize("name", [*FOLDERS, *FLOW_FOLDERS, *VIDEO_FOLDERS])
def test_every_family_has_blocks_that_repeat(name):
    model = load_model(str({**FOLDERS, **FLOW_FOLDERS, **VIDEO_FOLDERS}[name]()))
    blocks = model.blocks
    assert blocks
    inside = [module for block in blocks for module in block.modules()]
    assert len(set(map(id, inside))) == len(inside)  # none is part of another
    weights = sum(p.numel() for module in blocks for p in module.parameters())
    assert weights > 0.1 * sum(p.numel() for p in model.network.parameters())


def test_blocks_of_a_class_share_a_compilation():
    """Two blocks of Wan: one graph for the rollout and one for the sweep, and the same gradient."""
    model = load_model(tiny_wan())
    add_random_lora(model.network)
    chain = model.make_chain(model.network, 3, (32, 32, 5), guidance_scale=1.0)
    chain = chain.conditioned_on(model.embed(PROMPTS[:2]), model.embed([""]))
    x = torch.randn(model.latents_shape(2, (32, 32, 5)))
    args, counter = SimpleNamespace(**{**vars(ARGS), "num_frames": 5}), CompileCounter()

    def gradient():
        chain.mean(3, x.clone().requires_grad_()).square().sum().backward()
        return gradients(model.network)

    expected = gradient()
    compile_blocks(args, accelerator_with(counter), model, chain, full_bp(3))
    assert len(model.blocks) == 2 and counter.frame_count == 2
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "tiny_wan"])
def test_operations_are_torchs(name):
    model = load_model(str({**FOLDERS, **FLOW_FOLDERS, **VIDEO_FOLDERS}[name]()))
    add_random_lora(model.network)
    size = (32, 32, 5) if name == "tiny_wan" else (32, 32)
    chain, x = chain_of(model, 3, size=size), torch.ones(model.latents_shape(len(PROMPTS), size), requires_grad=True)
    with FlopCounterMode(display=False) as expected, Operations() as counter:
        chain.mean(3, x).sum().backward()
    assert counter.total == expected.get_total_flops() > 0


def accelerator_with(backend):
    plugin = SimpleNamespace(backend=DynamoBackend.EAGER, to_kwargs=lambda: {"backend": backend})
    return SimpleNamespace(state=SimpleNamespace(dynamo_plugin=plugin))


def test_blocks_that_do_not_compile_run_as_they_are(monkeypatch):
    def failing(graph, inputs):
        raise ValueError("no such processor")

    warnings, model = [], lora_model()
    monkeypatch.setattr("rlr_training.trial.logger", SimpleNamespace(warning=warnings.append))
    chain = chain_of(model, prompts=PROMPTS[:2])
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = chain.mean(1, x)
        compile_blocks(ARGS, accelerator_with(failing), model, chain, full_bp(3))
        assert torch.equal(chain.mean(1, x), expected)
    (warning,) = warnings
    assert "cannot be compiled and runs as it is" in warning and first_line(warning) == warning
