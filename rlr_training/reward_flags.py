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
"""The flags about rewards, and about hacking them."""

from .flags import NOT_NEGATIVE, OPEN_SHARE, POSITIVE, whole_number, whole_or_auto


def add_reward_flags(parser):
    """What is trained for; returns the group, for the flags that a family adds."""
    group = parser.add_argument_group("reward")
    add = group.add_argument
    add(
        "--reward",
        default="aesthetic",
        help="A reward, or a weighted sum such as hpsv2:15,aesthetic:1. NAME@REVISION takes a revision of its Hub"
        " repository. Your own reward is package.module:callable or path/to/file.py:callable, also with a :WEIGHT."
        " `python -m reward_models --help` lists the rewards.",
    )
    add_reward_files(add)
    add(
        "--reward_timeout",
        type=POSITIVE,
        default=600.0,
        help="For --reward remote: seconds to wait for a server that is gone; then the run saves a checkpoint and ends.",
    )
    add("--reward_offload", action="store_true", help="Keep the reward models on the CPU except while they score.")
    add(
        "--reward_batch_size",
        type=whole_number(),
        help="Images that a reward scores at a time, gradient included; affects memory only. Default: --decode_batch_size.",
    )
    add(
        "--decode_batch_size",
        type=whole_or_auto(),
        default="auto",
        help="Images decoded at a time; affects memory only. auto: on a GPU as many as fit into half of the memory that is"
        " free, up to 16, else 1. If memory runs out, they are halved.",
    )
    return group


def add_reward_files(add):
    """Where rewards come from, and their options."""
    add(
        "--reward_path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="Local folder of a reward's model instead of the Hub; may be repeated.",
    )
    add(
        "--reward_option",
        action="append",
        default=[],
        metavar="NAME.OPTION=VALUE",
        help="An option of a reward, as `python -m reward_models --help` lists them; may be repeated.",
    )


def add_hacking_flags(parser):
    """Protection from reward hacking; see docs/evaluation.md."""
    add = parser.add_argument_group("protection from reward hacking").add_argument
    add(
        "--reward_normalize",
        action="store_true",
        help="Divide each reward of a sum by the running standard deviation of its scores, so that weights compare.",
    )
    add(
        "--reward_floor",
        action="append",
        default=[],
        metavar="NAME:VALUE[:WEIGHT]",
        help="Penalise images whose score by NAME, of --reward or --heldout_reward, is below VALUE: by WEIGHT (default: 10) for"
        " each standard deviation that it is below. May be repeated.",
    )
    add(
        "--kl_weight",
        type=NOT_NEGATIVE,
        default=0.0,
        help="Reward per nat of a step's divergence from the base model. Costs one more call of the network per step, and"
        " one more backward pass where the pathwise gradient passes. Needs --mixed_precision no.",
    )
    add(
        "--ema_decay",
        type=OPEN_SHARE,
        help="Keep a moving average of the adapter in ema/ too, and use it for validation and held-out rewards.",
    )
    add(
        "--heldout_reward",
        help="A reward or sum that is not trained on, scored on images of fixed seeds, with their diversity and their drift"
        " from the base model.",
    )
    add("--heldout_steps", type=whole_number(), default=50, help="Score the held-out reward every so many steps.")
    add("--num_heldout_images", type=whole_number(4), default=32, help="Held-out images, four of each prompt.")
    add(
        "--early_stop_patience",
        type=whole_number(),
        help="Stop when the held-out reward was below its best in so many scorings in a row. The best adapter is kept in"
        " best/.",
    )
    add("--feature_model", metavar="DIR", help="Folder of a CLIPModel for diversity and drift. Default: ViT-L/14.")
