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
"""Preprocessing and embeddings of the rewards that use CLIP."""

import os

import pytest
import torch
from PIL import Image
from reward_models import load_reward
from reward_models.clip import preprocess_clip, preprocess_letterbox
from reward_models.images import read_image
from rlr_testing import ASSETS, TINY_CLIP
from transformers import CLIPImageProcessorPil


@pytest.fixture(scope="module")
def clip_score():
    return load_reward("clip_score", path=TINY_CLIP)


def test_clip_score_matches_images_with_their_prompts(clip_score):
    """samples.png has one image of tiny-sd for every prompt of digits.txt, in ten columns."""
    with open(os.path.join(ASSETS, "digits.txt")) as file:
        prompts = file.read().splitlines()
    samples = read_image(os.path.join(ASSETS, "tiny-sd", "samples.png"))[0]
    images = samples.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1)
    others = prompts[11:] + prompts[:11]  # another colour and another digit
    margin = clip_score(images, prompts) - clip_score(images, others)
    assert len(prompts) == 60 and margin.min() > 0.1


def test_preprocessing_agrees_with_the_original_on_pil_images():
    """The reference is transformers' preprocessor, which works on PIL images."""
    processor = CLIPImageProcessorPil.from_pretrained(TINY_CLIP)
    pixels = (torch.rand(3, 9, 7).repeat_interleave(8, 1).repeat_interleave(11, 2) * 255).byte()
    expected = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    result = preprocess_clip(pixels[None].float() / 255, 32)
    assert result.shape == (1, 3, 32, 32)
    assert (result - expected).abs().mean() < 0.01


def test_letterbox_keeps_the_whole_image_on_black():
    pixels = preprocess_letterbox(torch.ones(1, 3, 16, 64), 32)
    white = preprocess_letterbox(torch.ones(1, 3, 32, 32), 32)
    black = preprocess_letterbox(torch.zeros(1, 3, 32, 32), 32)
    torch.testing.assert_close(pixels[..., 12:20, :], white[..., 12:20, :])
    torch.testing.assert_close(pixels[..., :12, :], black[..., :12, :])
    torch.testing.assert_close(pixels[..., 20:, :], black[..., 20:, :])
    assert preprocess_letterbox(torch.rand(1, 3, 1000, 1), 32).shape == (1, 3, 32, 32)


def test_prompts_are_encoded_once_and_one_at_a_time():
    reward = load_reward("clip_score", path=TINY_CLIP)  # with an empty cache
    images = torch.rand(3, 3, 32, 32)
    reward(images, ["a red seven", "a blue two", "a red seven"])
    reward(images[:2], ["a blue two", "a red seven"])
    assert reward.text_embeds.cache_info().misses == 2
    # An embedding does not depend on the batch in which the prompt was first used.
    cached, alone = (encode("a blue two", images.device) for encode in (reward.text_embeds, reward._text_embeds))
    assert torch.equal(cached, alone)
