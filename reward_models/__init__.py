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
"""Pluggable rewards: `load_reward(name)` gives a callable `(images, prompts) -> (B,)`; the contract is in base.py."""

import math
import os
from importlib import import_module

import torch
from safetensors import SafetensorError

from .base import Scores, WeightedSum


__all__ = ["REWARDS", "Scores", "WeightedSum", "load_reward", "load_rewards", "parse_reward", "parse_reward_paths"]

# name -> what loads it, imported when it is asked for. Rewards without weights are plain functions.
REWARDS = {
    "aesthetic": "aesthetic:load",
    "clip_score": "clip_score:load",
    "jpeg_compressibility": "jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "jpeg:jpeg_incompressibility",
}


def load_reward(name, *, path=None, device="cpu", dtype=torch.float32):
    """Load one reward, frozen and in eval mode.

    Args:
        name: a key of `REWARDS`.
        path: a local folder instead of the Hub's checkpoint; see each reward's file for its layout.
        device, dtype: where and in what precision the network runs; heads and scores are float32 at least.

    Raises:
        ValueError: for an unknown name, for a path that is missing or does not hold what the reward needs, and if the
            Hub cannot be reached.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}, known are: {', '.join(REWARDS)}")
    module, attribute = REWARDS[name].split(":")
    loader = getattr(import_module(f".{module}", __name__), attribute)
    if path is not None and (attribute != "load" or not os.path.isdir(path)):
        problem = "no such folder" if attribute == "load" else "this reward has no files"
        raise ValueError(f"reward path {f'{name}={path}'!r}: {problem}")
    if attribute != "load":
        return loader
    try:
        return loader(path, device, dtype)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"reward {name!r} cannot be loaded from {path or 'the Hub'!r}: {error}") from error


def parse_reward(text):
    """Weights by name of a sum such as "aesthetic:1,clip_score:5"; the weight is 1 where none is given.

    Raises:
        ValueError: quoting the entry whose name is unknown or repeated or whose weight is no finite number.
    """
    weights = {}
    for entry in text.split(","):
        name, colon, weight = entry.strip().partition(":")
        if name not in REWARDS:
            raise ValueError(f"unknown reward {entry.strip()!r}, known are: {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"reward {entry.strip()!r} repeats {name!r} in {text!r}")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"reward {entry.strip()!r}: the weight {weight!r} is no finite number")
    return weights


def parse_reward_paths(entries):
    """Folders by reward name of entries such as "aesthetic=DIR"; of a repeated name the later entry wins.

    Raises:
        ValueError: quoting the entry that is not of this form.
    """
    paths = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"reward path {entry!r} is not of the form NAME=DIR")
        paths[name] = path
    return paths


def load_rewards(weights, paths, *, device="cpu", dtype=torch.float32):
    """The `WeightedSum` of `parse_reward`'s weights; `parse_reward_paths`' folders of other rewards are ignored."""
    return WeightedSum(
        {
            name: (weight, load_reward(name, path=paths.get(name), device=device, dtype=dtype))
            for name, weight in weights.items()
        }
    )
