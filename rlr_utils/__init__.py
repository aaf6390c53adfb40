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

from .baselines import RunningReward, leave_one_out, normalize, per_prompt
from .chain import StableDiffusionChain, decode_latents
from .estimators import AdaptiveMixing, Schedule, alignprop, ddpo, full_bp, rlr, truncated_bp
from .policy_gradient import ClippedRatio
from .prompts import PromptSampler, load_prompts
from .rollout import Trajectory, rollout
from .sweep import SweepStatistics, backward_sweep, likelihood_ratio


__all__ = [
    "AdaptiveMixing",
    "ClippedRatio",
    "PromptSampler",
    "RunningReward",
    "Schedule",
    "StableDiffusionChain",
    "SweepStatistics",
    "Trajectory",
    "alignprop",
    "backward_sweep",
    "ddpo",
    "decode_latents",
    "full_bp",
    "leave_one_out",
    "likelihood_ratio",
    "load_prompts",
    "normalize",
    "per_prompt",
    "rlr",
    "rollout",
    "truncated_bp",
]
