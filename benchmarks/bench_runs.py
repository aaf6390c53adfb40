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
"""Runs of train_rlr_sd.py on the embedded bundle, and what the benchmarks measure of their images."""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_common import DIGITS, TINY_AESTHETIC, TINY_CLIP, TINY_SD
from make_tiny_assets import COLORS, load_scans, paint
from reward_models.features import load_features
from rlr_training.chains import set_size
from rlr_training.comparison import measure
from rlr_training.evaluation import load_base, make_draw
from rlr_training.prompts import load_prompts
from rlr_training.scoring import load_reward_sum
from train_rlr_sd import main, parse_args


FLAGS = [
    *("--pretrained_model_name_or_path", TINY_SD, "--prompts", DIGITS),
    *("--reward_path", f"aesthetic={TINY_AESTHETIC}", "--reward_path", f"clip_score={TINY_CLIP}"),
    *("--num_inference_steps", "10", "--train_batch_size", "32", "--decode_batch_size", "32"),
    *("--learning_rate", "1e-3", "--num_eval_images", "0", "--seed", "0", "--report_to", "none"),
]


def train(folder, flags):
    """Run train_rlr_sd.py into a folder, with flags beyond `FLAGS`, of which they may repeat some."""
    main(parse_args([*FLAGS, *flags, "--output_dir", folder]))


class BaseModel(NamedTuple):
    """The embedded pipeline without an adapter, and what it is evaluated on.

    Attributes:
        args: of train_rlr_sd.py.
        model: `DiffusionModel`.
        prompts: of the images that `draw` returns.
        rewards: `WeightedSum`.
    """

    args: Any
    model: Any
    prompts: list
    rewards: Any

    def draw(self, desc=None):
        """Images (N, 3, H, W) of the prompts, from fixed seeds, with the adapter that is loaded at the time."""
        return make_draw(self.args, self.model)(self.prompts, self.args.train_batch_size, desc)

    def measure(self, images, base=None, real=None):
        """(summary, details) as in `rlr_training.comparison.measure`; the summary has "nearest_real" as well."""
        summary, details = measure(
            images, self.prompts, self.rewards, clip_features(), base, real, torch.device("cpu")
        )
        return {**summary, "nearest_real": distance_to_digits(images).mean().item()}, details


def load_base_model(reward, num_prompts, images_per_prompt, flags=()):
    """`BaseModel` with a reward or sum, on prompts of all colors and digits; the images of a prompt come in a row."""
    args = parse_args([*FLAGS, *flags])
    prompts = load_prompts(args.prompts)
    # A stride of 7 meets all colors and digits.
    prompts = [prompts[i * 7 % len(prompts)] for i in range(num_prompts) for _ in range(images_per_prompt)]
    model = load_base(args, torch.float32)
    set_size(args, model)
    rewards = load_reward_sum(args, reward, prompts, "cpu", batch_size=None)
    return BaseModel(args, model, prompts, rewards)


@functools.cache
def clip_features():
    """The embedded CLIP, whose embeddings diversity and distances are measured in."""
    return load_features(TINY_CLIP)


@functools.cache
def real_digits():
    """The scans in color, (N, 3, 32, 32)."""
    scans, _ = load_scans()
    return paint(scans, torch.arange(len(scans)) % len(COLORS), torch.Generator().manual_seed(0))


def ink(images):
    """How much ink is where: images (N, 3, H, W) -> (N, 64), the brightest color on the 8 x 8 grid of the scans."""
    return F.adaptive_avg_pool2d(images.amax(1, keepdim=True), 8).flatten(1)


@functools.cache
def real_ink():
    """(M, 64), of the real digits."""
    return ink(real_digits())


def distance_to_digits(images):
    """(N,), the distance of the ink of each image to that of the nearest real digit."""
    return torch.cdist(ink(images), real_ink()).amin(1)
