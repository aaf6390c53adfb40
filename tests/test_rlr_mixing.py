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
import json
import math
import random

import pytest
import torch
from rlr_chains import LinearGaussianChain
from rlr_utils import (
    AdaptiveMixing,
    SweepStatistics,
    Transport,
    backward_sweep,
    full_bp,
    leave_one_out,
    rlr,
    rollout,
)


NAN = float("nan")


def statistics(pathwise, likelihood_ratio):
    """The statistics of a sweep with these variances at k = 1..T."""
    unseen = [NAN] * (len(pathwise) + 1)
    return SweepStatistics(*torch.tensor([[NAN, *pathwise], [NAN, *likelihood_ratio], unseen, unseen, unseen]))


def test_a_step_that_overflowed_is_not_a_step_without_noise():
    """From a batch that overflowed at some steps the adaptive mixing learns the other steps only."""
    adaptive = AdaptiveMixing(6)
    adaptive.update(statistics([1.0, 1.0, NAN, NAN, NAN, 2.0], [NAN, 5.0, NAN, NAN, 5.0, NAN]))
    gammas = adaptive.gammas(differentiable=True)
    assert gammas[3] == gammas[4] == 0.999 and gammas[6] == 1.0  # the last one was swept without a likelihood ratio


def test_the_mixing_of_a_black_box_is_the_inverse_variance_of_earlier_batches():
    adaptive = AdaptiveMixing(2, decay=0.75)
    assert rlr(2, adaptive, differentiable=True).mixing[1:] == [1.0, 0.999]
    assert rlr(2, adaptive, differentiable=False).mixing[1:] == [0.0, 0.001]
    adaptive.update(statistics([1.0, 1.0], [1.0, 3.0]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([0.5, 0.75])
    adaptive.update(statistics([1.0, 5.0], [1.0, 3.0]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([0.5, 3 / (3 + 2)])
    assert rlr(2, adaptive, differentiable=False).mixing[1:] == pytest.approx([0.0, 3 / (3 + 2)])


def variance_of_the_sum(gammas, first, fresh):
    """Var(sum_k c_{k-1}) for unit Jacobians, from the coefficient of every noise source in every cotangent."""
    num_steps = len(gammas) - 1
    cotangent = torch.zeros(num_steps + 1, dtype=torch.float64)
    cotangent[1] = 1.0
    total = cotangent.clone()
    for k in range(2, num_steps + 1):
        cotangent = gammas[k] * cotangent
        cotangent[k] = 1 - gammas[k]
        total = total + cotangent
    return (total.square() * torch.tensor([0.0, first, *fresh[1:]], dtype=torch.float64)).sum().item()


@pytest.mark.parametrize("first", [0.05, 1.0, 30.0])
def test_the_mixing_of_a_reward_with_a_gradient_has_the_least_variance(first):
    torch.manual_seed(0)
    random.seed(0)
    num_steps, fresh = 8, torch.rand(8, dtype=torch.float64) * 20 + 1
    adaptive = AdaptiveMixing(num_steps)
    adaptive.update(statistics([first] * num_steps, fresh.tolist()))
    gammas = rlr(num_steps, adaptive, differentiable=True).mixing
    # `statistics` is in float32.
    first, fresh = adaptive.squares[0, 1].item(), adaptive.squares[1, 1:].tolist()
    least = variance_of_the_sum(gammas, first, fresh)
    greedy = [None, 1.0, *adaptive.gammas(differentiable=False)[2:]]
    for other in (greedy, full_bp(num_steps).mixing, [None, 1.0] + [0.0] * (num_steps - 1)):
        assert least <= variance_of_the_sum(other, first, fresh)
    for _ in range(500):
        moved = [min(max(g + 0.05 * random.gauss(0, 1), 0), 1) if k > 1 else g for k, g in enumerate(gammas)]
        assert least <= variance_of_the_sum(moved, first, fresh) * (1 + 1e-9)


def test_the_mixing_keeps_its_start_where_nothing_was_seen():
    adaptive = AdaptiveMixing(2)
    adaptive.update(statistics([0.0, 1.0], [0.0, NAN]))
    assert adaptive.gammas(differentiable=True)[1:] == [0.999, 0.999]
    assert adaptive.gammas(differentiable=False)[1:] == [0.001, 0.001]


def test_the_mixing_learns_the_pathwise_variance_of_a_black_box():
    """It starts with a small share of the pathwise cotangent, since one without any share would never be seen."""
    torch.manual_seed(0)
    chain = LinearGaussianChain(num_steps=4)
    adaptive = AdaptiveMixing(4)
    trajectory = rollout(chain, torch.randn(64, 4, dtype=torch.float64))
    rewards = leave_one_out(chain.reward(trajectory.latents[0]))
    mixing = rlr(4, adaptive, differentiable=False).mixing
    adaptive.update(backward_sweep(chain, trajectory, mixing, advantages=rewards))
    assert all(0.05 < gamma < 0.95 for gamma in rlr(4, adaptive, differentiable=False).mixing[2:])


def test_the_mixing_leaves_a_step_without_noise_to_the_gradient():
    adaptive = AdaptiveMixing(3)
    adaptive.update(statistics([1.0, 1.0, 1.0], [2.0, NAN, 3.0]))
    gammas = adaptive.gammas(differentiable=True)
    assert gammas[2] == 1.0 and 0 < gammas[3] < 1


def test_the_mixing_recovers_from_what_a_batch_did_not_see():
    """Equal scores make the likelihood ratio zero, which counts as not seen and not as a cotangent without noise."""
    adaptive = AdaptiveMixing(2, decay=0.5)
    adaptive.update(statistics([1.0, 2.0], [0.0, 2.0]))
    assert adaptive.gammas(differentiable=False)[1:] == [0.001, 0.5]
    adaptive.update(statistics([NAN, 2.0], [6.0, float("inf")]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([6 / (6 + 1), 0.5])
    adaptive.update(statistics([1.0, 2.0], [0.0, 0.0]))
    assert adaptive.gammas(differentiable=False)[1:] == pytest.approx([6 / (6 + 1), 0.5])


def test_the_mixing_can_begin_with_a_batch_of_equal_scores():
    """Such as a saturated reward: there is a gradient, and no likelihood ratio to compare it with."""
    adaptive = AdaptiveMixing(4)
    adaptive.update(statistics([1.0] * 4, [0.0] * 4))
    assert adaptive.gammas(differentiable=True)[2:] == [1.0] * 3
    adaptive.update(statistics([1.0] * 4, [3.0] * 4))
    same = AdaptiveMixing(4)
    same.update(statistics([1.0] * 4, [3.0] * 4))
    assert adaptive.gammas(differentiable=True) == same.gammas(differentiable=True)


def test_the_mixing_can_be_saved_and_refuses_another_chain():
    adaptive, other = AdaptiveMixing(2), AdaptiveMixing(2)
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    assert other.squares is None
    adaptive.update(statistics([0.1, 1.0], [1 / 3, NAN]))
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict(), allow_nan=False)))
    assert other.gammas(differentiable=True) == adaptive.gammas(differentiable=True)
    with pytest.raises(ValueError, match="mixing statistics are for 2 inference steps, not 7"):
        AdaptiveMixing(7).load_state_dict(adaptive.state_dict())


def test_transport_is_a_running_mean_of_the_gains_that_were_seen():
    transport = Transport(3, decay=0.75)
    assert transport.gains == [1.0] * 4
    for gains in ([NAN, 0.2, NAN, math.inf], [NAN, 0.2, 2.0, NAN]):
        transport.update(SweepStatistics(*torch.tensor([[NAN] * 4] * 3 + [gains, [NAN] * 4])))
    assert transport.gains == pytest.approx([1.0, 0.2 + 0.8 * 0.75**2, 1.25, 1.0])
    again = Transport(3)
    again.load_state_dict(json.loads(json.dumps(transport.state_dict())))
    assert again.gains == transport.gains
    with pytest.raises(ValueError, match="transport statistics are for 3 inference steps, not 5"):
        Transport(5).load_state_dict(transport.state_dict())
