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
"""How much moves in a video, so that rewards of consistency do not make it still.

It measures change, not its quality: a cut, or objects that flicker, also count as motion. Train it beside
`video_smoothness`, which these lower, with a small weight.
"""

import torch.nn.functional as F

from .base import check_batch
from .videos import check_pairs


BLOCK = 8  # side of the blocks of pixels that are averaged
SMOOTH = 1e-3  # variances far below it, of frames without contrast, count as none


def motion(videos, prompts):
    """R = mean_i (1 - c_i), where c_i is the correlation of frames i and i + 1: 0 for a still video, 1 for unrelated frames.

    The correlation of two frames is that of their pixels, averaged over blocks, in each color and then averaged:

        c = (cov(x, y) + SMOOTH) / sqrt((var(x) + SMOOTH) (var(y) + SMOOTH))

    Noise of single pixels averages out in the blocks, and a change of brightness or contrast hardly counts.

    Videos are (B, F, 3, H, W) in [0, 1] and scores are (B,). Prompts are ignored.
    """
    check_batch(videos, prompts, "videos")
    check_pairs(videos, "motion")
    blocks = [-(-side // BLOCK) for side in videos.shape[-2:]]
    frames = F.adaptive_avg_pool2d(videos.flatten(0, 1), blocks).flatten(2).unflatten(0, videos.shape[:2])
    frames = frames - frames.mean(-1, keepdim=True)
    deviation = (frames.square().mean(-1) + SMOOTH).sqrt()
    covariance = (frames[:, :-1] * frames[:, 1:]).mean(-1)
    correlation = (covariance + SMOOTH) / (deviation[:, :-1] * deviation[:, 1:])
    return 1 - correlation.mean((1, 2))


motion.differentiable = True
motion.takes_videos = True
