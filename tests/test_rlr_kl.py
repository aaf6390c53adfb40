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
from rlr_chains import EXACT, NonlinearChain, gradients, reward_and_gradient
from rlr_utils import GaussianKL, backward_sweep, rollout


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_divergence_reaches_the_parameters_of_its_own_step_only(gamma):
    """Against autograd of the sum of KL_k with all states held fixed, added to the sweep of the reward."""
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(6, 3, dtype=torch.float64))
    rewards, reward_grad = reward_and_gradient(trajectory.latents[0])
    base = NonlinearChain(num_steps=chain.num_steps, seed=7)
    mixing = [gamma] * (chain.num_steps + 1)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
    plain = gradients(chain)

    def base_mean(k, x):
        with torch.no_grad():
            return base.mean(k, x)

    penalty = GaussianKL(chain, base_mean, trajectory, weight=0.3)
    backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards, penalty=penalty)
    together = gradients(chain)
    divergences = []
    for k in range(1, chain.num_steps + 1):
        x, scale = trajectory.latents[k], torch.tensor(chain.sigma(k), dtype=torch.float64)
        step, other = (torch.distributions.Normal(mean, scale) for mean in (chain.mean(k, x), base_mean(k, x)))
        divergences.append(torch.distributions.kl_divergence(step, other).flatten(1).sum(1).mean())
    (0.3 * torch.stack(divergences).sum()).backward()
    torch.testing.assert_close(together - plain, gradients(chain), **EXACT)
    assert list(penalty.divergences) == [1, 2, 3, 4, 5]
    found = torch.stack(list(penalty.divergences.values()))
    torch.testing.assert_close(found, torch.stack(divergences).detach(), **EXACT)


def test_the_divergence_of_a_step_without_noise_is_refused():
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(6, 3, dtype=torch.float64))
    _, reward_grad = reward_and_gradient(trajectory.latents[0])
    chain.sigma = lambda k: 0.0 if k == 2 else 1.0
    penalty = GaussianKL(chain, lambda k, x: x, trajectory, weight=0.3)
    with pytest.raises(ValueError, match=r"the divergence from the base model needs noise, but sigma\(2\) is 0"):
        backward_sweep(chain, trajectory, [1.0] * 6, reward_grad=reward_grad, penalty=penalty)
