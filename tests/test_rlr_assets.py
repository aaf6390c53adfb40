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
"""The embedded models: what they draw and how they score it."""

import os

import pytest
import torch
from make_tiny_assets import COLORS, NUM_TRAIN_DIGITS, load_scans, paint, read_colors, read_digits, real_quality
from reward_models import load_reward
from rlr_testing import DIGITS, TINY_AESTHETIC, TINY_SD, tiny_pipeline
from rlr_training.prompts import load_prompts
from safetensors import safe_open
from scipy.stats import spearmanr


@pytest.fixture(scope="module")
def base_images():
    """Two images of each caption at the settings of the model card, and the numbers of their captions."""
    captions = load_prompts(DIGITS) * 2
    pipeline = tiny_pipeline()
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        captions, num_inference_steps=50, guidance_scale=5.0, eta=1.0, generator=generator, output_type="pt"
    ).images
    return images, torch.arange(len(captions)) % 60


def test_the_pipeline_draws_what_the_captions_say(base_images):
    images, captions = base_images
    assert (read_digits(images) == captions % 10).float().mean() >= 0.95
    assert (read_colors(images) == captions // 10).float().mean() >= 0.95


def test_the_head_ranks_held_out_images_and_leaves_headroom(base_images):
    ink, _ = load_scans()
    held_out = ink[NUM_TRAIN_DIGITS:]
    colors = torch.arange(len(held_out)) % len(COLORS)
    real = paint(held_out, colors, torch.Generator().manual_seed(0))
    reward = load_reward("aesthetic", path=TINY_AESTHETIC)
    scores = reward(real, [""] * len(real))
    assert spearmanr(scores, real_quality()(real)).statistic >= 0.8
    assert reward(base_images[0], [""] * len(base_images[0])).mean() <= scores.max() - 2


def test_the_files_are_small_and_in_float32():
    size = 0
    for folder, _, names in (*os.walk(TINY_SD), *os.walk(TINY_AESTHETIC)):
        for name in names:
            path = os.path.join(folder, name)
            size += os.path.getsize(path)
            if name.endswith(".safetensors"):
                with safe_open(path, framework="pt") as file:
                    assert {file.get_tensor(key).dtype for key in file.keys()} <= {torch.float32, torch.int64}, path
    assert size <= 14e6
