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
"""Rollout and sweep through the networks of every family: exact gradients, and nothing that waits for the device."""

import pytest
import torch
from diffusion_models import load_model
from reward_models import load_reward
from rlr_chains import Mix, gradients, replay
from rlr_models import FOLDERS, PROMPTS, DeviceCopies, add_random_lora, chain_of, seeded
from rlr_testing import TINY_AESTHETIC, tiny_model
from rlr_utils import (
    ClippedRatio,
    GaussianKL,
    Schedule,
    backward_sweep,
    full_bp,
    likelihood_ratio,
    renoise,
    rollout,
)
from torch._dynamo.testing import CompileCounter

from diffusers import UNet2DConditionModel


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request):
    return FOLDERS[request.param]()


# Exact gradients


@pytest.fixture(scope="module")
def exact_model(folder):
    """A model in float64 with a LoRA whose B is not zero. Its gradients are cleared by `gradients`."""
    model = load_model(folder, dtype=torch.float64)
    add_random_lora(model.network)
    model.network.double()
    return model


@pytest.mark.parametrize("mixing", [[0.0, 1.0, 0.7, 0.2], [0.0, 1.0, 1.0, 1.0]], ids=["mixed", "full_bp"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_sweep_is_exact_in_float64(exact_model, guidance_scale, mixing):
    """Any gamma, against one graph of the whole chain, to 1e-9."""
    chain = chain_of(exact_model, 3, guidance_scale=guidance_scale)
    trajectory = rollout(chain, torch.randn(3, 4, 8, 8, dtype=torch.float64))
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    weight = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    backward_sweep(chain, trajectory, mixing, reward_grad=weight, advantages=advantages)
    swept = gradients(exact_model.network)
    x = trajectory.latents[3]
    for k in (3, 2, 1):
        score = -likelihood_ratio(chain, trajectory, k, advantages) / 3
        x = Mix.apply(chain.mean(k, x), mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-(weight * x).sum() / 3).backward()
    expected = gradients(exact_model.network)
    torch.testing.assert_close(swept, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sweep_is_full_backpropagation_of_a_reward_of_images(checkpointing):
    """Through 8 guided steps, the decoder, CLIP and the head, in float32: to 1e-4 of the gradient's size."""
    model = tiny_model()
    add_random_lora(model.network)
    if checkpointing:
        model.network.enable_gradient_checkpointing()
        model.pipeline.vae.enable_gradient_checkpointing()
    reward, chain = load_reward("aesthetic", path=TINY_AESTHETIC), chain_of(model, 8)
    trajectory = rollout(chain, torch.randn(3, 4, 8, 8))
    x_0 = trajectory.latents[0].clone().requires_grad_()
    (reward_grad,) = torch.autograd.grad(reward(model.decode(x_0), PROMPTS).sum(), x_0)
    backward_sweep(chain, trajectory, full_bp(8), reward_grad=reward_grad)
    swept = gradients(model.network)
    (-reward(model.decode(replay(chain, trajectory)), PROMPTS).mean()).backward()
    expected = gradients(model.network)
    assert (swept - expected).norm() < 1e-4 * expected.norm()


# Speed


def shrink_network(model):
    """Replace the U-Net by one of its kind with two blocks, which is enough to see how it is called, and add a LoRA."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 2}
    settings = {**blocks, **sizes, "transformer_layers_per_block": 1}
    torch.manual_seed(0)
    model.pipeline.unet = UNet2DConditionModel.from_config({**model.network.config, **settings})
    add_random_lora(model.network)


@pytest.fixture(scope="module")
def meta_model(folder):
    """A model with a LoRA whose network is on a device without memory, where no value can be asked for."""
    model = load_model(folder)
    shrink_network(model)
    model.conditions = {name: value.to("meta") for name, value in model.embed(PROMPTS).items()}
    model.network.to("meta")
    return model


def meta_chain(model):
    """Its chain of four steps, with a negative prompt."""
    chain = model.make_chain(model.network, 4, (32, 32), device="meta")
    negative = {name: value[:1] for name, value in model.conditions.items()}
    return chain.conditioned_on(model.conditions, negative)


def test_a_rollout_does_not_wait_for_the_device(meta_model):
    """After the noise of all steps, which generators on the CPU draw before the first call, all that is needed is there."""
    chain, before = meta_chain(meta_model), []
    x_T = torch.zeros(3, 4, 4, 4, device="meta")

    def called(network, inputs):
        assert all(isinstance(value, torch.Tensor) and value.is_meta for value in inputs)
        before.append(len(copies.operations))

    hook = meta_model.network.register_forward_pre_hook(called)
    with DeviceCopies() as copies:
        rollout(chain, x_T, seeded(range(3)), predict=[1], keep=[2, 3])
    hook.remove()
    assert before[0] > 0 and set(before) == {len(copies.operations)} and len(before) == 4


def sweep_of(name, chain, trajectory):
    """The arguments of the sweep of an estimator."""
    rewards = torch.zeros(3, device="meta")
    options = {"reward_grad": torch.zeros_like(trajectory.latents[0]), "advantages": rewards}
    if name == "draft_lv":
        return renoise(chain, trajectory.latents[0]), Schedule([1.0] * 5, stop_after=1), options
    if name == "ddpo":
        return trajectory, [0.0] * 5, {"cotangent": ClippedRatio(chain, trajectory, rewards)}
    if name == "rlr of some steps":
        return trajectory, Schedule([0.5] * 5, stop_after=4, weights=[1.0, 1.0, 2.0, 2.0, 0.0]), options
    if name == "rlr with KL":
        options["penalty"] = GaussianKL(chain, lambda k, x: chain.mean(k, x).detach(), trajectory, 0.1)
    return trajectory, [0.5] * 5, options


@pytest.mark.parametrize("estimator", ["rlr", "rlr of some steps", "ddpo", "rlr with KL", "draft_lv"])
def test_a_sweep_does_not_wait_for_the_device(meta_model, estimator):
    chain = meta_chain(meta_model)
    keep = [2, 3] if estimator == "rlr of some steps" else []
    trajectory = rollout(chain, torch.zeros(3, 4, 4, 4, device="meta"), seeded(range(3)), keep=keep)
    renoise(chain, trajectory.latents[0])  # moves the scheduler's table to the device, once
    with DeviceCopies() as copies:
        trajectory, mixing, options = sweep_of(estimator, chain, trajectory)
        statistics = backward_sweep(chain, trajectory, mixing, **options)
    assert statistics.pathwise.is_meta and not copies.operations
    assert all(p.grad.is_meta for p in meta_model.network.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="item"):
        statistics.pathwise[1].item()


def test_a_compiled_network_has_one_graph_for_the_rollout_and_one_for_the_sweep():
    """A sweep of the likelihood ratio alone needs no gradient of the latents, which makes it another graph."""
    model = tiny_model()
    shrink_network(model)
    x_T = torch.randn(3, 4, 8, 8)
    plain = rollout(chain_of(model, 4), x_T, torch.Generator().manual_seed(0))
    counter = CompileCounter()
    torch._dynamo.reset()
    negative, conditions = model.embed([""]), model.embed(PROMPTS)
    compiled = model.make_chain(torch.compile(model.network, backend=counter), 4, (64, 64))
    chain = compiled.conditioned_on(conditions, negative)
    for mixing, graphs in ((0.5, 2), (0.5, 2), (0.0, 3), (0.0, 3)):
        trajectory = rollout(chain, x_T, torch.Generator().manual_seed(0))
        gradient = torch.ones_like(x_T)
        backward_sweep(chain, trajectory, [mixing] * 5, reward_grad=gradient, advantages=torch.ones(3))
        assert counter.frame_count == graphs
    torch.testing.assert_close(trajectory.latents[0], plain.latents[0], rtol=1e-4, atol=1e-4)
