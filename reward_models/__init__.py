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
"""Pluggable rewards: `load_reward(name)` gives a callable `(images, prompts) -> (B,)`.

    images     (B, 3, H, W), RGB in [0, 1]
    prompts    B strings; image i is scored with prompt i
    result     (B,), higher is better; with a graph back to `images` if the reward's attribute `differentiable` is true

`python -m reward_models --help` scores pictures without training.
"""

import math
import os
import re
from importlib import import_module
from typing import NamedTuple, Optional

import torch

from .base import Scores, WeightedSum
from .custom import load_custom


__all__ = ["REWARDS", "Scores", "WeightedSum", "load_reward", "load_rewards", "parse_reward", "parse_reward_paths"]


class KnownReward(NamedTuple):
    """What is known of a reward before it is imported.

    Attributes:
        source: "module:attribute", a loader `(path, revision, device, dtype) -> reward`, or the reward itself where it
            has no files.
        reads_prompts: whether the score depends on the prompt.
        meaning: what it measures, and the usual range of its scores.
    """

    source: str
    reads_prompts: bool
    meaning: str


REWARDS = {
    "aesthetic": KnownReward(
        "aesthetic:load", False, "LAION's aesthetic predictor on CLIP ViT-L/14, about 1 to 10; SD 1.x scores 5 to 6"
    ),
    "clip_score": KnownReward(
        "clip_score:load", True, "cosine of picture and prompt under CLIP ViT-L/14; SD 1.5 scores about .275"
    ),
    "hpsv2": KnownReward("hpsv2:load", True, "human preference, HPSv2 on CLIP ViT-H/14; SD 1.x scores .24 to .28"),
    "hpsv2.1": KnownReward(
        "hpsv2:load_v2_1", True, "the same trained on more data, HPSv2.1; SD 1.x scores .24 to .28"
    ),
    "pickscore": KnownReward(
        "pickscore:load", True, "human preference, PickScore on CLIP ViT-H/14; SD 1.x scores 18 to 24"
    ),
    "imagereward": KnownReward(
        "imagereward:load",
        True,
        "human preference, ImageReward on BLIP; SD 1.x scores .1 to .3, tuned models .7 to .8",
    ),
    "jpeg_compressibility": KnownReward(
        "jpeg:jpeg_compressibility", False, "negated kB as a JPEG of quality 95; no gradient"
    ),
    "jpeg_incompressibility": KnownReward(
        "jpeg:jpeg_incompressibility", False, "kB as a JPEG of quality 95; no gradient"
    ),
}


class Term(NamedTuple):
    """One reward of a weighted sum: its weight, the revision of its Hub repository, and the entry as it was written."""

    weight: float
    revision: Optional[str]
    entry: str


def load_reward(name, *, path=None, revision=None, device="cpu", dtype=torch.float32):
    """Load one reward, frozen and in eval mode.

    Args:
        name: a key of `REWARDS`.
        path: a local folder in the layout of the original files instead of the Hub's; see each reward's file.
        revision: branch, tag or commit of the reward's Hub repository; default: its main branch.
        device, dtype: where and in what precision the networks run; heads and scores are float32 at least.

    Raises:
        ValueError: for an unknown name, for a path that is missing or does not hold what the reward needs, and for a
            repository that is gated, absent or out of reach.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}, known are: {', '.join(REWARDS)}")
    asked = name if revision is None else f"{name}@{revision}"
    module, attribute = REWARDS[name].source.split(":")
    found = getattr(import_module(f".{module}", __name__), attribute)
    if hasattr(found, "differentiable"):
        if path is not None or revision is not None:
            raise ValueError(f"reward {asked if path is None else f'{name}={path}'!r}: this reward has no files")
        return found
    if path is not None and revision is not None:
        raise ValueError(f"reward {asked!r}: the folder {path!r} has no revisions")
    if path is not None and not os.path.isdir(path):
        raise ValueError(f"reward path {f'{name}={path}'!r}: no such folder")
    try:
        return found(path, revision, device, dtype).eval().requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"reward {asked!r} cannot be loaded: {error}") from error


def parse_reward(text):
    """The terms of a sum such as "hpsv2:15,aesthetic@main,my_rewards.py:neon:0.5", as `{name: Term}`.

    An entry is a key of `REWARDS` with a revision and a weight of its own, `NAME[@REVISION][:WEIGHT]`, or a callable
    to import, `package.module:callable[:WEIGHT]` or `path/to/file.py:callable[:WEIGHT]`. The weight is 1 where none
    is given.

    Raises:
        ValueError: quoting the entry that is of neither form, is repeated, or whose weight is no finite number.
    """
    terms = {}
    for entry in map(str.strip, text.split(",")):
        name, revision, weight = re.fullmatch(r"([^@:]*)(?:@([^:]*))?(?::(.*))?", entry, re.DOTALL).groups()
        if name not in REWARDS:
            name, weight = re.fullmatch(r"(.+?:[^\W\d]\w*)(?::(.*))?|.*", entry, re.DOTALL).groups()
            revision = None
        if name is None:
            raise ValueError(
                f"unknown reward {entry!r}, known are: {', '.join(REWARDS)}; one of your own is written"
                " package.module:callable or path/to/file.py:callable"
            )
        if revision == "":
            raise ValueError(f"reward {entry!r} names no revision after the @")
        if name in terms:
            raise ValueError(f"reward {entry!r} repeats {name!r} in {text!r}")
        try:
            terms[name] = Term(1.0 if weight is None else float(weight), revision, entry)
        except ValueError:
            terms[name] = Term(math.nan, revision, entry)
        if not math.isfinite(terms[name].weight):
            raise ValueError(f"reward {entry!r}: the weight {weight!r} is no finite number")
    return terms


def parse_reward_paths(entries):
    """Folders by reward name of entries such as "aesthetic=DIR"; of a repeated name the later entry wins.

    Raises:
        ValueError: quoting the entry that is not of this form or of no known reward.
    """
    paths = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ValueError(f"reward path {entry!r} is not of the form NAME=DIR")
        if name not in REWARDS:
            raise ValueError(f"reward path {entry!r}: unknown reward {name!r}, known are: {', '.join(REWARDS)}")
        paths[name] = path
    return paths


def load_rewards(
    terms, paths, *, device="cpu", dtype=torch.float32, size=(512, 512), prompts=("", ""), batch_size=None
):
    """The `WeightedSum` of `parse_reward`'s terms.

    Args:
        terms: of `parse_reward`.
        paths: of `parse_reward_paths`; folders of rewards that are not in the sum are ignored.
        device, dtype: of the networks.
        size, prompts: height and width in pixels and prompts of the two random images on which custom rewards are tried.
        batch_size: images that a reward sees at a time; default: all.

    Raises:
        ValueError: as `load_reward` and `load_custom` do.
    """
    members = {}
    for name, term in terms.items():
        if name in REWARDS:
            reward = load_reward(name, path=paths.get(name), revision=term.revision, device=device, dtype=dtype)
        else:
            try:
                reward = load_custom(name, device, size, prompts)
            except ValueError as error:
                raise ValueError(f"reward {term.entry!r} {error}") from error
        members[name] = (term.weight, reward)
    return WeightedSum(members, batch_size)
