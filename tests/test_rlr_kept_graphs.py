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
"""How many graphs are kept with keep_graphs="auto", on a stand-in for a GPU's memory."""

import weakref

import pytest
import torch
from rlr_chains import NonlinearChain, gradients
from rlr_utils import RLRStep, kept_graphs


NUM_STEPS = 6


class SmallDevice(NonlinearChain):
    """A chain on a device that holds so many graphs at a time, and then fails as a GPU does."""

    def __init__(self, holds=10**9):
        super().__init__(NUM_STEPS)
        self.holds, self.graphs, self.most = holds, 0, 0

    def mean(self, k, x):
        mean = super().mean(k, x)
        if torch.is_grad_enabled():
            if self.graphs >= self.holds:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.graphs += 1
            self.most = max(self.most, self.graphs)
            # A graph is freed by its backward pass, or else with the tensor; a finalizer acts only once.
            free = weakref.finalize(mean, self.free)
            mean.register_hook(lambda gradient: free() and None)
        return mean

    def free(self):
        self.graphs -= 1


@pytest.fixture
def set_room(monkeypatch):
    """`set_room(n)`: as far as it can be told, n graphs of a batch fit beside the peak of the first step."""

    def set_room(number):
        monkeypatch.setattr(kept_graphs, "spare_bytes", lambda device: 100 * number + 50)
        monkeypatch.setattr(kept_graphs, "graph_bytes", lambda chain, trajectory: 100)

    return set_room


def score(x_0, with_gradient):
    return -x_0.square().sum(1), -2 * x_0


def step(rlr, chain, seed, num_batches=2, single_generator=True):
    """(rewards, gradient, the steps of each batch whose graphs were kept) of an optimizer step without the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        x_T = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        given = generator if single_generator else [torch.Generator().manual_seed(seed + i) for i in range(3)]
        batches.append(rlr.rollout(chain, x_T, score, given))
    kept = [sorted(batch.trajectory.kept) for batch in batches]
    rlr.backward(batches)
    return torch.cat([batch.rewards for batch in batches]), gradients(chain), kept


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (1, 0), (5, 2), (100, NUM_STEPS)])
def test_the_graphs_of_all_batches_fit_into_what_the_first_step_leaves(set_room, room, kept):
    """Two batches a step; from the second step on, with the same gradient."""
    set_room(room)
    plain, automatic = (RLRStep(NUM_STEPS, estimator="full_bp", keep_graphs=value) for value in (0, "auto"))
    one, other = SmallDevice(), SmallDevice()
    for seed in range(3):
        expected, found = step(plain, one, seed), step(automatic, other, seed)
        assert found[2] == [list(range(1, 1 + (kept if seed else 0)))] * 2
        for a, b in zip(found[:2], expected[:2]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert one.most == 1 and other.most == max(2 * kept, 1)


@pytest.mark.parametrize("holds", [1, 3, 5, 9])
@pytest.mark.parametrize("single_generator", [True, False])
def test_if_memory_runs_out_no_graphs_are_kept_from_then_on(set_room, holds, single_generator):
    """In the first rollout or a later one; what was drawn is drawn again, and the step is the same."""
    set_room(100)
    plain, automatic = (RLRStep(NUM_STEPS, estimator="full_bp", keep_graphs=value) for value in (0, "auto"))
    one, other = SmallDevice(), SmallDevice(holds)
    for seed in range(3):
        expected = step(plain, one, seed, single_generator=single_generator)
        found = step(automatic, other, seed, single_generator=single_generator)
        assert found[2] == [[], []]
        for a, b in zip(found[:2], expected[:2]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert automatic.kept.steps == 0 and other.most == holds


def test_without_a_gpu_none_are_kept():
    rlr, chain = RLRStep(NUM_STEPS, estimator="full_bp", keep_graphs="auto"), SmallDevice()
    assert [step(rlr, chain, seed)[2] for seed in range(2)] == 2 * [[[], []]]


def test_a_number_of_graphs_is_kept_whatever_memory_there_is(set_room):
    """And memory that runs out is an error."""
    set_room(0)
    rlr = RLRStep(NUM_STEPS, estimator="full_bp", keep_graphs=2)
    assert step(rlr, SmallDevice(), 0)[2] == [[1, 2], [1, 2]]
    with pytest.raises(torch.OutOfMemoryError):
        step(rlr, SmallDevice(holds=3), 0)


@pytest.mark.parametrize(
    "settings",
    [{"estimator": "draft_lv"}, {"estimator": "rlr_paper", "parameters": [torch.nn.Parameter(torch.zeros(1))]}],
    ids=lambda settings: settings["estimator"],
)
def test_estimators_without_graphs_of_the_rollout_keep_none(set_room, settings):
    set_room(100)
    rlr = RLRStep(NUM_STEPS, keep_graphs="auto", **settings)
    assert not rlr.kept.is_auto and rlr.kept.steps == 0
