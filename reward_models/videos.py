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
"""Rewards on videos (B, F, 3, H, W) in [0, 1].

An image reward scores every frame, see `PerFrame`. A reward with the attribute `takes_videos = True` gets the whole
video. Two more attributes of such a reward are optional:

    mean_over_frames    whether its score is the mean of scores of single frames (default: False). Only then does a
                        randomly drawn part of the frames estimate the score of the video without bias.
    fps                 if there is such an attribute, it is set to the number of frames per second before any call.
"""

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .base import check_batch, check_scores, score_gradient, set_fps


REDUCTIONS = ("mean", "min")


class PerFrame(torch.nn.Module):
    """R = the mean, or the minimum, over the frames of a video of an image reward r(frame, prompt).

    The frames are scored one after the other, and computed again in the backward pass. At any time there is the graph
    of r on only one frame of each video.

    Args:
        name: of the image reward, for messages.
        reward: the image reward.
        reduction: one of `REDUCTIONS`.
    """

    takes_videos = True

    def __init__(self, name, reward, reduction):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction of frames {reduction!r}, known are: {', '.join(REDUCTIONS)}")
        self.name = name
        self.reward = reward
        self.reduction = reduction
        self.differentiable = reward.differentiable
        self.mean_over_frames = reduction == "mean"
        self.gradient = getattr(reward, "gradient", score_gradient)
        self.check_prompts = getattr(reward, "check_prompts", lambda prompts: None)

    def forward(self, videos, prompts):
        check_batch(videos, prompts, "videos")
        scores = torch.stack([self._score(frames, prompts) for frames in videos.unbind(1)], dim=1)
        return scores.mean(1) if self.reduction == "mean" else scores.amin(1)

    def _score(self, frames, prompts):
        """Scores (B,) of one frame (B, 3, H, W) of each video, in float32 or wider."""
        # An early stop is an exception, which the code of a custom reward would see.
        with set_checkpoint_early_stop(False):
            scores = checkpoint(self.reward, frames, prompts, use_reentrant=False)
        check_scores(scores, prompts, f"reward {self.name!r}")
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def prepare(reward, size, fps):
    """Check that a reward can score what has this size, and set its attribute `fps` if it has one.

    Args:
        size: (height, width) of images, or (height, width, frames) of videos.
        fps: frames per second of the videos, or `None`.

    Raises:
        ValueError: if it takes videos and these are images, or it needs `fps` and gets none. The caller names it.
    """
    if getattr(reward, "takes_videos", False) and len(size) == 2:
        raise ValueError("scores whole videos, not images: give it videos, or choose a reward on images")
    set_fps(reward, fps)


def check_pairs(videos, name):
    """Check that there are consecutive frames.

    Raises:
        ValueError: if videos (B, F, ...) have one frame.
    """
    if videos.shape[1] < 2:
        raise ValueError(f"{name} compares consecutive frames, and these videos have one: give it two or more")
