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
"""The RLR step: a denoising chain, its rollout, and one backward sweep that serves every gradient estimator."""

from .baselines import PredictedReward, RunningReward, leave_one_out, normalize, per_prompt
from .branching import branch
from .chain import SCHEDULERS, StableDiffusionChain, decode_latents, denoising_steps, make_scheduler
from .dcot import BOUNDARIES, ChainOfThought, levels_of_steps
from .estimators import (
    AdaptiveMixing,
    Schedule,
    SubchainSampler,
    Transport,
    alignprop,
    ddpo,
    draft_lv,
    full_bp,
    rlr,
    rlr_paper,
    subchain_length,
    truncated_bp,
)
from .kl import GaussianKL
from .policy_gradient import ClippedRatio
from .prompts import (
    PromptEmbeds,
    PromptSampler,
    embed,
    load_levels,
    load_prompts,
    text_encoders_of,
    unique_prompts,
)
from .rollout import Trajectory, renoise, rollout
from .sweep import SweepStatistics, backward_sweep, likelihood_ratio
from .zeroth_order import PerturbedChain, WeightPerturbation


__all__ = [
    "BOUNDARIES",
    "SCHEDULERS",
    "AdaptiveMixing",
    "ChainOfThought",
    "ClippedRatio",
    "GaussianKL",
    "PerturbedChain",
    "PredictedReward",
    "PromptEmbeds",
    "PromptSampler",
    "RunningReward",
    "Schedule",
    "StableDiffusionChain",
    "SubchainSampler",
    "SweepStatistics",
    "Trajectory",
    "Transport",
    "WeightPerturbation",
    "alignprop",
    "backward_sweep",
    "branch",
    "ddpo",
    "decode_latents",
    "denoising_steps",
    "draft_lv",
    "embed",
    "full_bp",
    "leave_one_out",
    "levels_of_steps",
    "likelihood_ratio",
    "load_levels",
    "load_prompts",
    "make_scheduler",
    "normalize",
    "per_prompt",
    "renoise",
    "rlr",
    "rlr_paper",
    "rollout",
    "subchain_length",
    "text_encoders_of",
    "truncated_bp",
    "unique_prompts",
]
