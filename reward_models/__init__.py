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

To add a reward, write a module with a function `load(path, revision, device, dtype, **options)` and list it in `REWARDS`.
`python -m reward_models --help` shows how to score images from the command line.
"""

import math
import os
import re
from importlib import import_module
from typing import Callable, NamedTuple, Optional

import torch

from .base import Scores, WeightedSum
from .custom import load_custom
from .videos import PerFrame, prepare


__all__ = [
    "REWARDS",
    "PerFrame",
    "Scores",
    "WeightedSum",
    "load_reward",
    "load_rewards",
    "known_reward",
    "options_in_help",
    "parse_reward",
    "parse_reward_options",
    "parse_reward_paths",
]


class Option(NamedTuple):
    """What may be set of a reward, as NAME.OPTION=VALUE.

    Attributes:
        parse: from the text of the value; a `ValueError` says what it must be.
        meaning: for --help.
    """

    parse: Callable
    meaning: str


def precision(text):
    """The type of the option `dtype`."""
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if text not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return names[text]


class KnownReward(NamedTuple):
    """Description of a reward, available without importing its module.

    Attributes:
        source: "module:attribute". The attribute is a loader `(path, revision, device, dtype, **options) -> reward`, or the
            reward itself if it has no files and no options.
        reads_prompts: whether the score depends on the prompt.
        meaning: what the reward measures, and the usual range of its scores.
        options: {name: `Option`} beside `dtype`, which all that have files take.
        dtype: precision of its networks.
        has_labels: whether what follows the @ tells several of them apart, and is no revision.
    """

    source: str
    reads_prompts: bool
    meaning: str
    options: dict = {}
    dtype: torch.dtype = torch.float32
    has_labels: bool = False


DTYPE = Option(precision, "precision of a reward's networks: fp32 (default but for vqa and hpsv3), fp16 or bf16")

REWARDS = {
    "aesthetic": KnownReward(
        "aesthetic:load", False, "LAION's aesthetic predictor on CLIP ViT-L/14, about 1 to 10; SD 1.x scores 5 to 6"
    ),
    "clip_score": KnownReward(
        "clip_score:load",
        True,
        "cosine similarity of image and prompt under CLIP ViT-L/14; SD 1.5 scores about .275",
    ),
    "hpsv2": KnownReward("hpsv2:load", True, "human preference, HPSv2 on CLIP ViT-H/14; SD 1.x scores .24 to .28"),
    "hpsv2.1": KnownReward(
        "hpsv2:load_v2_1", True, "human preference, HPSv2.1 (HPSv2 trained on more data); SD 1.x scores .24 to .28"
    ),
    "pickscore": KnownReward(
        "pickscore:load", True, "human preference, PickScore on CLIP ViT-H/14; SD 1.x scores 18 to 24"
    ),
    "imagereward": KnownReward(
        "imagereward:load",
        True,
        "human preference, ImageReward on BLIP; SD 1.x scores .1 to .3, fine-tuned models .7 to .8",
    ),
    "hpsv3": KnownReward(
        "hpsv3:load",
        True,
        "human preference, HPSv3 on Qwen2-VL-7B; SDXL scores 8.2, FLUX.1-dev 10.4",
        dtype=torch.bfloat16,
    ),
    "aesthetic_v2.5": KnownReward(
        "aesthetic_v2_5:load",
        False,
        "aesthetic predictor v2.5 on SigLIP so400m, about 1 to 10; from 5.5 on it is high",
    ),
    "ocr": KnownReward(
        "ocr:ocr", True, "share of the quoted text in the prompt that rapidocr reads in the image, 0 to 1; no gradient"
    ),
    "vqa": KnownReward(
        "vqa:load",
        True,
        'probability that a vision-language model (Qwen2.5-VL-3B) answers "Yes" to a question about the image, 0 to 1',
        options={
            "question": Option(str, 'what is asked, such as "Does this image show {prompt}?"'),
            "answer": Option(str, 'whose probability is the score, by its first token (default: "Yes")'),
            "model": Option(str, "name on huggingface.co/models of another image-text-to-text model of transformers"),
        },
        dtype=torch.bfloat16,
    ),
    "video_smoothness": KnownReward(
        "video_smoothness:load",
        False,
        "cosine of consecutive frames of a video under CLIP ViT-L/14; 1 for a still video",
    ),
    "videoalign": KnownReward(
        "videoalign:load",
        True,
        "human preference of a video, VideoAlign on Qwen2-VL-2B: sum of the next three",
    ),
    "videoalign_vq": KnownReward("videoalign:load_vq", True, "its visual quality, mean 0 and variance 1"),
    "videoalign_mq": KnownReward("videoalign:load_mq", True, "its motion quality, mean 0 and variance 1"),
    "videoalign_ta": KnownReward("videoalign:load_ta", True, "its text alignment, mean 0 and variance 1"),
    "motion": KnownReward("motion:motion", False, "how much consecutive frames of a video differ, 0 (still) to 1"),
    "jpeg_compressibility": KnownReward(
        "jpeg:jpeg_compressibility", False, "negative size in kB as a JPEG of quality 95; no gradient"
    ),
    "jpeg_incompressibility": KnownReward(
        "jpeg:jpeg_incompressibility", False, "size in kB as a JPEG of quality 95; no gradient"
    ),
}


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


def known_reward(name):
    """The `KnownReward` of a name, which may have a label, or `None`."""
    kind, at, _ = name.partition("@")
    known = REWARDS.get(kind)
    return None if known is None or at and not known.has_labels else known


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
            raise ValueError(
                f"unknown reward {entry!r}, known are: {', '.join(REWARDS)}; for your own reward write"
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
            raise ValueError(f"reward option {entry!r}: unknown reward {name!r}, known are: {', '.join(REWARDS)}")
        if known_reward(name) is not None:
            parse_options(name, {option: value})
        options.setdefault(name, {})[option] = value
    return options


def parse_options(name, options):
    """The values of a known reward's options {name: text}.

    Raises:
        ValueError: if it has no such option, or the option no such value. The message names them.
    """
    known, values = known_reward(name), {}
    own = {**({"dtype": DTYPE} if known.source.partition(":")[2].startswith("load") else {}), **known.options}
    for option, text in options.items():
        if option not in own:
            has = f"it has {', '.join(own)}" if own else "it has none"
            raise ValueError(f"reward option {f'{name}.{option}'!r}: there is no such option of {name!r}; {has}")
        try:
            values[option] = own[option].parse(text)
        except ValueError as error:
            raise ValueError(f"reward option {f'{name}.{option}={text}'!r}: {error}") from error
    return values


def options_in_help():
    """The lines of --help about the options of rewards."""
    own = {f"{name}.{option}": one.meaning for name, known in REWARDS.items() for option, one in known.options.items()}
    lines = {**own, "NAME.dtype": DTYPE.meaning}
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in lines.items())


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
