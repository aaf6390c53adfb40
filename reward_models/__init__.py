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
"""Reward models. `load_reward(name)` returns a callable `reward(images, prompts) -> scores`:

    images     (B, 3, H, W), RGB in [0, 1]
    prompts    B strings; image i is scored with prompt i
    scores     (B,), higher is better; differentiable with respect to `images` if `reward.differentiable` is true

Rewards score videos (B, F, 3, H, W) as well: an image reward scores every frame, and a reward with the attribute
`takes_videos` the whole video, see `videos.py` and `load_rewards`.

To add a reward, write a module with a function `load(path, revision, device, dtype, **options)` and list it in `known.REWARDS`.
`python -m reward_models --help` shows how to score images from the command line.
"""

import math
import os
import re
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import NamedTuple, Optional

from .base import Floor, Scores, WeightedSum
from .custom import load_custom
from .known import REWARDS, known_reward, options_in_help, parse_options
from .videos import PerFrame, prepare


__all__ = [
    "REWARDS",
    "Floor",
    "PerFrame",
    "Scores",
    "WeightedSum",
    "load_reward",
    "load_rewards",
    "check_options",
    "known_reward",
    "options_in_help",
    "parse_reward",
    "parse_reward_floors",
    "parse_reward_options",
    "parse_reward_paths",
]


class Term(NamedTuple):
    """One reward of a weighted sum.

    Attributes:
        weight: its weight in the sum.
        revision: branch, tag or commit of its Hub repository, or `None` for the main branch.
        entry: the entry as the user wrote it.
    """

    weight: float
    revision: Optional[str]
    entry: str


def load_reward(name, *, path=None, revision=None, device="cpu", dtype=None, options=None):
    """Load a reward, frozen and in eval mode.

    Args:
        name: a key of `REWARDS`.
        path: local folder with the original files of the reward. Each reward's module documents its layout. By default
            the files are downloaded from the Hub.
        revision: branch, tag or commit of the reward's Hub repository. Default: the main branch.
        device: device of the networks.
        dtype: precision of the networks, without the option of this name. Default: that of the `KnownReward`. Score heads
            and scores are never narrower than float32.
        options: {name: value as text}, see `KnownReward`.

    Raises:
        ValueError: if the name is unknown, the path does not exist or lacks files, an option is not one of the reward's, or
            the Hub repository is gated, missing or unreachable.
    """
    known = known_reward(name)
    if known is None:
        raise ValueError(f"unknown reward {name!r}, known are: {', '.join(REWARDS)}")
    full_name = name if revision is None else f"{name}@{revision}"
    values = parse_options(name, options or {})
    module, attribute = known.source.split(":")
    loader = getattr(import_module(f".{module}", __name__), attribute)
    if hasattr(loader, "differentiable"):  # not a loader but the reward itself
        if path is not None or revision is not None:
            raise ValueError(f"reward {full_name if path is None else f'{name}={path}'!r}: this reward has no files")
        return loader
    if path is not None and revision is not None:
        raise ValueError(f"reward {full_name!r}: the folder {path!r} has no revisions")
    if path is not None and not os.path.isdir(path):
        raise ValueError(f"reward path {f'{name}={path}'!r}: no such folder")
    try:
        dtype = values.pop("dtype", dtype or known.dtype)
        loader = partial(loader, name=name) if known.has_labels else loader
        return loader(path, revision, device, dtype, **values).eval().requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"reward {full_name!r} cannot be loaded: {error}") from error


def parse_reward(text):
    """Parse a weighted sum such as "hpsv2:15,aesthetic@main,my_rewards.py:neon:0.5" into `{name: Term}`.

    An entry is either `NAME[@REVISION][:WEIGHT]` with a key of `REWARDS`, where a reward that has labels has one in the place
    of the revision, which belongs to its name, or a callable to import:
    `package.module:callable[:WEIGHT]` or `path/to/file.py:callable[:WEIGHT]`. The default weight is 1.

    Raises:
        ValueError: if an entry has neither form, is repeated, or its weight is not a finite number. The message quotes
            the entry.
    """
    terms = {}
    for entry in map(str.strip, text.split(",")):
        name, revision, weight = re.fullmatch(r"([^@:]*)(?:@([^:]*))?(?::(.*))?", entry, re.DOTALL).groups()
        if name in REWARDS and REWARDS[name].has_labels and revision:
            name, revision = f"{name}@{revision}", None
        if known_reward(name) is None:
            name, weight = re.fullmatch(r"(.+?:[^\W\d]\w*)(?::(.*))?|.*", entry, re.DOTALL).groups()
            revision = None
        if name is None:
            close = get_close_matches(entry, REWARDS, 1)
            raise ValueError(
                f"unknown reward {entry!r}{f' (did you mean {close[0]!r}?)' if close else ''}, known are:"
                f" {', '.join(REWARDS)}; for your own reward write"
                " package.module:callable or path/to/file.py:callable"
            )
        if revision == "":
            raise ValueError(f"reward {entry!r} has no revision after the @")
        if name in terms:
            raise ValueError(f"reward {entry!r} repeats {name!r} in {text!r}")
        try:
            terms[name] = Term(1.0 if weight is None else float(weight), revision, entry)
        except ValueError:
            terms[name] = Term(math.nan, revision, entry)
        if not math.isfinite(terms[name].weight):
            raise ValueError(f"reward {entry!r}: the weight {weight!r} is not a finite number")
    return terms


def parse_reward_paths(entries):
    """Parse entries such as "aesthetic=DIR" into `{name: folder}`. The last entry for a name wins.

    Raises:
        ValueError: if an entry does not have this form or its reward is unknown. The message quotes the entry.
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


def parse_reward_options(entries):
    """Parse entries such as "vqa.question=Is this {prompt}?" into `{name of a reward: {option: value as text}}`.

    The name may also be that of a custom class, as in `my_rewards.py:Neon.strength=2`. The last entry for an option wins.

    Raises:
        ValueError: if an entry does not have this form, its reward is unknown, or has no such option or value. The message
            quotes the entry.
    """
    options = {}
    for entry in entries:
        left, equals, value = entry.partition("=")
        name, dot, option = left.rpartition(".")
        if not (name and dot and option.isidentifier() and equals):
            raise ValueError(f"reward option {entry!r} is not of the form NAME.OPTION=VALUE")
        if known_reward(name) is None and ":" not in name:
            raise ValueError(
                f"reward option {entry!r}: unknown reward {name!r}, known are: {', '.join(REWARDS)}; of your own reward write"
                " path/to/file.py:callable.OPTION=VALUE, as in --reward"
            )
        if known_reward(name) is not None:
            parse_options(name, {option: value})
        options.setdefault(name, {})[option] = value
    return options


def check_options(options, names):
    """Refuse options of rewards that are not among some names.

    Raises:
        ValueError: naming one.
    """
    for name in options.keys() - set(names):
        raise ValueError(f"reward option {f'{name}...'!r}: the reward {name!r} is not in use")


def parse_reward_floors(entries):
    """Parse entries NAME:VALUE or NAME:VALUE:WEIGHT into `{name: Floor}`. The default weight is 10.

    Raises:
        ValueError: if an entry does not have this form, or repeats a name. The message quotes the entry.
    """
    floors, number = {}, r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    for entry in entries:
        match = re.fullmatch(rf"(.+?):({number})(?::({number}))?", entry)
        if match is None:
            raise ValueError(f"reward floor {entry!r} is not of the form NAME:VALUE or NAME:VALUE:WEIGHT")
        name, value, weight = match.groups()
        floors[name] = Floor(float(value), 10.0 if weight is None else float(weight))
        if floors[name].weight <= 0:
            raise ValueError(f"reward floor {entry!r}: the weight must be above 0")
    if len(floors) < len(entries):
        raise ValueError(f"reward floors {', '.join(entries)} repeat a name")
    return floors


def load_rewards(
    terms,
    paths,
    *,
    options=None,
    device="cpu",
    dtype=None,
    size=(512, 512),
    prompts=("", ""),
    batch_size=None,
    frame_reduction="mean",
    fps=None,
):
    """Load a weighted sum of rewards as a `WeightedSum`.

    Args:
        terms: result of `parse_reward`.
        paths: result of `parse_reward_paths`. Folders of rewards that are not in the sum are ignored.
        options: result of `parse_reward_options`. Those of rewards that are not in the sum are ignored.
        device: device of the networks.
        dtype: precision of the networks, see `load_reward`.
        size: (height, width) in pixels of images, or (height, width, frames) of videos. Custom rewards are tested on
            two random images or videos of this size.
        prompts: prompts of these two.
        batch_size: number of images or videos that a reward scores at a time. Default: all.
        frame_reduction: for videos, how the scores of image rewards on the frames become one: "mean" or "min".
        fps: frames per second of videos, for rewards with an attribute `fps`.

    Raises:
        ValueError: see `load_reward` and `load_custom`; also if a reward takes videos and `size` is that of images, or
            needs `fps`.
    """
    members = {}
    for name, term in terms.items():
        known, own = known_reward(name), (options or {}).get(name, {})
        if known is not None:
            files = {"path": paths.get(name), "revision": term.revision}
            reward = load_reward(name, **files, device=device, dtype=dtype, options=own)
        try:
            if known is not None:
                prepare(reward, size, fps)
            else:
                reward = load_custom(name, device, size, prompts, fps, own)
        except ValueError as error:
            raise ValueError(f"reward {term.entry!r} {error}") from error
        if len(size) == 3 and not getattr(reward, "takes_videos", False):
            reward = PerFrame(name, reward, frame_reduction)
        members[name] = (term.weight, reward)
    return WeightedSum(members, batch_size)
