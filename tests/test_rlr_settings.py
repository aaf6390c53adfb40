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
"""What `RLRStep` refuses, and that it does so before anything is drawn or scored where that is possible."""

import json
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from rlr_chains import ImageChain, ImageReward, NonlinearChain
from rlr_utils import BASELINES, ESTIMATORS, RESTS, DenoisingChain, RLRStep, Settings, scheduler_steps
from rlr_utils.settings import check_reward, check_settings

from diffusers import DDIMScheduler


BLACK_BOX, SUM = {"differentiable": False}, {"black_box": True}


def arguments(size=3, num_steps=5, kind="smooth"):
    """The arguments of `RLRStep.rollout`."""
    chain = ImageChain(NonlinearChain(num_steps, dim=6), torch.randn(size, 6, dtype=torch.float64))
    x_T = torch.randn(size, *ImageChain.shape, dtype=torch.float64)
    return chain, x_T, ImageReward(kind, torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"estimator": "reinforce"},
            "unknown estimator 'reinforce', known are: rlr, rlr_paper, full_bp, truncated_bp",
        ),
        ({"baseline": "median"}, "unknown baseline 'median', known are: auto, none, leave_one_out"),
        ({"rest": "half"}, "unknown rest 'half', known are: zeroth_order, likelihood_ratio, none"),
        ({"subchain_sampling": "norm"}, "unknown subchain_sampling 'norm', known are: uniform, grad_norm"),
        ({"mixing": 1.5}, r"mixing 1.5 is neither auto nor a number in \[0, 1\]"),
        ({"mixing": -0.1}, "mixing -0.1 is neither"),
        ({"mixing": float("nan")}, "mixing nan is neither"),
        ({"mixing": "half"}, "mixing 'half' is neither"),
        ({"sweep_fraction": 0}, r"sweep_fraction 0 is neither auto nor a number in \(0, 1\]"),
        ({"sweep_fraction": 1.1}, "sweep_fraction 1.1 is neither"),
        ({"estimator": "truncated_bp", "truncation_steps": 6}, "truncation_steps 6 must be from 1 to num_steps 5"),
        ({"estimator": "truncated_bp", "truncation_steps": 0}, "truncation_steps 0 must be from 1 to"),
        ({"num_inner_epochs": 2}, "num_inner_epochs 2 needs estimator ddpo"),
        ({"num_inner_epochs": 0}, "num_inner_epochs 0 must be at least 1"),
        ({"lv_samples": 0, "estimator": "draft_lv"}, "lv_samples 0 must be at least 1"),
        ({"keep_graphs": -1}, "keep_graphs -1 must be at least 0"),
        ({"kl_weight": -0.1}, "kl_weight -0.1 must be at least 0"),
        ({"zo_scale": 0}, "zo_scale 0 must be positive"),
        ({"branches": 2, "estimator": "ddpo", **BLACK_BOX}, "branches 2 needs estimator rlr, not ddpo"),
        ({"branches": -1, **BLACK_BOX}, "branches -1 must be at least 0"),
        ({"branches": 2}, "branches 2 is for black boxes, and the reward has a gradient"),
        ({"branches": 2, **SUM}, "branches 2 is for black boxes, and the reward has a gradient"),
        ({"keep_graphs": 1, "estimator": "draft_lv"}, "keep_graphs 1 needs a sweep of the rollout's own graphs"),
        (
            {"keep_graphs": 1, "estimator": "rlr_paper"},
            "keep_graphs 1 needs .* perturbed weights of rest zeroth_order",
        ),
        ({"keep_graphs": 1, "branches": 1, **BLACK_BOX}, "keep_graphs 1 needs a sweep"),
        ({"kl_weight": 0.1, "estimator": "draft_lv"}, "kl_weight 0.1 needs an estimator that sweeps the chain"),
        ({"kl_weight": 0.1, "branches": 1, **BLACK_BOX}, "kl_weight 0.1 needs an estimator that sweeps the chain"),
        ({"sweep_fraction": 0.5, "estimator": "draft_lv"}, "sweep_fraction 0.5 needs an estimator that sweeps"),
        (
            {"sweep_fraction": 0.5, "estimator": "ddpo", "num_inner_epochs": 2},
            "sweep_fraction 0.5 is biased with num_inner_epochs 2: use 1",
        ),
        ({"estimator": "rlr_paper", "subchain_length": 5}, "a sub-chain of 5 of 5 steps may start at 2..1"),
        ({"estimator": "rlr_paper", "subchain_range": (1, 3)}, "may start at 2..4 from the end, not at 1..3"),
        *(
            ({"estimator": name, **reward}, f"the reward is not differentiable, which {name} needs: use rlr or ddpo")
            for name in ("full_bp", "truncated_bp", "alignprop", "draft_lv")
            for reward in (BLACK_BOX, SUM)
        ),
    ],
    ids=str,
)
def test_settings_are_refused_when_the_step_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        RLRStep(5, **settings)


def test_every_named_choice_is_taken():
    for estimator in ESTIMATORS:
        RLRStep(5, estimator=estimator)
    for baseline in BASELINES:
        RLRStep(5, baseline=baseline)
    for rest in RESTS:
        RLRStep(5, estimator="rlr_paper", rest=rest)
    with pytest.raises(TypeError, match="estimater"):
        RLRStep(5, estimater="rlr")


def test_messages_can_name_the_flags_of_a_script():
    def flag(name):
        return f"--{'gradient_estimator' if name == 'estimator' else name}"

    for check, settings, message in (
        (check_settings, {"estimator": "magic"}, "unknown --gradient_estimator 'magic'"),
        (check_settings, {"num_inner_epochs": 2}, "--num_inner_epochs 2 needs --gradient_estimator ddpo"),
        (check_settings, {"mixing": 2}, "--mixing 2 is neither"),
        (check_reward, {"branches": 2}, "--branches 2 is for black boxes"),
    ):
        first = {check_settings: (5,), check_reward: (True, False)}[check]
        with pytest.raises(ValueError, match=message):
            check(Settings(**settings), *first, name=flag)


def refused_rollout(rlr, chain, x_T, score, message, **options):
    """The rollout is refused before the chain is called, anything is scored, or torch draws."""
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        rlr.rollout(chain, x_T, score, **options)
    assert chain.network.calls == 0 and score.calls == 0 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"baseline": "per_prompt"}, "baseline per_prompt needs the prompts of each rollout"),
        ({"estimator": "rlr_paper"}, "rest zeroth_order needs `parameters`"),
        (
            {"estimator": "rlr_paper", "rest": "none", "subchain_sampling": "grad_norm"},
            "subchain_sampling grad_norm needs `parameters`",
        ),
        ({"kl_weight": 0.1}, "kl_weight 0.1 needs `base_model`"),
    ],
    ids=str,
)
def test_a_rollout_without_what_the_settings_need_is_refused(settings, message):
    state = random.getstate()
    refused_rollout(RLRStep(5, **settings), *arguments(), message)
    assert random.getstate() == state


def test_a_rollout_needs_a_prompt_for_each_image():
    refused_rollout(RLRStep(5), *arguments(), "2 prompts for a batch of 3: give one per image", prompts=["a", "b"])


def test_a_chain_of_another_length_is_refused():
    message = "the chain has 4 steps, RLRStep was made for 5"
    refused_rollout(RLRStep(5), *arguments(num_steps=4), message)


@pytest.mark.parametrize(
    "silent, step, reward, settings",
    [
        (1, 1, BLACK_BOX, {}),
        (1, 1, SUM, {}),
        (1, 1, SUM, {"mixing": 1.0}),
        (1, 1, {}, {"estimator": "ddpo"}),
        (3, 3, {}, {}),
        (3, 3, {}, {"mixing": 0.5}),
        (3, 3, {}, {"estimator": "rlr_paper", "subchain_range": (3, 3), "rest": "none"}),
        (3, 3, {}, {"estimator": "full_bp", "kl_weight": 0.1, "base_model": SimpleNamespace}),
        (3, 3, BLACK_BOX, {"branches": 1, "mixing": 1.0}),
    ],
    ids=str,
)
def test_a_step_without_noise_is_refused_where_noise_is_needed(silent, step, reward, settings):
    chain, x_T, score = arguments(kind="black box" if reward else "smooth")
    chain.sigma = lambda k: 0.0 if k == silent else 0.1
    message = f"the chain adds no noise at step {step} from the end, where {settings.get('estimator', 'rlr')} needs it"
    refused_rollout(RLRStep(5, **reward, **settings), chain, x_T, score, message)


@pytest.mark.parametrize(
    "silent, settings",
    [
        (1, {}),
        (3, {"mixing": 1.0}),
        (3, {"estimator": "full_bp"}),
        (3, {"estimator": "truncated_bp", "truncation_steps": 2, "kl_weight": 0.1, "base_model": torch.no_grad}),
        (3, {"estimator": "rlr_paper", "subchain_range": (2, 2), "subchain_length": 1, "rest": "none"}),
    ],
    ids=str,
)
def test_a_step_without_noise_is_allowed_elsewhere(silent, settings):
    chain, x_T, score = arguments()
    chain.sigma = lambda k: 0.0 if k == silent else 0.1
    rlr = RLRStep(5, **settings)
    rlr.backward([rlr.rollout(chain, x_T, score)])
    assert all(p.grad.isfinite().all() for p in chain.network.parameters())


@pytest.mark.parametrize(
    "method, reward, settings",
    [
        ("predict", {}, {"baseline": "predicted_x0"}),
        ("repeat", BLACK_BOX, {"branches": 2}),
        ("renoise", {}, {"estimator": "draft_lv"}),
    ],
)
def test_a_chain_without_a_method_that_is_needed_is_refused(method, reward, settings):
    chain, x_T, score = arguments()
    members = ("network", "num_steps", "sigma", "mean", "predict", "repeat", "renoise")
    chain = SimpleNamespace(**{name: getattr(chain, name) for name in members if name != method})
    refused_rollout(RLRStep(5, **reward, **settings), chain, x_T, score, f"a chain without `{method}` cannot be used")


@pytest.mark.parametrize(
    ("settings", "trained", "calls"),
    [
        ({"estimator": "full_bp"}, [1, 2], (6, 2)),  # the sweep ends with them
        ({"estimator": "full_bp"}, [5, 6], (6, 6)),  # the others pass the gradient on
        ({"estimator": "ddpo"}, [5, 6], (6, 2)),  # each step has its own
        ({"estimator": "ddpo"}, [2, 4], (6, 2)),
        ({"estimator": "alignprop"}, [1, 2], (6, 1 + 5 / 6)),
        ({"estimator": "truncated_bp", "truncation_steps": 4}, [3, 4, 5, 6], (6, 4)),
        ({"sweep_fraction": 0.5}, [5, 6], (6, 3 + 3 / 2)),
        ({"estimator": "full_bp"}, None, (6, 6)),
    ],
)
def test_only_steps_whose_cotangent_reaches_trained_ones_are_swept(settings, trained, calls):
    rlr = RLRStep(6, trained_steps=trained, **settings)
    assert rlr.expected_calls(rlr.draw_schedule()) == pytest.approx(calls)


def scores(rewards=(3,), gradient=(3, 3, 2, 1), black_box=None):
    """A score that returns results of these shapes."""
    shapes = [rewards, gradient] + ([] if black_box is None else [black_box])
    results = [None if shape is None else torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    return lambda x_0, with_gradient: tuple(results)


@pytest.mark.parametrize(
    "score, reward, message",
    [
        (scores(rewards=(4,)), {}, r"score returned rewards of shape \(4,\) for a batch of 3"),
        (scores(rewards=()), {}, r"score returned rewards of shape \(\) for a batch of 3"),
        (scores(rewards=(3, 1)), BLACK_BOX, r"score returned rewards of shape \(3, 1\)"),
        (scores(gradient=(1, 3, 2, 1)), {}, r"a gradient of shape \(1, 3, 2, 1\) for latents of \(3, 3, 2, 1\)"),
        (
            scores(gradient=None),
            {},
            "score returned no gradient: return dR/dx_0 .* or make RLRStep\\(..., differentiable=False\\)",
        ),
        (scores(), SUM, "no third result, the rewards of the part without a gradient"),
        (scores(black_box=(1,)), SUM, r"a third result of shape \(1,\) for a batch of 3"),
        (scores(black_box=(3,)), {}, r"returned a third result, .*: make RLRStep\(..., black_box=True\)"),
        (lambda x_0, with_gradient: torch.zeros(3), {}, "score must return .*, not a Tensor"),
        (lambda x_0, with_gradient: None, {}, "score must return .*, not a NoneType"),
        (lambda x_0, with_gradient: (torch.zeros(3),), {}, "score must return .*, not 1 results"),
        (lambda x_0, with_gradient: (torch.zeros(3), [0.0]), {}, "score returned a gradient that is a list"),
    ],
)
def test_a_score_of_the_wrong_form_is_refused(score, reward, message):
    chain, x_T, _ = arguments()
    with pytest.raises(ValueError, match=message):
        RLRStep(5, **reward).rollout(chain, x_T, score)


@pytest.mark.parametrize("num_steps", [0, 5.0, True, "5"])
def test_a_number_of_steps_that_is_none_is_refused(num_steps):
    with pytest.raises(ValueError, match="is not a number of denoising steps"):
        RLRStep(num_steps)


def test_an_unknown_setting_is_named_with_those_that_there_are():
    with pytest.raises(TypeError, match="RLRStep has no setting 'estimtor'; it has estimator, mixing, "):
        RLRStep(5, estimtor="ddpo")


def test_batches_are_swept_once_and_in_a_list():
    chain, x_T, score = arguments()
    rlr = RLRStep(5)
    batch = rlr.rollout(chain, x_T, score)
    for batches in (batch, []):
        with pytest.raises(ValueError, match=r"backward takes the list .* backward\(\[batch\]\)"):
            rlr.backward(batches)
    with pytest.raises(ValueError, match="the same batch is in the list twice"):
        rlr.backward([batch, batch])
    rlr.backward([batch])
    with pytest.raises(ValueError, match="1 of 2 batches were swept by an earlier backward"):
        rlr.backward([batch, rlr.rollout(chain, x_T, score)])


class Network(torch.nn.Module):
    """A chain whose mean is a linear layer, with dropout on request."""

    num_steps = 5

    def __init__(self, dropout=0.0, out=4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(4, out))
        torch.nn.init.eye_(self.layers[1].weight)

    def sigma(self, k):
        return 0.1

    def mean(self, k, x):
        return self.layers(x)


def smooth(x_0, with_gradient):
    return x_0.sum(1), torch.ones_like(x_0)


def test_dropout_and_changed_weights_are_noticed():
    """The sweep computes the means again: those of another network are not the rollout's, and the gradient is none."""
    x_T = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    for chain, changed in ((Network(0.1), False), (Network(), True)):
        rlr = RLRStep(5)
        batch = rlr.rollout(chain, x_T, smooth)
        if changed:
            with torch.no_grad():
                chain.layers[1].bias += 0.1
        with pytest.warns(UserWarning, match="other means in backward than in rollout"):
            rlr.backward([batch])
    call = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 4))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    steps = scheduler_steps(scheduler, eta=1.0)
    chain, rlr = DenoisingChain(lambda x, t, conditions: call(x), steps, scheduler.timesteps, {}), RLRStep(20)
    with pytest.warns(UserWarning, match="other means in backward than in rollout"):
        rlr.backward([rlr.rollout(chain, x_T, smooth)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rlr.backward([rlr.rollout(chain, x_T, smooth)])  # it has been said
        chain, rlr = Network(), RLRStep(5)
        rlr.backward([rlr.rollout(chain, x_T, smooth)])
        chain = Network(0.1).eval()
        rlr.backward([rlr.rollout(chain, x_T, smooth)])


def test_a_mean_of_another_shape_or_without_a_graph_is_refused():
    x_T, rlr = torch.randn(8, 4), RLRStep(5)
    with pytest.raises(ValueError, match=r"the mean of step 5 has the shape \(8, 3\) for latents of \(8, 4\)"):
        rlr.rollout(Network(out=3), x_T, smooth)
    chain = Network()
    chain.mean = lambda k, x: x.detach()
    with pytest.raises(ValueError, match="the mean of step 1 from the end has no graph"):
        rlr.backward([rlr.rollout(chain, x_T, smooth)])


def test_the_scores_of_draft_lv_are_checked_too():
    chain, x_T, score = arguments()
    rlr = RLRStep(5, estimator="draft_lv")
    batch = rlr.rollout(chain, x_T, score)
    batch.score = scores(gradient=None)
    with pytest.raises(ValueError, match="score returned no gradient"):
        rlr.backward([batch])


def trained(num_steps):
    """The state of a step that has seen every statistic."""
    rlr = RLRStep(num_steps, baseline="predicted_x0", subchain_sampling="grad_norm", parameters=[])
    chain, x_T, score = arguments(num_steps=num_steps)
    rlr.settings.parameters = list(chain.network.parameters())
    for _ in range(2):
        rlr.backward([rlr.rollout(chain, x_T, score)])
    return json.loads(json.dumps(rlr.state_dict()))


@pytest.mark.parametrize(
    "name, kind",
    [
        ("mixing", "mixing"),
        ("subchain", "sub-chain"),
        ("transport", "transport"),
        ("predictor_total", "baseline"),
        ("predictor_black_box", "baseline"),
    ],
)
def test_statistics_of_another_number_of_steps_are_refused(name, kind):
    state = trained(5)
    RLRStep(5).load_state_dict(state)
    message = f"the checkpoint's {kind} statistics are for 7 inference steps, not 5"
    with pytest.raises(ValueError, match=message):
        RLRStep(5).load_state_dict({**state, name: trained(7)[name]})


def test_a_state_that_lacks_a_part_is_refused():
    state = trained(5)
    for name in state:
        with pytest.raises(ValueError, match=f"the state lacks {name}"):
            RLRStep(5).load_state_dict({other: value for other, value in state.items() if other != name})
