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
"""The RLR step in plain torch: a denoising chain, its rollout, and one backward sweep that serves every estimator."""

from .baselines import PredictedReward, RunningReward, leave_one_out, normalize, per_prompt
from .batch import Batch
from .branching import branch
from .chain import AffineStep, DenoisingChain, joined, linear_guidance, prediction_weights, scheduler_steps
from .estimators import (
    SubchainSampler,
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
from .mixing import AdaptiveMixing, Transport
from .noise_levels import ddim_steps, flow_sde_steps
from .policy_gradient import ClippedRatio
from .rollout import Trajectory, draw_noise, renoise, rollout
from .settings import BASELINES, ESTIMATORS, RESTS, Settings
from .step import RLRStep
from .sweep import Schedule, SweepStatistics, backward_sweep, likelihood_ratio
from .zeroth_order import PerturbedChain, WeightPerturbation


__all__ = [
    "BASELINES",
    "ESTIMATORS",
    "RESTS",
    "AdaptiveMixing",
    "AffineStep",
    "Batch",
    "ClippedRatio",
    "DenoisingChain",
    "GaussianKL",
    "PerturbedChain",
    "PredictedReward",
    "RLRStep",
    "RunningReward",
    "Schedule",
    "Settings",
    "SubchainSampler",
    "SweepStatistics",
    "Trajectory",
    "Transport",
    "WeightPerturbation",
    "alignprop",
    "backward_sweep",
    "branch",
    "ddim_steps",
    "ddpo",
    "draft_lv",
    "draw_noise",
    "flow_sde_steps",
    "full_bp",
    "joined",
    "leave_one_out",
    "likelihood_ratio",
    "linear_guidance",
    "normalize",
    "per_prompt",
    "prediction_weights",
    "renoise",
    "rlr",
    "rlr_paper",
    "rollout",
    "scheduler_steps",
    "subchain_length",
    "truncated_bp",
]
