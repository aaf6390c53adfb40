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
"""The benchmark that counts the memory of a training step of video models."""

import csv

import memory_video
import pytest
import torch
from memory_video import (
    CHECKPOINTING,
    CHUNK,
    OFFLOAD,
    StandIn,
    chain_of,
    load_reward,
    of_decoder,
    of_network,
    of_reward,
    peak,
    recipes,
    video_models,
)
from rlr_training.memory import GIB, LiveBytes


# A video whose whole decoding is the largest part, without and with checkpointing.
ROW = {
    **{"model": "some", "height": 480, "width": 832, "frames": 81, "transformer_gib": 2.0, "vae_gib": 1.0},
    **{"reward_gib": 1.5, "rollout_gib": 1.0, "sweep_gib": 30.0, "stored_gib": 0.5},
    **{"decode_gib": 20.0, "decode_chunk_gib": 8.0},
}
ROWS = [ROW, {**ROW, "sweep_gib": 5.0}]


def test_what_is_offloaded_is_not_there_during_the_sweep():
    plain, checkpointed = ROWS
    assert peak(plain) == 2 + 1 + 0.5 + 30 + 1.5 and peak(plain, OFFLOAD) == 2 + 1 + 0.5 + 30
    assert peak(checkpointed) == peak(checkpointed, OFFLOAD) == 2 + 1 + 0.5 + 20 + 1.5
    assert peak(checkpointed, CHUNK) == 2 + 1 + 0.5 + 8 + 1.5
    assert peak({**plain, "decode_chunk_gib": None}, CHUNK) is None


def test_a_recipe_has_the_fewest_flags_that_fit():
    room = {24: 20.1, 80: 70.5}
    assert peak(ROWS[0]) < room[80] and peak(ROWS[1]) > room[24] > peak(ROWS[1], CHUNK)
    assert recipes(ROWS) == [
        f"some            480 x 832 x 81     24 GB  {CHUNK} {CHECKPOINTING}, 13.0 GiB",
        "some            480 x 832 x 81     80 GB  no flags, 35.0 GiB",
    ]
    whole = [{**row, "decode_chunk_gib": None} for row in ROWS]
    assert recipes(whole)[0].endswith("24 GB  nothing fits")


def test_a_step_on_tensors_without_values_takes_what_a_real_one_takes():
    (video,) = video_models(quick=True)
    model = video.load()
    shape = model.latents_shape(1, video.sizes[0])
    chain = chain_of(model, video.conditions, video.sizes[0], 3)
    counted = of_network(model, chain, shape)
    x = torch.zeros(shape)
    with LiveBytes() as live, torch.no_grad():
        chain.mean(1, x)
    assert live.peak + x.nbytes == pytest.approx(GIB * counted["rollout_gib"], rel=1e-3)
    x.requires_grad_()
    with LiveBytes() as live:
        chain.mean(1, x).backward(torch.zeros_like(x))
    assert live.peak + x.nbytes == pytest.approx(GIB * counted["sweep_gib"], rel=1e-3)


def test_a_buffer_takes_what_the_reward_takes():
    (video,), reward = video_models(quick=True), load_reward(quick=True)
    model, size = video.load(), (32, 32, 5)
    shape = model.latents_shape(1, size)
    stand_in = StandIn(int(GIB * of_reward(reward, size)))
    counted = of_decoder(model.decode, stand_in, shape)
    assert counted == pytest.approx(of_decoder(model.decode, reward, shape), rel=0.02)
    assert counted > 1.1 * of_decoder(model.decode, StandIn(0), shape)


def test_quick_memory_video_counts_every_phase(tmp_path, capsys):
    plain, checkpointed = memory_video.main(["--quick", "--num_inference_steps", "3", "--out", str(tmp_path)])
    assert plain["rollout_gib"] < checkpointed["sweep_gib"] < plain["sweep_gib"]
    assert 0 < plain["decode_chunk_gib"] < plain["decode_gib"] == checkpointed["decode_gib"]
    assert plain["peak_gib"] == peak(plain) and plain["peak_chunk_gib"] == peak(plain, CHUNK)
    assert "80 GB  no flags" in capsys.readouterr().out
    with open(tmp_path / "memory_video.csv", encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# python benchmarks/memory_video.py --quick")
        assert [row["gradient_checkpointing"] for row in csv.DictReader(file)] == ["False", "True"]
