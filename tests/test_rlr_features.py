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
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reward_models.features import diversity, drift, frechet_distance, load_features
from rlr_testing import TINY_CLIP
from scipy.linalg import sqrtm


def test_diversity_is_the_mean_distance_within_prompts():
    angles = torch.tensor([0.0, 90.0, 180.0, 10.0, 70.0, 45.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Of "a": three pairs of 0, 90 and 180 degrees; of "b": one of 60; "c" has a single picture.
    within = [np.mean([1.0, 2.0, 1.0]), 1 - np.cos(np.deg2rad(60))]
    assert diversity(features, ["a", "a", "a", "b", "b", "c"]) == pytest.approx(np.mean(within), rel=1e-5)
    assert np.isnan(diversity(features[:1], ["a"]))
    torch.testing.assert_close(drift(features[:1], features[1:2]), torch.ones(1))


def test_the_frechet_distance_against_a_matrix_square_root():
    torch.manual_seed(0)
    first, second = torch.randn(200, 5) @ torch.randn(5, 5), torch.randn(150, 5) @ torch.randn(5, 5) + 0.3
    a, b = np.cov(first.double().numpy().T), np.cov(second.double().numpy().T)
    means = first.double().mean(0) - second.double().mean(0)
    expected = means.square().sum().item() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    shifted = torch.zeros(5).index_fill(0, torch.tensor([1]), 2.0)
    assert frechet_distance(first, first + shifted) == pytest.approx(4, rel=1e-5)
    # More dimensions than pictures, as it is with CLIP's.
    assert frechet_distance(torch.randn(8, 64), torch.randn(8, 64)) > 0


def test_features_are_of_unit_norm_whatever_the_batch():
    features = load_features(TINY_CLIP)
    images = torch.rand(5, 3, 40, 32)
    embeds = features(images, batch_size=2)
    assert embeds.shape == (5, 768) and not embeds.requires_grad
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embeds, F.normalize(features(images, batch_size=5), dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds no config.json"):
        load_features("/nowhere")
