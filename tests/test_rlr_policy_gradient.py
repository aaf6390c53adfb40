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
import pytest
import torch
from rlr_chains import EXACT, NonlinearChain, gradients
from rlr_utils import ClippedRatio, backward_sweep, ddpo, rollout


def clipped_objective(chain, trajectory, advantages, clip_range):
    """PPO's objective of the whole chain as one graph, from log-probabilities."""
    objective = torch.zeros((), dtype=torch.float64)
    for k in range(1, chain.num_steps + 1):
        drawn = trajectory.latents[k - 1]
        old = torch.distributions.Normal(drawn - chain.sigma(k) * trajectory.noises[k], chain.sigma(k))
        new = torch.distributions.Normal(chain.mean(k, trajectory.latents[k]), chain.sigma(k))
        ratio = (new.log_prob(drawn).sum(1) - old.log_prob(drawn).sum(1)).exp()
        clamped = ratio.clamp(1 - clip_range, 1 + clip_range)
        advantage = advantages if advantages.ndim == 1 else advantages[k]
        objective = objective + torch.minimum(ratio * advantage, clamped * advantage).mean()
    return objective


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("moved", [0.0, 0.02, 0.1])
def test_the_clipped_ratio_is_the_gradient_of_ppos_objective(moved, per_step):
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(64, 3, dtype=torch.float64))
    advantages = torch.randn(*([chain.num_steps + 1] if per_step else []), 64, dtype=torch.float64)
    with torch.no_grad():
        for p in chain.parameters():
            p += moved * torch.randn_like(p)
    ratio = ClippedRatio(chain, trajectory, advantages, clip_range=0.2)
    backward_sweep(chain, trajectory, ddpo(chain.num_steps).mixing, cotangent=ratio)
    swept = gradients(chain)
    (-clipped_objective(chain, trajectory, advantages, 0.2)).backward()
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
    assert len(ratio.clipped) == chain.num_steps
    fraction = torch.stack(ratio.clipped).mean().item()
    assert (fraction == 0) if moved == 0 else (0 < fraction < 1)
