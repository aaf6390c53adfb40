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
"""What study.py compares, and the work that an optimizer step takes."""

import functools
import importlib
import os
from typing import NamedTuple

import torch
from bench_common import ASSETS, as_flags
from diffusion_models.adapters import load_adapter
from diffusion_models.embeddings import PromptEmbeds
from reward_models.custom import import_callable
from rlr_training.chains import conditioned, make_chain, sampling_options, set_defaults, set_size
from rlr_training.checks import rlr_settings
from rlr_training.evaluation import HELDOUT_SEED, heldout_prompts, load_base, make_draw
from rlr_training.memory import Operations
from rlr_training.prompts import load_prompts
from rlr_training.scoring import decoder_of, load_reward_sum, score_latents
from rlr_training.trial import try_model
from rlr_utils import RLRStep


REWARDS_FOLDER = os.path.join(ASSETS, "tiny-emoji-rewards")
CLIP, ACCURACY = (os.path.join(REWARDS_FOLDER, name) for name in ("clip", "emoji_classifier.py:ConceptAccuracy"))
FLAGS = [
    *("--prompts", os.path.join(ASSETS, "emoji.txt"), "--guidance_scale", "4.5", "--feature_model", CLIP),
    *("--reward_path", f"aesthetic={REWARDS_FOLDER}", "--reward_path", f"clip_score={CLIP}"),
    *("--num_eval_images", "0", "--report_to", "none", "--checkpointing_steps", "1000"),
]


# Rewards of our own


@functools.cache
def classifier():
    accuracy, _ = import_callable(ACCURACY, {})
    return accuracy.classifier


def is_3d(images, prompts):
    """1 for an image that the classifier takes for a 3D emoji, 0 for a cartoon: a black box."""
    with torch.no_grad():  # the model draws images of the size that the classifier reads
        return classifier()(images)[1].argmax(1).float()


is_3d.differentiable = False


def fast_sine(images, prompts):
    """sin(1200 w . image) for a fixed direction w.

    Over images that differ it averages to nothing. At any one image it is nearly all of the gradient, whose direction then
    says nothing about where the reward rises.
    """
    direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    direction = (direction / direction.norm()).to(images)
    return torch.sin(1200 * (images * direction).sum((1, 2, 3)))


SINE, IS_3D = (f"{os.path.abspath(__file__)}:{name}" for name in ("fast_sine", "is_3d"))


# What is compared


def estimator(name, *flags):
    return ["--gradient_estimator", name, *flags]


def paper(length, rest):
    return estimator("rlr_paper", "--subchain_length", str(length), "--rest", rest)


# {name: flags}
ESTIMATORS = {
    "rlr": [],
    "full_bp": estimator("full_bp"),
    "alignprop": estimator("alignprop"),
    "truncated_bp 5": estimator("truncated_bp", "--truncation_steps", "5"),
    "truncated_bp 1": estimator("truncated_bp", "--truncation_steps", "1"),
    "ddpo": estimator("ddpo"),
    "rlr_paper": paper(2, "zeroth_order"),
    "h = 1": paper(1, "zeroth_order"),
    "h = 4": paper(4, "zeroth_order"),
    "no half order": paper(0, "zeroth_order"),
    "no zeroth order": paper(2, "none"),
    "neither": paper(0, "none"),
}
WITH_GRADIENT = ("rlr", "full_bp", "alignprop", "truncated_bp 5", "truncated_bp 1", "ddpo")
# For a reward that has no gradient, or a part without one.
BLACK_BOX = ("rlr", "ddpo", "rlr_paper")


class Comparison(NamedTuple):
    """Estimators at equal work on a reward.

    Attributes:
        reward: as for --reward.
        estimators: keys of `ESTIMATORS`.
        num_steps: T.
        flow: whether the embedded Stable Diffusion 3 is tuned, instead of the embedded Stable Diffusion.
        mixing: that the work of rlr assumes. With "auto" it is that of the first step; .5 stands for a rough reward, where the
            likelihood ratio gets a share at every later step.
    """

    reward: str
    estimators: tuple
    num_steps: int = 20
    flow: bool = False
    mixing: object = "auto"

    @property
    def black_box(self):
        """Whether the reward, or a part of a sum, has no gradient."""
        return self.estimators == BLACK_BOX


COMPARISONS = {
    "smooth": Comparison("aesthetic", WITH_GRADIENT),
    "text": Comparison("clip_score", WITH_GRADIENT),
    "rough": Comparison(f"aesthetic,{SINE}:0.5", WITH_GRADIENT, mixing=0.5),
    "file size": Comparison("jpeg_compressibility", BLACK_BOX),
    "decision": Comparison(IS_3D, BLACK_BOX),
    "sum": Comparison("aesthetic,jpeg_compressibility:2", BLACK_BOX),
    "flow smooth": Comparison("aesthetic", ("rlr", "full_bp", "alignprop", "truncated_bp 1", "ddpo"), flow=True),
    "flow file size": Comparison("jpeg_compressibility", BLACK_BOX, flow=True),
    "terms": Comparison("aesthetic", ("rlr_paper", "h = 1", "h = 4", "no half order", "no zeroth order", "neither")),
    "T = 10": Comparison("aesthetic", ("rlr", "alignprop", "ddpo"), num_steps=10),
    "T = 50": Comparison("aesthetic", ("rlr", "alignprop", "ddpo"), num_steps=50),
}


class Settings(NamedTuple):
    """What all runs share.

    Attributes:
        steps: optimizer steps of rlr, whose work every run of a comparison gets.
        batch_size: images of a step.
        num_images: on which an adapter is judged.
        scorings: along a run.
    """

    steps: int = 24
    batch_size: int = 8
    num_images: int = 64
    scorings: int = 4


QUICK = Settings(1, 2, 4, 1)


def script_of(name):
    """The training script of a comparison."""
    return importlib.import_module("train_rlr_flow" if COMPARISONS[name].flow else "train_rlr_sd")


def arguments(name, estimator, settings, numbers=None, flags=()):
    """The arguments of the training script for a run."""
    comparison = COMPARISONS[name]
    model = [
        "--pretrained_model_name_or_path",
        os.path.join(ASSETS, "tiny-emoji-sd3" if comparison.flow else "tiny-emoji"),
    ]
    model += ["--max_sequence_length", "1"] if comparison.flow else []
    size = settings.batch_size
    sizes = {"num_inference_steps": comparison.num_steps, "train_batch_size": size, "decode_batch_size": size}
    words = [
        *model,
        *FLAGS,
        "--reward",
        comparison.reward,
        *ESTIMATORS[estimator],
        *as_flags({**sizes, **(numbers or {})}),
    ]
    return script_of(name).parse_args([*words, *flags])


class Judge:
    """The model of a comparison without an adapter, and what its images are judged by.

    Attributes:
        base: (reward, concept accuracy) of the base model.
    """

    def __init__(self, name, settings):
        self.args = arguments(name, "rlr", settings)
        self.prompts = heldout_prompts(load_prompts(self.args.prompts), settings.num_images)
        self.model = load_base(self.args, torch.float32)
        set_size(self.args, self.model)
        set_defaults(self.args, self.model)
        self.rewards, self.accuracy = (
            load_reward_sum(self.args, text, self.prompts, "cpu", None) for text in (self.args.reward, ACCURACY)
        )
        self.embeds = PromptEmbeds(self.model, "cpu")
        self.base = self.scores()

    def scores(self):
        drawn = make_draw(self.args, self.model, self.embeds)(self.prompts, 16, first_seed=HELDOUT_SEED)
        return tuple(one(drawn, self.prompts).total.mean().item() for one in (self.rewards, self.accuracy))

    def scores_by_scale(self, folder, scales):
        """{scale: (reward, concept accuracy)} of an adapter."""
        pipeline = self.model.pipeline
        load_adapter(pipeline, folder, "tuned")
        try:
            found = {}
            for scale in scales:
                pipeline.set_adapters(["tuned"], [scale])
                found[scale] = self.scores()
            return found
        finally:
            pipeline.unload_lora_weights()


judge_of = functools.cache(Judge)


# Work


@functools.cache
def prices(name, settings):
    """{call: floating-point operations for an image} of network, decoder and reward."""
    judge = judge_of(name, settings)
    args, model = judge.args, judge.model
    chain = make_chain(args, model, model.network, torch.device("cpu"), sampling_options(args, model))
    costs = try_model(args, model, conditioned(args, chain, judge.embeds)(judge.prompts[:1]), None)
    latents = torch.zeros(model.latents_shape(1, (args.height, args.width)))
    scored = {}
    for with_gradient in {False, judge.rewards.has_gradient}:
        with Operations() as counter:
            score_latents(decoder_of(args, model), judge.rewards, latents, judge.prompts[:1], 1, with_gradient)
        scored[with_gradient] = counter.total
    return {"forward": costs.forward, "swept": costs.swept, "score": scored[False], "gradient": scored.get(True)}


def work_of(name, estimator, settings):
    """Floating-point operations of an optimizer step."""
    return settings.batch_size * work_of_image(name, estimator, prices(name, settings), settings)


def work_of_image(name, estimator, price, settings):
    """What an image takes at the prices of its calls, on average."""
    comparison, args = COMPARISONS[name], arguments(name, estimator, settings)
    has_gradient = price["gradient"] is not None
    options = rlr_settings(args) | ({"mixing": comparison.mixing} if estimator == "rlr" else {})
    rlr = RLRStep(comparison.num_steps, has_gradient, black_box=comparison.black_box, **options)
    schedule = rlr.draw_schedule()
    calls, predicted = rlr.expected_calls(schedule), len(rlr.predicted_steps(schedule))
    scoring = price["gradient"] if has_gradient and estimator != "ddpo" else price["score"]
    return calls.forward * price["forward"] + calls.swept * price["swept"] + scoring + predicted * price["score"]
