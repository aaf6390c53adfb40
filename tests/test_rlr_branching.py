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
import random

import pytest
import torch
from rlr_chains import EXACT, ImageChain, ImageReward, NonlinearChain, gradients
from rlr_utils import branch, rollout


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_branch_compares_both_signs_of_one_noise(pairs):
    """Each image under its own condition and reward, and its branches one by one."""
    network = NonlinearChain(num_steps=4, dim=6)
    chain = ImageChain(network, torch.randn(3, 6, dtype=torch.float64))
    reward = ImageReward("black box", 1 + torch.rand(3, dtype=torch.float64))
    trajectory = rollout(chain, torch.randn(3, *chain.shape, dtype=torch.float64))
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    branch(chain, trajectory, reward.total, pairs, scale=0.5)
    found = gradients(network)

    torch.set_rng_state(states[0])
    random.setstate(states[1])
    loss, steps = 0.0, []
    for i in range(3):
        k = random.randint(1, 4)
        steps.append(k)
        noises = torch.randn(pairs, *chain.shape, dtype=torch.float64)
        later = {j: torch.randn(chain.shape, dtype=torch.float64) for j in range(k - 1, 0, -1)}
        for noise in noises:
            rewards = []
            for sign in (1.0, -1.0):
                x = trajectory.latents[k].clone()  # the whole batch, of which image i counts
                for j in range(k, 0, -1):
                    step_noise = sign * noise if j == k else later[j]
                    x = chain.mean(j, x).detach() + chain.sigma(j) * step_noise
                rewards.append(reward.total(x)[i])
            cotangent = (rewards[0] - rewards[1]) * noise / (2 * chain.sigma(k))
            mean = chain.mean(k, trajectory.latents[k])[i]
            loss = loss - 0.5 * 4 * (cotangent * mean).sum() / (3 * pairs)
    loss.backward()
    assert len(set(steps)) > 1 and found.norm() > 0
    torch.testing.assert_close(found, gradients(network), **EXACT)
