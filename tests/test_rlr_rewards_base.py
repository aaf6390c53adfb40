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
"""Weighted sums of rewards."""

import pytest
import torch
from reward_models import WeightedSum, load_reward, load_rewards, parse_reward
from reward_models.base import check_batch, deferred_checks
from rlr_testing import TINY_AESTHETIC, TINY_CLIP


PATHS = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP}


def test_differentiable_and_black_box_members_are_summed_separately():
    # A path of a reward that is not in the sum is ignored.
    rewards = load_rewards(
        parse_reward("aesthetic:2,clip_score,jpeg_compressibility:0.5"), {**PATHS, "pickscore": "nowhere"}
    )
    assert not rewards.differentiable and rewards.has_gradient
    images, prompts = torch.rand(2, 3, 32, 32), ["a red seven", "a blue two"]
    scores = rewards(images, prompts)
    single = {name: load_reward(name, path=PATHS.get(name))(images, prompts) for name in scores.members}
    torch.testing.assert_close(scores.differentiable, 2 * single["aesthetic"] + single["clip_score"])
    torch.testing.assert_close(scores.black_box, 0.5 * single["jpeg_compressibility"])
    torch.testing.assert_close(scores.members["jpeg_compressibility"], single["jpeg_compressibility"])
    torch.testing.assert_close(scores.total, scores.differentiable + scores.black_box)


def test_batch_size_changes_neither_scores_nor_gradient():
    terms = parse_reward("aesthetic:2,clip_score:-3,jpeg_compressibility:.1")
    images, prompts = torch.rand(5, 3, 32, 32).double().requires_grad_(), ["a red one", "a blue two"] * 2 + ["a six"]
    rewards = load_rewards(terms, PATHS, dtype=torch.float64)
    whole = rewards(images, prompts, with_gradient=True)
    parts = WeightedSum(rewards.members, batch_size=2)(images, prompts, with_gradient=True)
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)
    (_, aesthetic), (_, clip_score), _ = rewards.members.values()
    total = 2 * aesthetic(images, prompts) - 3 * clip_score(images, prompts)
    torch.testing.assert_close(whole.gradient, torch.autograd.grad(total.sum(), images)[0], rtol=1e-10, atol=1e-12)
    assert rewards(images, prompts).gradient is None
    assert load_rewards(terms, PATHS, batch_size=3).batch_size == 3


@pytest.mark.parametrize("constant", [lambda images: torch.ones(1), lambda images: torch.ones(1, requires_grad=True)])
def test_constant_scores_have_gradient_zero(constant):
    """Some rewards find nothing to score in some images and return a constant without a graph."""
    bright = lambda images, prompts: images.mean((1, 2, 3)) if images.mean() > 0.5 else constant(images)  # noqa: E731
    bright.differentiable = True
    images = torch.stack([torch.full((3, 8, 8), 0.75), torch.full((3, 8, 8), 0.25)])
    scores = WeightedSum({"mine": (2.0, bright)}, batch_size=1)(images, ["a", "b"], with_gradient=True)
    torch.testing.assert_close(scores.total, torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(scores.gradient.flatten(1).sum(1), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_real_type_are_summed_in_float32(dtype):
    reward = lambda images, prompts: torch.tensor([0, 1], dtype=dtype)  # noqa: E731
    reward.differentiable = False
    scores = WeightedSum({"mine": (0.5, reward)})(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert scores.members["mine"].dtype == scores.total.dtype == torch.float32
    assert scores.total.tolist() == [0, 0.5] and scores.members["mine"].tolist() == [0, 1]


def test_checks_within_deferred_checks_wait_for_the_outermost():
    reached = []
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], but their values range from 2 to 2"):
        with deferred_checks():
            check_batch(torch.full((1, 3, 8, 8), 2.0), ["a"])
            with deferred_checks():
                check_batch(torch.full((1, 3, 8, 8), 3.0), ["a"])
            reached.append(check_batch(torch.full((1, 3, 8, 8), 4.0), ["a"]))
    assert reached == [None]
    with deferred_checks():
        check_batch(torch.ones(1, 3, 8, 8), ["a"])
    with pytest.raises(ValueError, match="range from 3 to 3"):
        check_batch(torch.full((1, 3, 8, 8), 3.0), ["a"])


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (torch.tensor([1.0, float("nan")]), "returned nan for prompt 'b'"),
        (torch.tensor([float("inf"), 1.0]), "returned inf for prompt 'a'"),
        (torch.ones(3), r"returned a tensor of shape \(3,\) instead of \(2,\)"),
        (torch.ones(2, 1), r"returned a tensor of shape \(2, 1\) instead of \(2,\)"),
        (torch.tensor(1.0), r"returned a tensor of shape \(\) instead of \(2,\)"),
        ([1.0, 2.0], r"returned a list instead of a tensor of shape \(2,\)"),
        (torch.ones(2, device="meta"), "returned a tensor on the device 'meta', which has no numbers"),
        (torch.ones(2, dtype=torch.complex64), r"returned complex numbers \(torch.complex64\) instead of real ones"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "returned inf for prompt 'b'"),
    ],
)
def test_invalid_scores_are_refused(result, problem):
    reward = lambda images, prompts: result  # noqa: E731
    reward.differentiable = False
    with pytest.raises(ValueError, match=f"reward 'mine' {problem}"):
        WeightedSum({"mine": (1.0, reward)})(torch.rand(2, 3, 8, 8), ["a", "b"])
