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
"""What study.py compares, and what it costs: rewards, estimators, and the price of an optimizer step in bare calls."""

import functools
import os
from typing import NamedTuple

import torch
from bench_runs import FLAGS
from rlr_training.checks import rlr_settings
from rlr_utils import RLRStep
from rlr_utils.settings import NEED_GRADIENT
from train_rlr_sd import parse_args


def fast_sine(images, prompts):
    """sin(1200 w . image) for a fixed direction w.

    Over images that differ it averages to nothing. At any one image it is nearly all of the gradient, whose direction then
    says nothing about where the reward rises.
    """
    direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    direction = (direction / direction.norm()).to(images)
    return torch.sin(1200 * (images * direction).sum((1, 2, 3)))


SINE = f"{os.path.abspath(__file__)}:fast_sine"


class Reward(NamedTuple):
    """A reward of the study.

    Attributes:
        trained: what is trained for, as for --reward.
        heldout: what is measured besides.
        has_gradient: whether the reward has a gradient.
        mixing: that the price of rlr assumes. With "auto" it is that of the first step; 0.5 stands for a rough reward, where
            the likelihood ratio gets a share at every step later on.
    """

    trained: str
    heldout: str
    has_gradient: bool = True
    mixing: object = "auto"


REWARDS = {
    "smooth": Reward("aesthetic", "clip_score"),
    "text": Reward("clip_score", "aesthetic"),
    "rough": Reward(f"aesthetic,{SINE}:0.5", "clip_score", mixing=0.5),
    "black box": Reward("jpeg_compressibility", "clip_score", has_gradient=False),
}
PAPER = ["--gradient_estimator", "rlr_paper", "--subchain_length", "2", "--rest"]
# {name: flags of train_rlr_sd.py}
ESTIMATORS = {
    "rlr": [],
    "rlr, predicted_x0": ["--baseline", "predicted_x0"],
    "rlr, leave_one_out": ["--baseline", "leave_one_out"],
    "rlr, per_prompt": ["--baseline", "per_prompt", "--images_per_prompt", "2"],
    "rlr, no baseline": ["--baseline", "none"],
    "rlr_paper, zeroth_order": [*PAPER, "zeroth_order"],
    "rlr_paper, likelihood_ratio": [*PAPER, "likelihood_ratio"],
    "rlr_paper, none": [*PAPER, "none"],
    "ddpo": ["--gradient_estimator", "ddpo"],
    "full_bp": ["--gradient_estimator", "full_bp"],
    "alignprop": ["--gradient_estimator", "alignprop"],
    "truncated_bp 1": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "1"],
    "truncated_bp 5": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "5"],
    "draft_lv": ["--gradient_estimator", "draft_lv"],
}
# The baseline that "rlr" has by default for a reward gets no row of its own; for others it is leave-one-out.
DEFAULT_BASELINE = {"rough": None, "black box": "rlr, predicted_x0"}
# At .02 estimators that need a gradient ruin the images of smooth and rough rewards, so that a comparison means nothing.
LEARNING_RATES = (5e-3, 1e-2, 1.4e-2)
TUNING_SEED = 100
SEEDS = range(5)


class Settings(NamedTuple):
    """What all cells share.

    Attributes:
        budget: seconds of bare calls for a run.
        batch_size: images of an optimizer step.
        num_steps: T.
        num_images: on which an adapter is evaluated.
    """

    budget: float
    batch_size: int
    num_steps: int
    num_images: int


class Cell(NamedTuple):
    """A run of train_rlr_sd.py."""

    reward: str
    estimator: str
    learning_rate: float
    seed: int


def flags_of(settings):
    """The flags that all runs share, besides `bench_runs.FLAGS`."""
    size = str(settings.batch_size)
    return [
        *("--num_inference_steps", str(settings.num_steps), "--train_batch_size", size),
        *("--decode_batch_size", size, "--lr_scheduler", "linear", "--resolution", "32"),
    ]


def estimator_flags(estimator, num_steps):
    """The flags of an estimator. All graphs are kept where the sweep can use those of the rollout, at a cost in memory."""
    flags = ESTIMATORS[estimator]
    keeps_graphs = estimator not in ("draft_lv", "rlr_paper, zeroth_order")
    return [*flags, "--keep_graphs", str(num_steps)] if keeps_graphs else flags


def needs_gradient(estimator):
    """Whether an estimator is of no use for a black box."""
    return any(name in ESTIMATORS[estimator] for name in NEED_GRADIENT)


def estimators_of(reward):
    """The estimators that can be used with a reward, each under one name."""
    names = [name for name in ESTIMATORS if REWARDS[reward].has_gradient or not needs_gradient(name)]
    return [name for name in names if name != DEFAULT_BASELINE.get(reward, "rlr, leave_one_out")]


class Cost(NamedTuple):
    """What an image takes on average: U-Net calls, and steps at which a predicted image is scored."""

    forward: float
    swept: float
    predicted: float


@functools.cache
def planned_cost(reward, estimator, num_steps):
    """The `Cost` of an estimator, as `RLRStep` counts it."""
    flags = ["--num_inference_steps", str(num_steps), *estimator_flags(estimator, num_steps)]
    settings = rlr_settings(parse_args([*FLAGS, *flags]))
    if settings["estimator"] == "rlr":
        settings["mixing"] = REWARDS[reward].mixing
    rlr = RLRStep(num_steps, REWARDS[reward].has_gradient, **settings)
    schedule = rlr.draw_schedule()
    return Cost(*rlr.expected_calls(schedule), len(rlr.predicted_steps(schedule)))


def cost_of_run(reward, estimator, num_steps, swept, predicted):
    """The `Cost` of a run that swept, and predicted, so many steps on average."""
    planned = planned_cost(reward, estimator, num_steps)
    # Where graphs are kept, the forward pass of a swept step is that of the rollout.
    is_kept = "--keep_graphs" in estimator_flags(estimator, num_steps)
    forward = planned.forward + (planned.swept - swept if is_kept else 0)
    return Cost(forward, swept, predicted)


def price_of(reward, estimator, prices, cost):
    """Seconds of bare calls for an image.

    Args:
        prices: {call: seconds for an image}.
        cost: `Cost`.
    """
    score, gradient = prices[f"score {reward}"], prices.get(f"gradient {reward}")
    scoring = score if gradient is None or estimator == "ddpo" else gradient
    if estimator == "draft_lv":
        scoring = score + 2 * gradient
    network = cost.forward * prices["forward"] + cost.swept * prices["vjp"]
    return network + scoring + cost.predicted * score


def step_price(reward, estimator, prices, settings, cost=None):
    """Seconds of bare calls for an optimizer step, at its planned cost or at another."""
    cost = cost or planned_cost(reward, estimator, settings.num_steps)
    return price_of(reward, estimator, prices, cost) * settings.batch_size


def cell_of(row):
    """The `Cell` of a row."""
    return Cell(row["reward"], row["estimator"], row["learning_rate"], int(row["seed"]))


def best_learning_rate(rows, reward, estimator):
    """The learning rate whose run on the tuning seed ended highest, or `None` if there is no such run."""
    tried = [Cell(reward, estimator, rate, TUNING_SEED) for rate in LEARNING_RATES]
    own = [row for row in rows if cell_of(row) in tried]
    return max(own, key=lambda row: row["final"])["learning_rate"] if own else None


def rows_of_seeds(rows, reward, estimator, cells):
    """Of rows of cells or curves those of `SEEDS`, at the learning rate that the cells have chosen."""
    rate = 0.0 if estimator == "base" else best_learning_rate(cells, reward, estimator)
    return [row for row in rows if row["seed"] in SEEDS and cell_of(row)[:3] == (reward, estimator, rate)]
