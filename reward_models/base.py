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
"""The interface of a reward, and the code that several rewards share.

A reward is a callable `reward(images, prompts) -> scores` with a boolean attribute `differentiable`:

    images     (B, 3, H, W), RGB in [0, 1]
    prompts    B strings; image i is scored with prompt i
    scores     (B,), higher is better; differentiable with respect to `images` if `reward.differentiable` is true

A reward with the attribute `takes_videos = True` gets videos (B, F, 3, H, W) instead; see `videos.py`. One that cannot score
every prompt has a function `check_prompts(prompts)`, which raises a ValueError that says why.
"""

from contextlib import contextmanager
from typing import NamedTuple, Optional

import torch


# Within `deferred_checks` the checks of numbers that wait for its end, (whether it failed, its message) each.
_waiting = None


@contextmanager
def deferred_checks():
    """Within it, the numbers in images and scores are checked at its end, all at once.

    A check makes the CPU wait for the device, which then idles until the next call has been launched. Shapes and types are
    checked at once in any case.

    Raises:
        ValueError: at the end, of the first check that has failed; also if something else has failed after it.
    """
    global _waiting
    if _waiting is not None:  # they wait already
        yield
        return
    _waiting = []
    try:
        yield
    finally:
        checks, _waiting = _waiting, None
        devices = [failed.device for failed, _ in checks]
        device = next((one for one in devices if one.type != "cpu"), "cpu")
        failures = torch.stack([failed.to(device) for failed, _ in checks]).tolist() if checks else []
        for has_failed, (_, message) in zip(failures, checks):
            if has_failed:
                raise ValueError(message())


def check_numbers(failed, message):
    """Check numbers that are on a device, now or at the end of `deferred_checks`.

    Args:
        failed: a boolean tensor of one element, of what must not be so.
        message: `message() -> str`, of the error.

    Raises:
        ValueError: if it is so.
    """
    if _waiting is not None:
        _waiting.append((failed, message))
    elif failed:
        raise ValueError(message())


def check_batch(images, prompts, kind="images"):
    """Check the input of a reward.

    Args:
        kind: "images", which are (B, 3, H, W), or "videos", which are (B, F, 3, H, W).

    Raises:
        ValueError: if they are not of that shape in [0, 1], or there is not exactly one prompt for each.
    """
    shape = ("B", "3", "H", "W") if kind == "images" else ("B", "F", "3", "H", "W")
    if images.dim() != len(shape) or images.shape[-3] != 3:
        raise ValueError(f"{kind} of shape {tuple(images.shape)} are not ({', '.join(shape)})")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} {kind} with {len(prompts)} prompts: give one prompt per {kind[:-1]}")
    low, high = images.detach().aminmax()
    check_numbers(
        ~((low >= 0) & (high <= 1)),
        lambda: f"{kind} must lie in [0, 1], but their values range from {low.item():.4g} to {high.item():.4g}",
    )


class ScoreHead(torch.nn.Module):
    """The head of LAION's aesthetic predictor and of ImageReward: embeddings (B, width) -> scores (B,).

    Its linear layers have no activations between them, so the head is an affine map. Dropout acts in training only.
    """

    def __init__(self, width):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            *(linear(width, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)),
            *(linear(64, 16), linear(16, 1)),
        )

    def forward(self, embeds):
        return self.layers(embeds).squeeze(-1)


class Scores(NamedTuple):
    """Scores of a batch under a weighted sum of rewards. All tensors are detached.

    Attributes:
        differentiable: (B,), weighted sum of the differentiable members; zero if there are none.
        black_box: (B,), weighted sum of the other members; zero if there are none.
        members: unweighted score (B,) of each member, by name.
        gradient: gradient of the sum of `differentiable` with respect to the images or videos, of their shape, or
            `None` if it was not requested.
    """

    differentiable: torch.Tensor
    black_box: torch.Tensor
    members: dict
    gradient: Optional[torch.Tensor]

    @property
    def total(self):
        """(B,), the weighted sum of all members."""
        return self.differentiable + self.black_box


class Floor(NamedTuple):
    """What the score of a member costs below a value: weight times the distance, in units of the member.

    Attributes:
        value: of the score.
        weight: of the penalty.
    """

    value: float
    weight: float


class WeightedSum:
    """The weighted sum of rewards, R = sum_m w_m R_m / u_m - sum_m c_m max(0, f_m - R_m) / s_m.

    s_m is the unit of a member, and u_m too if the sum is normalized; otherwise u_m = 1. The second sum is over the members
    that have a floor f_m, with the weight c_m. Differentiable and black-box members are summed separately.

    Args:
        members: `{name: (weight, reward)}`.
        batch_size: number of images or videos that a reward scores, and differentiates, at a time. Default: all. It
            changes the memory use only.

    Attributes:
        floors: {name: `Floor`}, of some members.
        normalized: whether each score is divided by its member's unit.
        units: {name: s_m}, 1 if nobody sets them.
    """

    def __init__(self, members, batch_size=None):
        self.members = members
        self.batch_size = batch_size
        self.floors, self.normalized, self.units = {}, False, dict.fromkeys(members, 1.0)

    def set_floor(self, name, floor, others=None):
        """Give a member a `Floor`, or a reward of another `WeightedSum`, which becomes a member with the weight 0."""
        if name not in self.members:
            self.members[name], self.units[name] = (0.0, others.members[name][1]), 1.0
        self.floors[name] = floor

    @property
    def differentiable(self):
        """Whether all members are differentiable."""
        return all(reward.differentiable for _, reward in self.members.values())

    @property
    def has_gradient(self):
        """Whether at least one member is differentiable."""
        return any(reward.differentiable for _, reward in self.members.values())

    @property
    def mean_over_frames(self):
        """Whether the score of a video is the mean of its frames' scores, so that a random chunk of frames estimates it."""
        return not self.floors and all(
            getattr(reward, "mean_over_frames", False) for _, reward in self.members.values()
        )

    @property
    def modules(self):
        """The members with parameters, for example to move them between devices."""
        modules = [reward for _, reward in self.members.values() if isinstance(reward, torch.nn.Module)]
        return [module for module in modules if next(module.parameters(), None) is not None]

    @property
    def services(self):
        """The members that servers score, also frame by frame; each has a `patience` in seconds, see `remote.py`."""
        rewards = [getattr(reward, "reward", reward) for _, reward in self.members.values()]
        return [reward for reward in rewards if hasattr(reward, "patience")]

    def set_fps(self, fps):
        """Set the number of frames per second of the videos, for the members that have an attribute `fps`.

        Raises:
            ValueError: if it is not a number above 0 and a member needs it. The message names the member.
        """
        for name, (_, reward) in self.members.items():
            try:
                set_fps(reward, fps)
            except ValueError as error:
                raise ValueError(f"reward {name!r} {error}") from error

    def check_prompts(self, prompts):
        """Refuse prompts that a member cannot score, before any image is drawn.

        Raises:
            ValueError: naming the prompt.
        """
        for _, reward in self.members.values():
            getattr(reward, "check_prompts", lambda prompts: None)(dict.fromkeys(prompts))

    def __call__(self, images, prompts, with_gradient=False, device=None):
        """Score images (B, 3, H, W), or videos (B, F, 3, H, W) if the members take them, in [0, 1] with B prompts.

        At any time there is the graph of only one reward on `batch_size` images or videos.

        Args:
            with_gradient: also compute `Scores.gradient`.
            device: move the images to this device, `batch_size` at a time.

        Returns:
            `Scores`.

        Raises:
            ValueError: if a member does not return B finite numbers. The message names the member, and the prompt of
                a score that is not finite.
        """
        size = self.batch_size or len(images)
        parts = [
            self._score(images[i : i + size].to(device=device), prompts[i : i + size], with_gradient)
            for i in range(0, len(images), size)
        ]
        return Scores(
            torch.cat([part.differentiable for part in parts]),
            torch.cat([part.black_box for part in parts]),
            {name: torch.cat([part.members[name] for part in parts]) for name in self.members},
            torch.cat([part.gradient for part in parts]) if with_gradient else None,
        )

    def _score(self, images, prompts, with_gradient):
        images = images.detach().requires_grad_(with_gradient)
        zero = torch.zeros(len(images), device=images.device)
        sums, scores = {True: zero, False: zero}, {}
        gradient = torch.zeros_like(images) if with_gradient else None
        for name, (_, reward) in self.members.items():
            backward = with_gradient and reward.differentiable
            with torch.set_grad_enabled(backward):
                result = reward(images if backward else images.detach(), prompts)
            check_scores(result, prompts, f"reward {name!r}")
            if backward and result.requires_grad:  # otherwise the score is a constant, with gradient zero
                gradient += getattr(reward, "gradient", score_gradient)(self._worth(name, result), images)
            scores[name] = result.detach().float().to(images.device)
            sums[reward.differentiable] = sums[reward.differentiable] + self._worth(name, scores[name])
        return Scores(sums[True], sums[False], scores, gradient)

    def plain(self, scores):
        """(B,), sum_m w_m R_m of `Scores`, without units and floors."""
        return sum(weight * scores.members[name] for name, (weight, _) in self.members.items())

    def _worth(self, name, scores):
        """What the scores (B,) of a member add to the sum."""
        weight, unit = self.members[name][0], self.units[name]
        worth = weight * scores / (unit if self.normalized else 1.0)
        if name in self.floors:
            floor = self.floors[name]
            worth = worth - floor.weight * torch.relu(floor.value - scores) / unit
        return worth


def set_fps(reward, fps):
    """Set the attribute `fps` of a reward, if it has one, to a number of frames per second.

    Raises:
        ValueError: if it has one and `fps` is not a number above 0. The caller names the reward.
    """
    if hasattr(reward, "fps"):
        if fps is None or not fps > 0:
            raise ValueError(f"needs the frame rate of the videos: give a number of frames per second, not {fps}")
        reward.fps = fps


def score_gradient(scores, images):
    """The gradient of the sum of scores (B,) with respect to the images or videos, of their shape."""
    return torch.autograd.grad(scores.sum(), images, materialize_grads=True)[0]


def check_scores(scores, prompts, name):
    """Check that scores are one finite float32 number per prompt, on any device and of any real type.

    Args:
        name: what the message calls the reward.

    Raises:
        ValueError: if they are not; of a score that is not finite the message names the prompt.
    """
    problem = None
    if not isinstance(scores, torch.Tensor):
        problem = f"a {type(scores).__name__} instead of a tensor of shape ({len(prompts)},): use torch.tensor or torch.stack"
    elif scores.shape != (len(prompts),):
        problem = f"a tensor of shape {tuple(scores.shape)} instead of ({len(prompts)},)"
    elif scores.is_meta:
        problem = "a tensor on the device 'meta', which has no numbers"
    elif scores.is_complex():
        problem = f"complex numbers ({scores.dtype}) instead of real ones"
    if problem is not None:
        raise ValueError(f"{name} returned {problem}")
    values = scores.detach().float()

    def message():
        i = (~values.isfinite()).nonzero()[0].item()
        return f"{name} returned {values[i].item()} for prompt {prompts[i][:80]!r}"

    check_numbers(~values.isfinite().all(), message)
