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
"""The mean gradient of `RLRStep` on the linear-Gaussian chain against its closed form."""

import random

import pytest
from rlr_chains import z_scores
from rlr_utils import RLRStep


def score_of(kind, chain):
    """The reward of the chain, without its gradient, or as a sum in which half of the coordinates have none."""

    def score(x_0, with_gradient):
        parts, gradient = chain.parts(x_0).detach(), chain.reward_grad(x_0)
        if kind == "sum":
            gradient[:, 2:] = 0
            return parts.sum(1), gradient if with_gradient else None, parts[:, 2:].sum(1)
        assert kind == "smooth" or not with_gradient
        return parts.sum(1), gradient if with_gradient else None

    return score


def estimate_with(kind, settings, sizes=(160, 96)):
    """`estimate(chain, x_T)` for `z_scores`, an optimizer step with batches of different sizes."""
    steps = []

    def estimate(chain, x_T):
        if not steps:
            rlr = RLRStep(10, kind != "black box", black_box=kind == "sum", parameters=chain.parameters(), **settings)
            steps.append(rlr)
        prompts, options = [str(i % 7) for i in range(len(x_T))], {}
        batches = []
        for part in x_T.split(sizes):
            if settings.get("baseline") == "per_prompt":
                options["prompts"] = prompts[: len(part)]
            batches.append(steps[0].rollout(chain, part, score_of(kind, chain), **options))
        steps[0].backward(batches)

    return estimate


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("smooth", {}),
        ("smooth", {"estimator": "full_bp", "sweep_fraction": 0.4}),
        ("smooth", {"mixing": 0.5, "baseline": "per_prompt"}),
        ("smooth", {"mixing": 0.5, "sweep_fraction": 0.4}),
        ("smooth", {"mixing": 0.7, "baseline": "predicted_x0"}),
        ("smooth", {"estimator": "rlr_paper", "rest": "likelihood_ratio", "subchain_sampling": "grad_norm"}),
        ("smooth", {"estimator": "rlr_paper", "subchain_length": 4}),
        ("black box", {}),
        ("black box", {"mixing": 0.0, "baseline": "leave_one_out"}),
        ("black box", {"mixing": 0.5, "baseline": "per_prompt", "sweep_fraction": 0.5}),
        ("black box", {"baseline": "none"}),
        ("black box", {"estimator": "rlr_paper", "rest": "likelihood_ratio"}),
        ("sum", {}),
        ("sum", {"mixing": 0.6, "baseline": "leave_one_out"}),
        ("sum", {"mixing": 0.6, "baseline": "predicted_x0", "sweep_fraction": 0.5}),
        ("sum", {"estimator": "rlr_paper", "rest": "likelihood_ratio"}),
    ],
    ids=str,
)
def test_the_mean_gradient_is_that_of_the_closed_form(kind, settings):
    random.seed(0)
    assert z_scores(estimate_with(kind, settings)) < 5


def test_the_mean_gradient_of_branches_is_that_of_the_closed_form():
    random.seed(0)
    estimate = estimate_with("black box", {"branches": 3}, sizes=(3, 1))
    assert z_scores(estimate, batch_size=4) < 5


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("smooth", {"estimator": "truncated_bp"}),
        ("smooth", {"estimator": "truncated_bp", "truncation_steps": 5}),
        ("smooth", {"estimator": "alignprop"}),
        ("smooth", {"estimator": "rlr_paper", "rest": "none"}),
    ],
    ids=str,
)
def test_the_mean_gradient_of_a_biased_estimator_is_not(kind, settings):
    random.seed(0)
    assert z_scores(estimate_with(kind, settings, sizes=(40, 24)), batches=512, batch_size=64) > 20


@pytest.mark.parametrize("kind", ["black box", "sum"])
def test_a_single_image_per_step_is_unbiased_too(kind):
    """It is compared with earlier images, so that its gradient depends on nothing of its own."""
    random.seed(0)
    assert z_scores(estimate_with(kind, {"mixing": 0.5}, sizes=(1,)), batches=600, batch_size=1) < 5
