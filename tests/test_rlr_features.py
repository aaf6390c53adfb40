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
"""Diversity, drift and Frechet distance, against values computed by other means."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reward_models.features import diversity, drift, frechet_distance, load_features
from rlr_testing import TINY_CLIP
from scipy.linalg import sqrtm


def test_diversity_is_the_mean_distance_of_images_of_one_prompt():
    angles = torch.tensor([0.0, 90.0, 180.0, 10.0, 70.0, 45.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    # "a" has three pairs, of 0, 90 and 180 degrees; "b" has one, of 60 degrees; "c" has a single image.
    means = [np.mean([1.0, 2.0, 1.0]), 1 - np.cos(np.deg2rad(60))]
    assert diversity(features, ["a", "a", "a", "b", "b", "c"]) == pytest.approx(np.mean(means), rel=1e-5)
    assert np.isnan(diversity(features[:1], ["a"]))


def test_drift_is_one_minus_the_cosine_of_each_pair():
    base = F.normalize(torch.randn(4, 7), dim=1)
    tuned = torch.cat([base[:1], -base[1:2], torch.randn(2, 7)])
    tuned = F.normalize(tuned, dim=1)
    expected = 1 - F.cosine_similarity(base, tuned)
    torch.testing.assert_close(drift(base, tuned), expected)
    torch.testing.assert_close(drift(base, tuned)[:2], torch.tensor([0.0, 2.0]))


def test_frechet_distance_agrees_with_scipys_matrix_square_root():
    torch.manual_seed(0)
    first, second = torch.randn(200, 5) @ torch.randn(5, 5), torch.randn(150, 5) @ torch.randn(5, 5) + 0.3
    cov_1, cov_2 = np.cov(first.double().numpy().T), np.cov(second.double().numpy().T)
    means = first.double().mean(0) - second.double().mean(0)
    expected = means.square().sum().item() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    shifted = torch.zeros(5).index_fill(0, torch.tensor([1]), 2.0)
    assert frechet_distance(first, first + shifted) == pytest.approx(4, rel=1e-5)
    # More dimensions than images, as is usual for CLIP embeddings.
    assert frechet_distance(torch.randn(8, 64), torch.randn(8, 64)) > 0


def test_features_have_unit_norm_for_any_batch_size():
    features = load_features(TINY_CLIP)
    images = torch.rand(5, 3, 40, 32)
    embeds = features(images, batch_size=2)
    assert embeds.shape == (5, 768) and not embeds.requires_grad
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embeds, features(images, batch_size=5), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds no config.json"):
        load_features("/nowhere")
