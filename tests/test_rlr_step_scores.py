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
"""What `score` may return to `RLRStep`, how predicted images are scored, and where a rank finds its own images."""

import pytest
import torch
from rlr_chains import ImageChain, NonlinearChain
from rlr_utils import DenoisingChain, RLRStep


NETWORK = NonlinearChain(dim=6)
T = NETWORK.num_steps


def chain_of(batch):
    return ImageChain(NETWORK, torch.zeros(batch, 6, dtype=torch.float64))


def latents(batch):
    return torch.randn(batch, *ImageChain.shape, dtype=torch.float64)


def test_whole_numbers_are_rewards():
    rlr = RLRStep(T, differentiable=False, baseline="leave_one_out")
    batch = rlr.rollout(chain_of(4), latents(4), lambda x_0, _: (torch.tensor([3, 1, 2, 6]), None))
    rlr.backward([batch])
    assert batch.rewards.tolist() == [3.0, 1.0, 2.0, 6.0]
    assert batch.advantages["total"].tolist() == pytest.approx([0.0, -8 / 3, -4 / 3, 4.0])


@pytest.mark.parametrize(
    "rewards, message",
    [
        ([1.0, 2.0], "rewards that is a list, not a tensor"),
        (torch.zeros(2, 1), r"rewards of shape \(2, 1\) for a batch of 2"),
    ],
)
def test_other_results_are_refused_and_leave_no_trace(rewards, message):
    rlr = RLRStep(T, differentiable=False)
    before = rlr.state_dict()
    with pytest.raises(ValueError, match=message):
        rlr.rollout(chain_of(2), latents(2), lambda x_0, _: (rewards, None))
    assert rlr.state_dict() == before


@pytest.mark.parametrize("predicted", [False, True])
def test_a_reward_that_is_not_finite_is_refused_before_it_is_compared(predicted):
    """Once for all batches, those of predicted images too, and the next step is as if it had not been."""
    rlr, calls = RLRStep(T, differentiable=False), []
    before = rlr.state_dict()

    def score(x_0, with_gradient):
        calls.append(len(x_0))
        rewards = torch.ones(len(x_0))
        rewards[1] = float("nan") if len(calls) == (2 if predicted else 1) else 1.0
        return rewards, None

    batches = [rlr.rollout(chain_of(2), latents(2), score) for _ in range(2)]
    with pytest.raises(ValueError, match="score returned rewards that is nan for image 1 of the batch"):
        rlr.backward(batches)
    assert rlr.state_dict() == before
    rlr.backward([rlr.rollout(chain_of(2), latents(2), score)])


def test_predicted_images_of_all_steps_are_scored_at_once_by_a_scorer_of_their_own():
    """Image i of them has the prompt i mod B, here a factor of its reward; the result is that of one call a step."""
    factors, calls = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64), []

    def score(x_0, with_gradient):
        return factors * x_0.sum((1, 2, 3)), None

    def score_predictions(x_0, with_gradient):
        calls.append(len(x_0))
        return factors.repeat(len(x_0) // 3) * x_0.sum((1, 2, 3)), None

    x_T, predicted = latents(3), []
    for own in (None, score_predictions):
        rlr = RLRStep(T, differentiable=False)
        torch.manual_seed(1)
        predicted.append(rlr.rollout(chain_of(3), x_T, score, score_predictions=own).predicted["total"])
    assert calls == [3 * T]
    torch.testing.assert_close(*predicted, rtol=0, atol=0, equal_nan=True)


def test_a_rank_finds_its_images_by_what_gather_returns():
    """As the second of two ranks of whatever group `gather` is of."""

    def gather(tensor):
        return torch.cat([torch.zeros_like(tensor), tensor])

    rlr = RLRStep(T, differentiable=False, baseline="none", gather=gather)
    batch = rlr.rollout(chain_of(2), latents(2), lambda x_0, _: (torch.tensor([7.0, 9.0]), None))
    rlr.backward([batch])
    assert batch.advantages["total"].tolist() == [7.0, 9.0]


def test_a_chain_that_cannot_be_renoised_says_so():
    chain = DenoisingChain(None, [], torch.zeros(0), {})
    with pytest.raises(ValueError, match="the chain has no add_noise"):
        chain.renoise(torch.zeros(1, 3), torch.zeros(1, 3))
