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
"""The advantages of an optimizer step, in one process and in two."""

import datetime
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rlr_chains import ImageChain, ImageReward, NonlinearChain, gradients, numbers
from rlr_utils import RLRStep, Settings
from rlr_utils.advantages import Advantages
from rlr_utils.batch import prompt_numbers


def batches_of(*rewards, black_box=None, prompts=None):
    """Batches as `Advantages.compare` reads and fills them, from lists of rewards."""
    made = []
    for i, values in enumerate(rewards):
        values = torch.tensor(values, dtype=torch.float64)
        parts = values if black_box is None else torch.tensor(black_box[i], dtype=torch.float64)
        groups = None if prompts is None else prompt_numbers(prompts[i], "cpu")
        made.append(SimpleNamespace(rewards=values, black_box=parts, predicted=None, prompts=groups))
    return made


def compared(batches, **settings):
    advantages = Advantages(Settings(**settings), num_steps=3)
    advantages.compare(batches)
    return advantages


def test_images_are_compared_over_all_batches():
    batches = batches_of([1.0, 2.0], [10.0, 4.0, 3.0], black_box=[[0.0, 1.0], [1.0, 2.0, 6.0]])
    compared(batches)
    assert batches[0].advantages["total"].tolist() == pytest.approx([1 - 19 / 4, 2 - 18 / 4])
    assert batches[1].advantages["total"].tolist() == pytest.approx([10 - 10 / 4, 4 - 16 / 4, 3 - 17 / 4])
    assert batches[1].advantages["black_box"].tolist() == pytest.approx([1 - 9 / 4, 2 - 8 / 4, 6 - 4 / 4])


def test_a_batch_is_compared_with_the_other_batches():
    batches = batches_of([1.0, 2.0], [10.0, 4.0, 4.0], [3.0])
    compared(batches)
    assert [batch.mean_advantage for batch in batches] == pytest.approx([1.5 - 4.5, 6 - 2.25, 3 - 3.75])


def test_a_single_image_is_compared_with_earlier_ones():
    advantages = compared(batches_of([4.0]))
    (batch,) = batches_of([7.0])
    advantages.compare([batch])
    assert batch.advantages["total"].tolist() == [3.0] and batch.mean_advantage == 3.0


def test_no_baseline_leaves_the_rewards():
    (batch,) = batches_of([1.0, 2.0], black_box=[[0.0, 1.0]])
    compared([batch], baseline="none")
    assert batch.advantages["total"].tolist() == [1.0, 2.0]
    assert batch.advantages["black_box"].tolist() == [0.0, 1.0]


def test_prompts_are_compared_over_all_batches():
    batches = batches_of([1.0, 2.0], [10.0, 4.0], prompts=[["a", "b"], ["a", "a"]])
    compared(batches, baseline="per_prompt")
    assert batches[0].advantages["total"].tolist() == pytest.approx([1 - 7, 2 - 5])
    assert batches[1].advantages["total"].tolist() == pytest.approx([10 - 2.5, 4 - 5.5])
    numbers_of_prompts = prompt_numbers(["a", "b", "a", "A"], "cpu").tolist()
    assert numbers_of_prompts[0] == numbers_of_prompts[2] and len(set(numbers_of_prompts)) == 3
    assert numbers_of_prompts == prompt_numbers(["a", "b", "a", "A"], "cpu").tolist()


def test_ddpo_measures_rewards_and_divergence_in_standard_deviations():
    batches = batches_of([1.0, 3.0], [5.0])  # of a standard deviation of 2
    compared(batches, estimator="ddpo", kl_weight=0.6)
    assert batches[0].advantages["total"].tolist() == pytest.approx([-1.5, 0.0]) and batches[1].kl_weight == 0.3
    assert batches[0].advantages["black_box"].tolist() == pytest.approx([-3.0, 0.0])
    batches = batches_of([1.0, 3.0], [5.0])
    compared(batches, kl_weight=0.6)
    assert batches[0].advantages["total"].tolist() == pytest.approx([-3.0, 0.0]) and batches[1].kl_weight == 0.6


# Two processes against one

RANKS = ((2, 4), (3, 3))  # the sizes of the batches of each rank
SETTINGS = {
    "leave_one_out": ("sum", {"mixing": 0.5, "baseline": "leave_one_out"}),
    "per_prompt": ("black box", {"baseline": "per_prompt"}),
    "predicted_x0": ("sum", {"baseline": "predicted_x0"}),
    "weight perturbation": (
        "smooth",
        {"estimator": "rlr_paper", "subchain_range": (3, 3), "subchain_sampling": "grad_norm", "zo_scale": 0.2},
    ),
    "ddpo with inner epochs": ("smooth", {"estimator": "ddpo", "num_inner_epochs": 2, "kl_weight": 0.1}),
}


def run(name, gather, mine):
    """Two optimizer steps on some of the images: parameters after each, statistics and metrics.

    Args:
        gather: as in `Settings`.
        mine: the indices of the batches of this rank.
    """
    kind, settings = SETTINGS[name]
    random.seed(0)
    network = NonlinearChain(num_steps=5, dim=6)
    base = NonlinearChain(num_steps=5, dim=6, seed=3)
    if "kl_weight" in settings:
        settings = {**settings, "base_model": lambda: mock.patch.object(network, "net", base.net)}
    parameters = list(network.parameters())
    rlr = RLRStep(5, kind != "black box", black_box=kind == "sum", parameters=parameters, gather=gather, **settings)
    found, sizes = [], sum(RANKS, ())
    for step in range(2):
        batches = []
        for i in mine:
            generator = torch.Generator().manual_seed(100 * step + i)
            conditions, x_T = torch.randn(2, sizes[i], 6, dtype=torch.float64, generator=generator)
            score = ImageReward(kind, 1 + torch.rand(sizes[i], dtype=torch.float64, generator=generator))
            prompts = [str((i + j) % 5) for j in range(sizes[i])]
            with mock.patch("random.getrandbits", return_value=100 * step + i):  # the seed of the perturbation
                chain, x_T = ImageChain(network, conditions), x_T.view(-1, *ImageChain.shape)
                batches.append(rlr.rollout(chain, x_T, score, generator, prompts=prompts))
        for _ in range(rlr.settings.num_inner_epochs):
            metrics = rlr.backward(batches)
            gradient = gather(gradients(network)[None]).mean(0)
            torch.nn.utils.vector_to_parameters(
                torch.nn.utils.parameters_to_vector(parameters).detach() - 1e-3 * gradient, parameters
            )
            found += [gradient, torch.tensor(list(metrics.values()), dtype=torch.float64)]
    return [*found, numbers(rlr.state_dict())]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": 2, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)

    def gather(tensor):
        parts = [torch.empty_like(tensor) for _ in RANKS]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    torch.save({name: run(name, gather, (2 * rank, 2 * rank + 1)) for name in SETTINGS}, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_are_one_process_with_all_images(tmp_path):
    """Gradients averaged over the ranks, metrics and statistics."""
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for name in SETTINGS:
        expected = run(name, lambda tensor: tensor, range(4))
        assert len(expected) == len(first[name]) and expected[0].norm() > 0
        for values in (first[name], second[name]):
            for value, reference in zip(values, expected):
                torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10, equal_nan=True)
