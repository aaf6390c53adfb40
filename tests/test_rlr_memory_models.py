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
"""The benchmark that counts the memory of a training step of large models."""

import csv

import memory_models
import pytest
import torch
from bench_models import counted_models
from memory_models import (
    SETTINGS,
    Setting,
    StandIn,
    load_reward,
    network_gib,
    of_decoder,
    of_network,
    of_reward,
    peak,
    recipe,
)
from rlr_training.memory import GIB, LiveBytes


# A guided video model whose blocks are nearly all of its weights.
ROW = {
    **{"model": "some", "height": 480, "width": 832, "frames": 81, "network_gib": 20.0, "vae_gib": 1.0},
    **{"reward_gib": 1.5, "linear_gib": 18.0, "largest_linear_gib": 0.5, "blocks_gib": 16.0, "largest_block_gib": 1.0},
    **{"rollout_gib": 1.0, "stored_gib": 0.5, "decode_gib": 10.0, "decode_chunk_gib": 8.0, "sweep_gib": 60.0},
    **{"sweep_split_gib": 30.0, "sweep_checkpointed_gib": 8.0, "sweep_checkpointed_split_gib": 4.0},
}


def test_the_larger_phase_counts_beside_what_stays_on_the_device():
    assert peak(ROW, Setting()) == 20 + 0.5 + 1 + 1.5 + 60
    assert peak(ROW, Setting(split=True), batch=2) == 20 + 1 + 1 + 1.5 + 60
    assert peak(ROW, Setting(checkpointing=True)) == 20 + 0.5 + 1 + 1.5 + 10
    assert peak(ROW, Setting(checkpointing=True, reward_offload=True, vae_offload=True)) == 20 + 0.5 + 10 + 1 + 1.5
    assert peak(ROW, Setting(checkpointing=True, chunk=True)) == 20 + 0.5 + 1 + 1.5 + 8
    assert peak({**ROW, "decode_chunk_gib": None}, Setting(chunk=True)) is None
    unguided = {name: value for name, value in ROW.items() if "split" not in name}
    assert peak(unguided, Setting(split=True)) is None


def test_weights_are_smaller_elsewhere_or_shared_out():
    assert network_gib(ROW, Setting(quantize="int8")) == 20 - 9 + 0.5
    assert network_gib(ROW, Setting(quantize="nf4")) == pytest.approx(20 - 18 * (1 - 4.5 / 16) + 0.5)
    assert network_gib(ROW, Setting(offload_blocks=True)) == 20 - 16 + 1
    assert network_gib(ROW, Setting(ranks=4)) == 20 - 16 + 4 + 2


def test_a_recipe_has_the_fewest_flags_that_fit():
    assert recipe(ROW, 80) == "--guidance_batching split, 53.0 GiB"
    assert recipe(ROW, 48) == "--gradient_checkpointing, 33.0 GiB, up to batch 2"
    offloaded = "--guidance_batching split --reward_offload --vae_offload --offload_blocks"
    assert recipe(ROW, 24) == f"{offloaded}, 18.0 GiB, up to batch 2"
    unguided = {name: value for name, value in ROW.items() if "split" not in name}
    assert recipe(unguided, 24) == f"{offloaded.partition('split ')[2]}, 18.0 GiB"
    assert recipe(ROW, 12) == "nothing fits"
    assert len(set(map(str, SETTINGS))) == len(SETTINGS)


@pytest.fixture(scope="module")
def counted():
    (model,) = counted_models(quick=True)
    return model


@pytest.mark.parametrize("is_split", [False, True])
def test_a_step_on_tensors_without_values_takes_what_a_real_one_takes(counted, is_split):
    model, (size,) = counted.load(), counted.sizes
    rollout, sweep = of_network(counted, model, size, 3, is_split)
    x, chain = torch.zeros(model.latents_shape(1, size)), counted.conditioned(model, size, 3, is_split)
    with LiveBytes() as live, torch.no_grad():
        chain.mean(1, x)
    assert live.peak + x.nbytes == pytest.approx(GIB * rollout, rel=1e-3)
    x.requires_grad_()
    with LiveBytes() as live:
        chain.mean(1, x).backward(torch.zeros_like(x))
    assert live.peak + x.nbytes == pytest.approx(GIB * sweep, rel=1e-3)


def test_a_buffer_takes_what_the_reward_takes(counted):
    reward, model, size = load_reward(quick=True), counted.load(), (32, 32, 5)
    shape = model.latents_shape(1, size)
    stand_in = StandIn(int(GIB * of_reward(reward, size)))
    found = of_decoder(model.decode, stand_in, shape, is_video=True)
    assert found == pytest.approx(of_decoder(model.decode, reward, shape, is_video=True), rel=0.02)
    assert found > 1.1 * of_decoder(model.decode, StandIn(0), shape, is_video=True)


def test_quick_memory_models_counts_every_phase(tmp_path, capsys):
    (row,) = memory_models.main(["--quick", "--num_inference_steps", "3", "--out", str(tmp_path)])
    assert row["sweep_checkpointed_split_gib"] < row["sweep_split_gib"] < row["sweep_gib"]
    assert row["rollout_gib"] < row["sweep_checkpointed_gib"] < row["sweep_gib"]
    assert 0 < row["decode_chunk_gib"] < row["decode_gib"]
    assert 0 < row["largest_block_gib"] < row["blocks_gib"] < row["network_gib"] > row["linear_gib"]
    assert " 80 GB  no flags" in capsys.readouterr().out
    with open(tmp_path / "memory_models.csv", encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# python benchmarks/memory_models.py --quick")
        assert [line["model"] for line in csv.DictReader(file)] == ["tiny"]
