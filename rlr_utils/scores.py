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
"""What a `score` function returns, checked."""

import torch

from .advantages import PARTS


class Scorer:
    """Calls `score` functions, and checks what they return.

    Args:
        differentiable: whether the reward, or a part of it, has a gradient.
        black_box: whether a part of it has none.
    """

    def __init__(self, differentiable, black_box):
        self.differentiable, self.black_box = differentiable, black_box
        self.unchecked = []

    def __call__(self, score, x_0, with_gradient=False):
        """(rewards (B,), those of the part without a gradient (B,), dR/dx_0 (B, ...) or `None`), detached.

        Whether the rewards are finite is left to `check`.

        Raises:
            ValueError: if `score` does not return what it should.
        """
        with torch.enable_grad():
            scored = score(x_0, with_gradient)
        if not isinstance(scored, (tuple, list)) or len(scored) not in (2, 3):
            raise ValueError(
                "score must return (rewards, gradient or None), or these two and the rewards of the part without a gradient,"
                f" not {f'{len(scored)} results' if isinstance(scored, (tuple, list)) else f'a {type(scored).__name__}'}"
            )
        rewards, reward_grad, *rest = scored
        rewards = self._rewards(rewards, "rewards", x_0)
        if with_gradient:
            self._check_gradient(reward_grad, x_0)
        if self.differentiable and self.black_box and not rest:
            raise ValueError("score returned no third result, the rewards of the part without a gradient")
        if rest and not self.black_box:
            raise ValueError(
                "score returned a third result, the rewards of the part without a gradient: make"
                " RLRStep(..., black_box=True)"
            )
        if rest:
            black_box = self._rewards(rest[0], "a third result", x_0)
        else:
            black_box = rewards if self.black_box else torch.zeros_like(rewards)
        return rewards, black_box, reward_grad.detach() if with_gradient else None

    def predictions(self, trajectory, score, score_predictions=None):
        """The rewards of the images predicted at each step, {"total", "black_box"} -> (B, T + 1), NaN where none was.

        Args:
            trajectory: whose predictions are used up.
            score, score_predictions: as `RLRStep.rollout` takes them.
        """
        x_0, length = trajectory.latents[0], len(trajectory.latents)
        steps, images = list(trajectory.predictions), list(trajectory.predictions.values())
        trajectory.predictions.clear()
        if score_predictions is None:
            total, black_box = map(torch.cat, zip(*(self(score, x)[:2] for x in images)))
        else:
            total, black_box, _ = self(score_predictions, torch.cat(images))
        dtype = torch.promote_types(x_0.dtype, torch.float32)
        predicted = {part: torch.full((length, len(x_0)), torch.nan, dtype=dtype, device=x_0.device) for part in PARTS}
        for part, scores in (("total", total), ("black_box", black_box)):
            predicted[part][steps] = scores.view(len(steps), len(x_0)).to(dtype)
        return {part: by_step.T for part, by_step in predicted.items()}

    def _rewards(self, rewards, name, x_0):
        """What a `score` returned for latents (B, ...), as floating-point numbers (B,) on their device, detached."""
        if not isinstance(rewards, torch.Tensor):
            raise ValueError(f"score returned {name} that is a {type(rewards).__name__}, not a tensor")
        if rewards.shape != x_0.shape[:1]:
            raise ValueError(f"score returned {name} of shape {tuple(rewards.shape)} for a batch of {len(x_0)}")
        rewards = rewards.detach().to(x_0.device, torch.promote_types(rewards.dtype, torch.float32))
        self.unchecked.append((name, rewards))
        return rewards

    def _check_gradient(self, reward_grad, x_0):
        if reward_grad is None:
            raise ValueError(
                "score returned no gradient: return dR/dx_0 where it is asked for, or make"
                " RLRStep(..., differentiable=False) for a black box"
            )
        if not isinstance(reward_grad, torch.Tensor):
            raise ValueError(f"score returned a gradient that is a {type(reward_grad).__name__}, not a tensor")
        if reward_grad.shape != x_0.shape:
            raise ValueError(
                f"score returned a gradient of shape {tuple(reward_grad.shape)} for latents of {tuple(x_0.shape)}"
            )

    def check(self):
        """Check all rewards since the last time at once: each check makes the CPU wait for the device.

        Raises:
            ValueError: if one is not finite.
        """
        unchecked, self.unchecked = self.unchecked, []
        finite = torch.stack([rewards.isfinite().all() for _, rewards in unchecked]).tolist() if unchecked else []
        for is_finite, (name, rewards) in zip(finite, unchecked):
            if not is_finite:
                i = (~rewards.isfinite()).nonzero()[0].item()
                raise ValueError(f"score returned {name} that is {rewards[i].item()} for image {i} of the batch")
