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
from rlr_chains import LinearGaussianChain, NonlinearChain, gradients
from rlr_utils import PerturbedChain, WeightPerturbation, rollout


def test_a_perturbation_follows_its_seed_and_is_removed_to_the_bit():
    chain = NonlinearChain()
    before = [p.clone() for p in chain.parameters()]
    perturbation = WeightPerturbation(chain.parameters(), 0.1, seed=5, steps=(2, 4))
    x = torch.randn(4, 3, dtype=torch.float64)
    perturbed = PerturbedChain(chain, perturbation)
    plain = [chain.mean(k, x) for k in range(1, 6)]
    moved = [perturbed.mean(k, x) for k in range(1, 6)]
    again = [PerturbedChain(chain, WeightPerturbation(chain.parameters(), 0.1, 5, (2, 4))).mean(k, x) for k in (2, 4)]
    assert [torch.equal(a, b) for a, b in zip(plain, moved)] == [True, False, True, False, True]
    assert torch.equal(again[0], moved[1]) and torch.equal(again[1], moved[3])
    assert all(torch.equal(a, b) for a, b in zip(before, chain.parameters()))
    with pytest.raises(RuntimeError):
        with perturbation.applied(2):
            raise RuntimeError("in the middle of a step")
    assert all(torch.equal(a, b) for a, b in zip(before, chain.parameters()))


def test_predictions_are_those_of_the_perturbed_weights():
    chain = LinearGaussianChain()
    perturbation = WeightPerturbation(chain.parameters(), 0.1, seed=5, steps=(2,))
    x = torch.randn(4, 4, dtype=torch.float64)
    with perturbation.applied(2):
        expected = chain.predict(2, x)
    found = PerturbedChain(chain, perturbation).predict(2, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not torch.equal(found[1], chain.predict(2, x)[1])


def test_the_mean_of_the_zeroth_order_term_is_the_gradient():
    """Without other noise, and for a reward that is linear in the shift, A eps / s is no noisier than the gradient is
    large, so that a wrong factor shows."""
    chain = LinearGaussianChain()
    chain.a.requires_grad_(False)
    chain.sigma = lambda k: 0.0
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    x_T = torch.randn(1, 4, dtype=torch.float64)
    value = (rollout(chain, x_T).latents[0] * weight).sum().item()
    draws = []
    for seed in range(3000):
        perturbation = WeightPerturbation([chain.b], 0.05, seed, steps=(1, 4, 9))
        x_0 = rollout(PerturbedChain(chain, perturbation), x_T).latents[0]
        perturbation.add_gradient((x_0 * weight).sum().item() - value)
        draws.append(-gradients(chain))
    draws = torch.stack(draws)
    # d x_0 / d b through step k alone is a^{k-1}.
    truth = weight * sum(chain.a.detach() ** (k - 1) for k in (1, 4, 9))
    assert ((draws.mean(0) - truth) / (draws.std(0) / len(draws) ** 0.5)).abs().max() < 5
    assert ((draws.mean(0) - truth) / truth).abs().max() < 0.5
