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
"""The settings of an RLR step: which estimator, which baseline, and what each of them takes."""

from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Callable, Optional, Sequence, Union


ESTIMATORS = ("rlr", "rlr_paper", "full_bp", "truncated_bp", "draft_lv", "alignprop", "ddpo")
BASELINES = ("auto", "none", "leave_one_out", "per_prompt", "predicted_x0")
RESTS = ("zeroth_order", "likelihood_ratio", "none")
SUBCHAIN_SAMPLINGS = ("uniform", "grad_norm")
AT_LEAST = {
    "lv_samples": 1,
    "num_inner_epochs": 1,
    "branches": 0,
    "keep_graphs": 0,
    "subchain_length": 0,
    "kl_weight": 0,
    "baseline_steps": 0,
}
NEED_GRADIENT = ("full_bp", "truncated_bp", "draft_lv", "alignprop")


@dataclass
class Settings:
    """What `RLRStep` takes by keyword.

    Args:
        estimator: one of `ESTIMATORS`, see `rlr_utils.estimators`.
        mixing: for rlr, the share gamma in [0, 1] of the pathwise cotangent at the steps k >= 2, or "auto" for the shares of
            least variance.
        baseline: one of `BASELINES`, what an image's reward is compared with: nothing, the other images, those of the same
            prompt, or the reward of the image predicted at each step. "auto" is leave_one_out, and for rlr predicted_x0
            at the steps where that pays, see `RLRStep.predicted_steps`.
        baseline_steps: predict at the last so many steps at most; `None` for all.
        sweep_fraction: p in (0, 1], the probability with which a step other than the last three is swept. "auto" is .5 for
            rlr where the whole reward has a gradient and the likelihood ratio a share of at most 5 %, else 1.
        truncation_steps: K of truncated_bp, from 1 to T.
        lv_samples: re-noisings of each image for draft_lv, at least 1.
        subchain_length: h of rlr_paper, 0 for no sub-chain; `estimators.subchain_length` computes the paper's equation 8.
        subchain_range: (low, high), where the sub-chain may start, counted from the last step; `None` for anywhere.
        subchain_sampling: "uniform" or "grad_norm", see `estimators.SubchainSampler`.
        rest: one of `RESTS`, what rlr_paper takes at the other steps.
        zo_scale: above 0, the standard deviation of the weight perturbations of rest="zeroth_order".
        branches: for rlr with a black box, compare this many pairs of branches at one random step of each image instead of
            sweeping all steps; 0 for the sweep.
        num_inner_epochs: for ddpo, how often `backward` is called on the same batches, with an optimizer step after each.
        ppo_clip_range: c of PPO's clipped ratio, above 0.
        kl_weight: at least 0, the reward per nat that a step's divergence from the base model costs.
        base_model: for kl_weight, a function that returns a context manager within which the chain's means are those of
            the base model, such as `partial(diffusion_models.adapters.lora_disabled, model)`.
        keep_graphs: keep the graphs of the last so many steps for the sweep: memory for time. "auto" for as many as memory
            holds that would lie idle, see `KeptGraphs`.
        trained_steps: the steps, from 1 to T, whose network has parameters to train, such as those of one of two experts;
            `None` for all.
        parameters: the trainable parameters; needed for rest="zeroth_order" and subchain_sampling="grad_norm".
        gather: for several ranks, `gather(tensor) -> tensor`, the tensors of all ranks concatenated in rank order along
            dim 0, such as `accelerator.gather`. Every rank must have equally many batches and images.
        shared_seed: for ranks that must call the network equally often, since they share its weights (FSDP): one seed for all
            of them. It draws the steps that are swept, AlignProp's K, where a sub-chain starts, and the steps of branches, on
            all ranks alike. The estimates of the ranks, and so their average, have the same mean as without it. Of the
            steps, the average has one draw instead of one per rank. `None` for Python's global generator.
    """

    estimator: str = "rlr"
    mixing: Union[float, str] = "auto"
    baseline: str = "auto"
    baseline_steps: Optional[int] = None
    sweep_fraction: Union[float, str] = "auto"
    truncation_steps: int = 1
    lv_samples: int = 2
    subchain_length: int = 2
    subchain_range: Optional[Sequence[int]] = None
    subchain_sampling: str = "uniform"
    rest: str = "zeroth_order"
    zo_scale: float = 0.02
    branches: int = 0
    num_inner_epochs: int = 1
    ppo_clip_range: float = 0.2
    kl_weight: float = 0.0
    base_model: Callable[[], Any] = nullcontext
    keep_graphs: Union[int, str] = 0
    trained_steps: Optional[Sequence[int]] = None
    parameters: Sequence[Any] = ()
    gather: Callable[[Any], Any] = lambda tensor: tensor
    shared_seed: Optional[int] = None

    @classmethod
    def of(cls, values):
        """The settings of {name: value}; raises TypeError that names an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in values.keys() - set(known):
            raise TypeError(f"RLRStep has no setting {name!r}; it has {', '.join(known)}")
        return cls(**values)

    def __post_init__(self):
        self.parameters = list(self.parameters)

    @property
    def sweeps_the_rollout(self):
        """Whether the sweep runs over the chain of the rollout; DRaFT-LV and branches run steps of their own."""
        return self.estimator != "draft_lv" and self.branches == 0

    @property
    def can_keep_graphs(self):
        """Whether the sweep can use graphs of the rollout."""
        return self.sweeps_the_rollout and not self.perturbs_weights

    @property
    def perturbs_weights(self):
        return self.estimator == "rlr_paper" and self.rest == "zeroth_order"


def check_settings(settings, num_steps, name=str):
    """Refuse settings that are out of range or do not go together.

    Args:
        settings: `Settings`.
        num_steps: T.
        name: `name(keyword) -> str`, what the message calls a keyword; a script passes its flags' names.

    Raises:
        ValueError: one line that names the setting and what it should be.
    """
    for keyword, choices in (
        ("estimator", ESTIMATORS),
        ("baseline", BASELINES),
        ("rest", RESTS),
        ("subchain_sampling", SUBCHAIN_SAMPLINGS),
    ):
        if getattr(settings, keyword) not in choices:
            raise ValueError(
                f"unknown {name(keyword)} {getattr(settings, keyword)!r}, known are: {', '.join(choices)}"
            )
    for keyword, least in AT_LEAST.items():
        value = getattr(settings, keyword)
        if (keyword, value) not in (("keep_graphs", "auto"), ("baseline_steps", None)) and value < least:
            raise ValueError(f"{name(keyword)} {value} must be at least {least}")
    for keyword in ("zo_scale", "ppo_clip_range"):
        if getattr(settings, keyword) <= 0:
            raise ValueError(f"{name(keyword)} {getattr(settings, keyword)} must be positive")
    for keyword, interval, fits in (
        ("mixing", "[0, 1]", lambda value: 0 <= value <= 1),
        ("sweep_fraction", "(0, 1]", lambda value: 0 < value <= 1),
    ):
        value = getattr(settings, keyword)
        if value != "auto" and not (isinstance(value, (int, float)) and fits(value)):
            raise ValueError(f"{name(keyword)} {value!r} is neither auto nor a number in {interval}")
    if settings.estimator == "truncated_bp" and not 1 <= settings.truncation_steps <= num_steps:
        raise ValueError(
            f"{name('truncation_steps')} {settings.truncation_steps} must be from 1 to {name('num_steps')} {num_steps}"
        )
    _check_combinations(settings, name)
    if settings.trained_steps is not None:
        _check_trained_steps(settings, num_steps, name)


def _check_combinations(settings, name):
    if settings.num_inner_epochs > 1 and settings.estimator != "ddpo":
        raise ValueError(f"{name('num_inner_epochs')} {settings.num_inner_epochs} needs {name('estimator')} ddpo")
    if settings.branches and settings.estimator != "rlr":
        raise ValueError(
            f"{name('branches')} {settings.branches} needs {name('estimator')} rlr, not {settings.estimator}"
        )
    if settings.keep_graphs not in (0, "auto") and not settings.can_keep_graphs:
        raise ValueError(
            f"{name('keep_graphs')} {settings.keep_graphs} needs a sweep of the rollout's own graphs, which draft_lv,"
            f" {name('branches')} and the perturbed weights of {name('rest')} zeroth_order do not have"
        )
    if settings.kl_weight > 0 and not settings.sweeps_the_rollout:
        raise ValueError(
            f"{name('kl_weight')} {settings.kl_weight} needs an estimator that sweeps the chain of the rollout"
        )
    if settings.sweep_fraction not in ("auto", 1):
        fraction = f"{name('sweep_fraction')} {settings.sweep_fraction}"
        if not settings.sweeps_the_rollout:
            raise ValueError(f"{fraction} needs an estimator that sweeps the chain of the rollout")
        if settings.num_inner_epochs > 1:
            # In a later epoch the parameters have learned from the very steps that were drawn.
            raise ValueError(
                f"{fraction} is biased with {name('num_inner_epochs')} {settings.num_inner_epochs}: use 1"
            )


def _check_trained_steps(settings, num_steps, name):
    """Refuse estimators that leave out the steps that are trained, or draw theirs from others, too."""
    steps = settings.trained_steps
    if steps and not all(1 <= k <= num_steps for k in steps):
        raise ValueError(f"{name('trained_steps')} {list(steps)} are not all from 1 to {num_steps}")
    if not steps:
        raise ValueError(f"none of the {num_steps} steps is of the network that is trained: use more steps")
    if settings.estimator == "rlr_paper" or settings.branches:
        what = f"{name('branches')} {settings.branches}" if settings.branches else "rlr_paper"
        raise ValueError(
            f"{what} draws its steps from all {num_steps}, and only {len(steps)} are trained: use another"
        )
    last = {"truncated_bp": settings.truncation_steps, "draft_lv": 1, "alignprop": 1}.get(
        settings.estimator, num_steps
    )
    if min(steps) > last:
        raise ValueError(
            f"{settings.estimator} can end after {last} of the last steps, and only those from the {min(steps)}th last on"
            " are trained: use another estimator"
        )


def check_reward(settings, differentiable, black_box, name=str):
    """Refuse settings that do not go with a reward.

    Args:
        settings, name: as in `check_settings`.
        differentiable: whether the reward, or a part of it, has a gradient.
        black_box: whether a part of it has none.

    Raises:
        ValueError: one line that names the setting and the remedy.
    """
    if black_box and settings.estimator in NEED_GRADIENT:
        what = "a part of the reward" if differentiable else "the reward"
        raise ValueError(f"{what} is not differentiable, which {settings.estimator} needs: use rlr or ddpo")
    if differentiable and settings.branches:
        raise ValueError(f"{name('branches')} {settings.branches} is for black boxes, and the reward has a gradient")


def check_inputs(settings, num_images, prompts):
    """Refuse a rollout that lacks what the settings need.

    Raises:
        ValueError: one line that names what is missing.
    """
    if settings.baseline == "per_prompt" and prompts is None:
        raise ValueError("baseline per_prompt needs the prompts of each rollout")
    if prompts is not None and len(prompts) != num_images:
        raise ValueError(f"{len(prompts)} prompts for a batch of {num_images}: give one per image")
    for needed, keyword in (
        (settings.perturbs_weights, "rest zeroth_order"),
        (settings.subchain_sampling == "grad_norm", "subchain_sampling grad_norm"),
    ):
        if needed and not settings.parameters:
            raise ValueError(f"{keyword} needs `parameters`, the trainable ones")
    if settings.kl_weight > 0 and settings.base_model is nullcontext:
        raise ValueError(f"kl_weight {settings.kl_weight} needs `base_model`")
