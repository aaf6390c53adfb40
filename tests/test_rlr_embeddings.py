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

import os
from types import SimpleNamespace

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.embeddings import PromptEmbeds
from rlr_models import FOLDERS, PROMPTS


BYTES = 32  # of a prompt of one letter


class CountingModel:
    """A model of one text encoder that keeps the prompts that it was asked for."""

    def __init__(self):
        self.encoder = torch.nn.Linear(1, 2)
        self.text_encoders = [self.encoder]
        self.encoded = []

    def embed(self, prompts, device=None):
        """A prompt of n letters has n + 2 states."""
        (prompt,) = prompts
        self.encoded.append(prompt)
        states = self.encoder(torch.full((1, 2 + len(prompt), 1), float(ord((prompt or " ")[0]))))
        return {"states": states, "pooled": states.mean(1)}

    def embed_negative(self, prompt=None, device=None):
        return self.embed([prompt or ""])

    def free_text_encoders(self):
        self.text_encoders = []


def test_every_prompt_is_encoded_once_and_by_itself():
    model = CountingModel()
    embeds = PromptEmbeds(model, "cpu")
    conditions = embeds(["a", "b", "a"])
    assert model.encoded == ["a", "b"] and not conditions["states"].requires_grad
    expected = torch.cat([model.embed([prompt])["states"] for prompt in "aba"]).detach()
    torch.testing.assert_close(conditions["states"], expected)
    torch.testing.assert_close(conditions["pooled"], expected.mean(1))
    model.encoded.clear()
    assert torch.equal(embeds(["b", "a"])["states"], conditions["states"][[1, 0]]) and model.encoded == []


def test_the_latest_prompts_are_kept():
    model = CountingModel()
    embeds = PromptEmbeds(model, "cpu", max_bytes=2 * BYTES)
    embeds(["a", "b"])
    embeds(["b", "c"])  # which drops the oldest, a
    embeds(["b", "c"])
    assert model.encoded == ["a", "b", "c"]
    embeds(["a"])  # which drops b
    embeds(["c"])
    assert model.encoded == ["a", "b", "c", "a"]
    # A batch may hold more prompts than are kept.
    assert len(embeds(["a", "c", "d", "e"])["states"]) == 4 and list(embeds.kept) == ["d", "e"]
    assert embeds.bytes == 2 * BYTES


def test_shorter_prompts_are_padded_with_zeros_where_there_is_a_mask():
    model = CountingModel()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        PromptEmbeds(model, "cpu")(["abc", "a"])
    plain = model.embed
    model.embed = lambda prompts, device: {**plain(prompts), "mask": torch.ones(1, 2 + len(prompts[0]), dtype=bool)}
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        PromptEmbeds(model, "cpu")(["abc", "a"])
    model.embed = lambda prompts, device: {
        "states": plain(prompts)["states"],
        "states_mask": torch.ones(1, 2 + len(prompts[0]), dtype=bool),
    }
    conditions = PromptEmbeds(model, "cpu")(["abc", "a"])
    states, mask = conditions["states"], conditions["states_mask"]
    assert states.shape == (2, 5, 2) and not states[1, 3:].any()
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    torch.testing.assert_close(states[1:, :3], plain(["a"])["states"].detach())


def test_prompts_are_encoded_before_training_and_the_encoders_freed():
    """What exceeds the memory goes into files, which are gone with the object."""
    model = CountingModel()
    embeds = PromptEmbeds(model, "cpu", max_bytes=2 * BYTES)
    expected = {prompt: model.embed([prompt])["states"].detach() for prompt in "abcd"}
    model.encoded.clear()
    embeds.encode_all(["a", "b", "a", "c", "d"])
    embeds.free_encoders()
    assert model.encoded == ["a", "b", "c", "d"] and model.text_encoders == []
    folder = embeds.folder.name
    assert embeds.bytes == 2 * BYTES and len(os.listdir(folder)) == 2
    for _ in range(2):  # nothing is dropped
        states = embeds(list("dcba"))["states"]
        torch.testing.assert_close(states, torch.cat([expected[prompt] for prompt in "dcba"]))
    with pytest.raises(ValueError, match="the prompt 'e' was not encoded with the others"):
        embeds(["a", "e"])
    del embeds
    assert not os.path.exists(folder)


def moving(moves, fits=True):
    """What stands in for a text encoder, and notes its moves; one that does not fit is too large for the device."""

    def to(device):
        if not fits and device != torch.device("cpu"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        moves.append(str(device))

    return SimpleNamespace(to=to, cpu=lambda: moves.append("cpu"))


def test_the_text_encoders_are_on_the_device_for_new_prompts_alone():
    moves, model = [], CountingModel()
    model.text_encoders = [moving(moves)]
    embeds = PromptEmbeds(model, "cpu:0")
    assert moves == ["cpu"]
    embeds(["a"])
    embeds(["a"])
    assert moves[1:] == ["cpu:0", "cpu"]
    embeds(["a", "b", "c"])
    embeds.negative("a")
    embeds.encode_all(["d", "e"])
    assert moves[1:] == ["cpu:0", "cpu"] * 4


@pytest.mark.parametrize("fits", [True, False], ids=["no room for prompts", "no room for the encoder"])
def test_encoders_without_room_on_the_device_work_on_the_cpu(fits, caplog):
    """With a warning, and the same embeddings."""
    moves, model, expected = [], CountingModel(), PromptEmbeds(CountingModel(), "cpu")
    model.encoder.load_state_dict(expected.model.encoder.state_dict())
    model.text_encoders, embed = [moving(moves, fits)], model.embed

    def with_little_memory(prompts, device):
        if device != torch.device("cpu"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(prompts, device)

    model.embed = with_little_memory
    embeds = PromptEmbeds(model, "cpu:0")
    embeds.encode_all(["a", "b"])
    assert torch.equal(embeds(["b", "a"])["states"], expected(["b", "a"])["states"])
    assert caplog.text.count("encode prompts on the CPU") == 1 and embeds.encoding_device == torch.device("cpu")
    assert moves.count("cpu:0") == int(fits) and moves[-1] == "cpu"

    def never(prompts, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.embed = never
    with pytest.raises(torch.OutOfMemoryError):
        PromptEmbeds(model, "cpu")(["c"])


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
