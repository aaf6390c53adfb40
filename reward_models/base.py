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
"""What every reward is, and what the rewards share.

A reward is a callable `reward(images, prompts) -> (B,) tensor` with an attribute `differentiable`:

    images     (B, 3, H, W), RGB in [0, 1]
    prompts    B strings; image i is scored with prompt i
    result     (B,), higher is better; with a graph back to `images` if `reward.differentiable`
"""

import os
import pickle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def preprocess_clip(images, size):
    """CLIP's preprocessing as one differentiable resize: short side to `size`, centre crop, CLIP mean and deviation.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: the side of the square that the vision tower sees, in pixels.

    Returns:
        (B, 3, size, size), normalised.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        short = min(height, width)
        shape = (height * size // short, width * size // short)
        # Bicubic overshoots at edges, which an 8-bit picture cannot: hence the clamp.
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def load_state_dict(file):
    """The tensors of a .safetensors or a torch checkpoint, on the CPU; a pickle that would run code is refused.

    Raises:
        ValueError: naming the file, if it cannot be read that way.
    """
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file!r} is no plain checkpoint of tensors (it would run code or is damaged)") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file!r} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error


def load_into(module, file):
    """Load a checkpoint file into a module, strictly.

    Raises:
        ValueError: naming the file and the missing, unexpected or misshapen keys.
    """
    state, own = load_state_dict(file), module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or misshapen:
        raise ValueError(f"{file!r} does not fit: missing {missing}, unexpected {unexpected}, other shape {misshapen}")
    module.load_state_dict(state)


def existing_file(directory, *names):
    """The path of the first of `names` that is a file in `directory`.

    Raises:
        ValueError: if none is.
    """
    for name in names:
        if os.path.isfile(os.path.join(directory, name)):
            return os.path.join(directory, name)
    raise ValueError(f"{directory!r} holds no {' nor '.join(names)}")


class Scores(NamedTuple):
    """The scores of one batch under a weighted sum of rewards.

    Attributes:
        differentiable: (B,), the weighted sum of the members with a gradient, zero without such members.
        black_box: (B,), the weighted sum of the members without.
        members: each member's own unweighted score (B,), detached, by name.
    """

    differentiable: torch.Tensor
    black_box: torch.Tensor
    members: dict

    @property
    def total(self):
        """(B,), the whole sum."""
        return self.differentiable + self.black_box


class WeightedSum:
    """sum_m w_m R_m, kept apart by whether the members have a gradient.

    Args:
        members: `{name: (weight, reward)}`.
    """

    def __init__(self, members):
        self.members = members

    @property
    def differentiable(self):
        """Whether every member has a gradient."""
        return all(reward.differentiable for _, reward in self.members.values())

    @property
    def has_gradient(self):
        """Whether any member has one."""
        return any(reward.differentiable for _, reward in self.members.values())

    def __call__(self, images, prompts):
        """Images (B, 3, H, W) in [0, 1] and B prompts -> `Scores`.

        Raises:
            ValueError: if a member returns anything but B finite numbers, naming the member and the prompt.
        """
        zero, scores = torch.zeros(len(images), device=images.device), {}
        sums = {True: zero, False: zero}
        for name, (weight, reward) in self.members.items():
            result = reward(images if reward.differentiable else images.detach(), prompts)
            _check_scores(name, result, prompts)
            scores[name] = result.detach().float()
            sums[reward.differentiable] = sums[reward.differentiable] + weight * result
        return Scores(sums[True], sums[False], scores)


def _check_scores(name, scores, prompts):
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(prompts),):
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(
            f"reward {name!r} returned {shape} instead of a tensor of shape ({len(prompts)},), first prompt {prompts[0]!r}"
        )
    bad = ~torch.isfinite(scores.detach())
    if bad.any():
        i = bad.nonzero()[0].item()
        raise ValueError(f"reward {name!r} returned {scores[i].item()} for prompt {prompts[i]!r}")
