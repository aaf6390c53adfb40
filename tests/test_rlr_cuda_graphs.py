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
"""rlr_training/cuda_graphs.py, with a recording on a CPU in place of CUDA's; test_rlr_gpu.py has the runs on a GPU."""

import logging

import pytest
import torch
from accelerate import PartialState
from diffusion_models.adapters import add_lora, lora_disabled
from rlr_testing import tiny_model
from rlr_training.cuda_graphs import GraphedNetwork


def record_on_cpu(call, samples, allow_unused_input):
    """What `torch.cuda.make_graphed_callables` does: calls read and write tensors that stay in their place."""
    run, parameters, kept = call.forward, tuple(call.parameters()), {}
    kept["outputs"] = run(*samples)
    if not kept["outputs"][0].requires_grad:
        raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
    places = [output.detach().clone() for output in kept["outputs"]]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            for sample, value in zip(samples, inputs):
                sample.data.copy_(value)
            with torch.enable_grad():
                kept["outputs"] = run(*samples)
            for place, output in zip(places, kept["outputs"]):
                place.copy_(output.detach())
            return tuple(place.detach() for place in places)

        @staticmethod
        def backward(ctx, *cotangents):
            wanted = [tensor for tensor in (*samples, *parameters) if tensor.requires_grad]
            gradients = iter(torch.autograd.grad(kept["outputs"], wanted, cotangents))
            return tuple(next(gradients) if tensor.requires_grad else None for tensor in (*samples, *parameters))

    call.forward = lambda *inputs: Replay.apply(*inputs, *parameters)


@pytest.fixture
def recordings(monkeypatch):
    """The samples of the calls that were recorded."""
    made = []

    def record(call, samples, allow_unused_input):
        record_on_cpu(call, samples, allow_unused_input)
        made.append(samples)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


@pytest.fixture
def logged(caplog):
    """What is logged; accelerate's loggers want its state."""
    PartialState(cpu=True)
    caplog.set_level(logging.WARNING)
    return caplog


def network_with_lora(dtype=torch.float32):
    model = tiny_model(dtype=dtype)
    add_lora(model, rank=2, alpha=2, layers=["to_q", "to_v"])
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.1)
    return model


def trained(model):
    return [parameter for parameter in model.network.parameters() if parameter.requires_grad]


def inputs(model, seed, batch_size=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(model.latents_shape(batch_size, (32, 32)), generator=generator, dtype=model.network.dtype)
    embeds = torch.randn(batch_size, 8, model.network.config.cross_attention_dim, generator=generator)
    return x, torch.tensor(500 + seed), embeds.to(x.dtype)


def results(model, network, given):
    """Output, gradient of the latents, and gradients of the LoRA."""
    x, timestep, embeds = given
    x = x.detach().requires_grad_()
    output = network(x, timestep, encoder_hidden_states=embeds).sample
    output.backward(output.detach())
    gradients = [parameter.grad.clone() for parameter in trained(model)]
    model.network.zero_grad()
    return output.detach(), x.grad, *gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_replayed_calls_are_the_networks_own(recordings, dtype, tolerance):
    """Also after the LoRA has changed, and in the order of a rollout, whose outputs must outlast later calls."""
    model = network_with_lora(dtype)
    graphed = GraphedNetwork(model.network)
    with torch.no_grad():
        calls = {seed: inputs(model, seed) for seed in (1, 2)}
        rollout = {seed: graphed(x, t, encoder_hidden_states=embeds).sample for seed, (x, t, embeds) in calls.items()}
    for seed, given in calls.items():
        torch.testing.assert_close(rollout[seed], results(model, model.network, given)[0])
    for given in calls.values():
        for found, expected in zip(results(model, graphed, given), results(model, model.network, given)):
            assert (found - expected).norm() <= tolerance * expected.norm()
        with torch.no_grad():
            for parameter in trained(model):
                parameter.mul_(1.5)
    assert len(recordings) == 1
    assert all(parameter.dtype == torch.float32 for parameter in trained(model))


def test_gradients_of_several_calls_add_up(recordings):
    model = network_with_lora()
    graphed, sums = GraphedNetwork(model.network), {}
    for name, network in (("graphed", graphed), ("plain", model.network)):
        for seed in (1, 2, 3):
            x, timestep, embeds = inputs(model, seed)
            output = network(x, timestep, encoder_hidden_states=embeds).sample
            output.backward(output.detach())
        sums[name] = [parameter.grad.clone() for parameter in trained(model)]
        model.network.zero_grad()
    for found, expected in zip(sums["graphed"], sums["plain"]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_calls_without_the_adapter_and_of_many_shapes_are_made_one_by_one(recordings):
    model = network_with_lora()
    graphed = GraphedNetwork(model.network)
    results(model, graphed, inputs(model, 1))
    with lora_disabled(model), torch.no_grad():
        x, timestep, embeds = inputs(model, 1)
        found = graphed(x, timestep, encoder_hidden_states=embeds).sample
        torch.testing.assert_close(found, model.network(x, timestep, encoder_hidden_states=embeds).sample)
    for batch_size in (1, 3, 4):
        given = inputs(model, 2, batch_size)
        torch.testing.assert_close(results(model, graphed, given)[0], results(model, model.network, given)[0])
    assert len(recordings) == 2


def test_a_network_that_cannot_be_recorded_is_called_as_it_is(monkeypatch, logged):
    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    model = network_with_lora()
    graphed = GraphedNetwork(model.network)
    for seed in (1, 2):
        for found, expected in zip(
            results(model, graphed, inputs(model, seed)), results(model, model.network, inputs(model, seed))
        ):
            torch.testing.assert_close(found, expected)
    assert logged.text.count("cannot be CUDA graphs") == 1 and "not permitted" in logged.text


def test_a_recording_that_gives_something_else_is_not_used(monkeypatch, logged):
    def record_wrongly(call, samples, allow_unused_input):
        record_on_cpu(call, samples, allow_unused_input)
        right = call.forward
        call.forward = lambda *inputs: tuple(1.2 * output for output in right(*inputs))

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record_wrongly)
    model = network_with_lora()
    graphed = GraphedNetwork(model.network)
    torch.testing.assert_close(
        results(model, graphed, inputs(model, 1))[0], results(model, model.network, inputs(model, 1))[0]
    )
    assert "CUDA graphs of the network differ from it by 0.44" in logged.text
