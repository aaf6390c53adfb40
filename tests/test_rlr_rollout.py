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
from rlr_utils import Trajectory, backward_sweep, draw_noise, renoise, rollout


class PredictingChain(NonlinearChain):
    def predict(self, k, x):
        mean = self.mean(k, x)
        return mean, 2 * mean

    def renoise(self, x_0, noise):
        return x_0 + 0.1 * noise


def test_a_rollout_is_the_chain():
    chain = NonlinearChain()
    trajectory = rollout(chain, torch.randn(6, 3, dtype=torch.float64))
    assert len(trajectory.latents) == len(trajectory.noises) == chain.num_steps + 1
    assert trajectory.noises[0] is None and not trajectory.predictions and not trajectory.kept
    for k in range(1, chain.num_steps + 1):
        step = chain.mean(k, trajectory.latents[k]) + chain.sigma(k) * trajectory.noises[k]
        torch.testing.assert_close(trajectory.latents[k - 1], step, **EXACT)
        assert not trajectory.latents[k - 1].requires_grad


def test_the_noises_are_independent_with_unit_variance():
    trajectory = rollout(NonlinearChain(), torch.randn(4000, 3, dtype=torch.float64))
    columns = torch.cat(trajectory.noises[1:], dim=1)
    assert columns.mean(0).abs().max() < 5 / 4000**0.5
    assert (columns.T.cov() - torch.eye(15, dtype=torch.float64)).abs().max() < 5 * (2 / 4000) ** 0.5


def test_a_rollout_starts_at_x_T_and_draws_from_its_generator():
    chain = NonlinearChain()
    x_T = torch.randn(4, 3, dtype=torch.float64)
    before = torch.get_rng_state()
    first = rollout(chain, x_T, torch.Generator().manual_seed(1))
    again = rollout(chain, x_T, torch.Generator().manual_seed(1))
    other = rollout(chain, x_T, torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.latents[chain.num_steps] is x_T
    assert torch.equal(first.latents[0], again.latents[0])
    assert not torch.equal(first.latents[0], other.latents[0])
    generator = torch.Generator().manual_seed(1)
    for k in range(chain.num_steps, 0, -1):  # the order of a pipeline
        assert torch.equal(first.noises[k], torch.randn(4, 3, dtype=torch.float64, generator=generator))


def test_a_generator_per_image_makes_an_image_independent_of_its_batch():
    chain, x_T = NonlinearChain(), torch.randn(4, 3, dtype=torch.float64)
    whole = rollout(chain, x_T, [torch.Generator().manual_seed(i) for i in range(4)])
    alone = rollout(chain, x_T[2:3], torch.Generator().manual_seed(2))
    torch.testing.assert_close(whole.latents[0][2:3], alone.latents[0], **EXACT)
    with pytest.raises(ValueError, match="2 generators for a batch of 4: give one per image"):
        draw_noise((4, 3), [torch.Generator(), torch.Generator()], like=x_T)


@pytest.mark.parametrize("predict", [(), (2, 3)])
def test_kept_graphs_are_not_computed_again(predict):
    chain = PredictingChain()
    x_T, generator = torch.randn(6, 3, dtype=torch.float64), torch.Generator()
    plain = rollout(chain, x_T, generator.manual_seed(1), predict)
    kept = rollout(chain, x_T, generator.manual_seed(1), predict, keep=[1, 2, 4])
    for k in range(chain.num_steps + 1):
        assert torch.equal(plain.latents[k], kept.latents[k]) and not kept.latents[k].requires_grad
    for k in predict:
        assert torch.equal(plain.predictions[k], kept.predictions[k]) and not kept.predictions[k].requires_grad
        torch.testing.assert_close(plain.predictions[k], chain.predict(k, plain.latents[k])[1], **EXACT)
    rewards, reward_grad = reward_and_gradient(plain.latents[0])
    found = []
    for trajectory, calls in ((plain, 5), (kept, 2), (kept, 5)):  # the first sweep uses the graphs up
        chain.calls = 0
        mixing = [None] + [1.0] + [0.6] * 4
        statistics = backward_sweep(chain, trajectory, mixing, reward_grad=reward_grad, advantages=rewards)
        assert chain.calls == calls
        found.append((gradients(chain), statistics))
    for gradient, statistics in found[1:]:
        assert torch.equal(gradient, found[0][0])
        # Means whose graphs were kept are not computed a second time, and so not compared.
        for row, expected in zip(statistics._replace(deviation=found[0][1].deviation), found[0][1]):
            torch.testing.assert_close(row, expected, rtol=0, atol=0, equal_nan=True)


def test_a_renoised_last_step_is_swept_with_its_own_graph():
    chain, x_0 = PredictingChain(), torch.randn(6, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    trajectory = renoise(chain, x_0)
    assert chain.calls == 1 and not trajectory.latents[0].requires_grad
    torch.set_rng_state(state)
    x_1 = x_0 + 0.1 * torch.randn_like(x_0)
    assert torch.equal(trajectory.latents[1], x_1)
    step = chain.mean(1, x_1) + chain.sigma(1) * torch.randn_like(x_0)
    torch.testing.assert_close(trajectory.latents[0], step, **EXACT)
    _, reward_grad = reward_and_gradient(trajectory.latents[0])
    chain.calls = 0
    backward_sweep(chain, trajectory, [1.0] * 6, reward_grad=reward_grad, stop_after=1)
    swept = gradients(chain)
    assert chain.calls == 0
    again = Trajectory(trajectory.latents, trajectory.noises)
    backward_sweep(chain, again, [1.0] * 6, reward_grad=reward_grad, stop_after=1)
    torch.testing.assert_close(swept, gradients(chain), **EXACT)
