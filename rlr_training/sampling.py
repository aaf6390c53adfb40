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
"""The flags that say how a chain draws images, for training and evaluation."""

from .flags import NOT_NEGATIVE, OF_FAMILY, POSITIVE, SHARE, frames_to_score, number_or_auto, whole_number


def add_sampling_flags(parser, num_inference_steps=None, guidance_scale=None):
    """How a chain draws images, for training and evaluation; returns the group, for the flags that a family adds."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--resolution", type=whole_number(), help="Side of the images in pixels. Default: the model's own.")
    add("--height", type=whole_number(), help="Height in pixels, instead of --resolution.")
    add("--width", type=whole_number(), help="Width in pixels, instead of --resolution.")
    add(
        "--num_inference_steps",
        type=whole_number(),
        default=num_inference_steps,
        help="Steps T of the denoising chain." + (OF_FAMILY if num_inference_steps is None else ""),
    )
    add(
        "--guidance_scale",
        type=NOT_NEGATIVE,
        default=guidance_scale,
        help="Guidance, as the model's pipeline takes it." + (OF_FAMILY if guidance_scale is None else ""),
    )
    add("--negative_prompt", help="Negative prompt of all images.")
    return group


def add_scheduler_flags(group, schedulers):
    """The sampler of a model that was trained on a schedule of betas."""
    group.add_argument(
        "--scheduler",
        default="ddim",
        choices=schedulers,
        help="Sampler of the chain, with the model's configuration. dpm_sde is first-order DPM-Solver++ as an SDE. All but"
        " ddim add no noise at the last step, so that rlr needs a reward with a gradient there.",
    )
    help = "Noise of --scheduler ddim, from 0 (none) to 1 (as in DDPM)."
    group.add_argument("--eta", type=SHARE, default=1.0, help=help)


def add_flow_flags(group):
    """The levels and the prompts of a flow-matching model."""
    group.add_argument(
        "--sigmas",
        default="native",
        choices=["native", "linspace"],
        help="Levels of noise, before the model's own shift: those that its pipeline takes, or evenly spaced ones. They"
        " differ for Stable Diffusion 3, whose pipeline shifts twice, so that its last step does next to nothing.",
    )
    group.add_argument(
        "--max_sequence_length",
        type=whole_number(),
        help="Tokens of a prompt that T5 or the language model reads. Default: the pipeline's own.",
    )


def add_video_flags(group):
    """The length of videos, and how rewards on images score them."""
    group.add_argument("--num_frames", type=whole_number(), help="Frames of a video." + OF_FAMILY)
    group.add_argument(
        "--fps",
        type=POSITIVE,
        help="Frames per second, for the files that are written and for rewards that ask for it." + OF_FAMILY,
    )
    group.add_argument(
        "--guidance_scale_2",
        type=NOT_NEGATIVE,
        help="Guidance of Wan 2.2's second transformer. Default: --guidance_scale.",
    )
    group.add_argument(
        "--frame_reduction",
        default="mean",
        choices=["mean", "min"],
        help="How a reward on images scores a video: by the mean or by the least of its frames' scores.",
    )


def add_experts_flag(group):
    """Which of two transformers training adapts."""
    group.add_argument(
        "--train_experts",
        default="both",
        choices=["both", "high_noise", "low_noise"],
        help="Of Wan 2.2's two transformers, those that get a LoRA: both, that of the noisy steps or that of the last ones.",
    )


def add_score_frames_flag(group):
    """Which frames of a video training scores."""
    group.add_argument(
        "--score_frames",
        type=frames_to_score,
        default="all",
        metavar="all|N|chunk",
        help="Frames that are scored in training: all, N evenly spaced ones, or one random chunk, which is the least memory"
        " that a causal decoder such as Wan's needs. A chunk's gradient is unbiased, but noisier; the reward must be a mean"
        " over frames.",
    )


def add_noise_flags(group):
    """The noise that training adds to the steps of a model whose pipeline adds none."""
    group.add_argument(
        "--noise",
        default="ddim",
        choices=["ddim", "flow_sde"],
        help="How training adds noise to the steps: DDIM with --eta, or the Flow-SDE of Flow-GRPO. Images of validation and"
        " evaluation are drawn without noise, as the pipeline draws them.",
    )
    group.add_argument(
        "--eta",
        type=SHARE,
        help="Noise of the steps, from 0 (none) to 1; for flow_sde its noise level a. Default: 1 for ddim, .7 for flow_sde.",
    )
    group.add_argument(
        "--final_noise",
        type=number_or_auto,
        default="auto",
        help="For ddim: the least noise of a step at eta 1, which the last step would be without; it stays in the image."
        " auto: .03 where the gradient estimator needs noise at the last step, else 0.",
    )
