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
"""`PromptEmbeds`: every prompt is encoded once, and the text encoders rest on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.embeddings import PromptEmbeds
from rlr_models import FOLDERS, PROMPTS


class CountingModel:
    """A model of one text encoder that keeps the prompts that it was asked for."""

    def __init__(self):
        self.encoder = torch.nn.Linear(1, 2)
        self.text_encoders = [self.encoder]
        self.encoded = []

    def embed(self, prompt, device=None):
        self.encoded.append(prompt)
        states = self.encoder(torch.full((1, 3, 1), float(ord(prompt or " "))))
        return {"states": states, "pooled": states.mean(1)}

    def embed_nothing(self, device=None):
        return None


def test_every_prompt_is_encoded_once_and_by_itself():
    model = CountingModel()
    embeds = PromptEmbeds(model, "cpu")
    conditions = embeds(["a", "b", "a"])
    assert model.encoded == ["a", "b"] and not conditions["states"].requires_grad
    expected = torch.cat([model.embed(prompt)["states"] for prompt in "aba"]).detach()
    torch.testing.assert_close(conditions["states"], expected)
    torch.testing.assert_close(conditions["pooled"], expected.mean(1))
    model.encoded.clear()
    assert torch.equal(embeds(["b", "a"])["states"], conditions["states"][[1, 0]]) and model.encoded == []


def test_the_latest_prompts_are_kept():
    model = CountingModel()
    embeds = PromptEmbeds(model, "cpu", max_prompts=2)
    embeds(["a", "b"])
    embeds(["b", "c"])  # which drops the oldest, a
    embeds(["b", "c"])
    assert model.encoded == ["a", "b", "c"]
    embeds(["a"])  # which drops b
    embeds(["c"])
    assert model.encoded == ["a", "b", "c", "a"]
    # A batch may hold more prompts than are kept.
    assert len(embeds(["a", "c", "d", "e"])["states"]) == 4 and list(embeds.kept) == ["d", "e"]


def test_the_text_encoders_are_on_the_device_for_new_prompts_alone(monkeypatch):
    moves = []
    monkeypatch.setattr("diffusion_models.embeddings.offload_models", recorder(moves))
    model = CountingModel()
    embeds = PromptEmbeds(model, "cpu")
    embeds(["a"])
    embeds(["a"])
    assert moves == ["on", "off"]
    embeds(["a", "b", "c"])
    assert moves == ["on", "off"] * 2
    embeds.negative("a")
    assert moves == ["on", "off"] * 2


def recorder(moves):
    """What stands in for diffusers' `offload_models`, and notes when the modules are moved."""

    class Moved:
        def __init__(self, *modules, device):
            assert modules and device == "cpu"

        def __enter__(self):
            moves.append("on")

        def __exit__(self, *error):
            moves.append("off")

    return Moved


def test_encoders_begin_on_the_cpu_and_results_are_on_the_device():
    model = CountingModel()
    model.encoder.to(torch.float64)
    moved = []
    model.text_encoders = [SimpleNamespace(cpu=lambda: moved.append("cpu"))]
    embeds = PromptEmbeds(model, "meta")
    assert moved == ["cpu"]
    embeds.kept["a"] = {"states": torch.zeros(1, 3, 2)}
    assert embeds(["a", "a"])["states"].is_meta and not embeds.kept["a"]["states"].is_meta


@pytest.mark.parametrize("name", FOLDERS)
def test_conditions_of_a_model_are_those_of_each_prompt(name):
    model = load_model(FOLDERS[name]())
    embeds = PromptEmbeds(model, "cpu")
    conditions = embeds(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = model.embed([prompt])
        assert conditions.keys() == alone.keys()
        assert all(torch.equal(conditions[key][i : i + 1], value) for key, value in alone.items())


@pytest.mark.parametrize("zeros", [True, False])
def test_without_a_negative_prompt_the_pipeline_may_want_zeros(zeros):
    model = load_model(FOLDERS["StableDiffusionXLPipeline"]())
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    embeds, empty = PromptEmbeds(model, "cpu"), model.embed([""])
    for negative_prompt in (None, ""):
        conditions = embeds.negative(negative_prompt)
        wanted = 0.0 if zeros and negative_prompt is None else 1.0
        assert all(torch.equal(conditions[key], wanted * value) for key, value in empty.items())
    assert all(torch.equal(value, embeds(["a blue one"])[key]) for key, value in embeds.negative("a blue one").items())
