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
"""The rewards that there are, and their options, without importing their modules."""

import math
from typing import Callable, NamedTuple, Optional
from urllib.parse import urlsplit

import torch


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


def address(text):
    """The type of the option `url`."""
    problem = "must be of the form http://HOST:PORT/NAME"
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.path.strip("/") and parts.port != 0
    except ValueError:  # such as for a port that is no number
        is_address = False
    if not is_address or not text.isprintable() or " " in text or parts.query or parts.fragment:
        raise ValueError(problem)
    if parts.username is not None:
        raise ValueError("must hold no password: the environment variable RLR_REWARD_TOKEN is for that")
    return text.rstrip("/")


def one_of(*values):
    """The type of an option that has one of some values."""

    def parse(text):
        if text not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return text

    return parse


def seconds(text):
    """The type of an option that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 86400:
        raise ValueError("must be a number of seconds above 0, and at most a day")
    return value


class KnownReward(NamedTuple):
    """Description of a reward, available without importing its module.

    Attributes:
        source: "module:attribute". The attribute is a loader `(path, revision, device, dtype, **options) -> reward`, or the
            reward itself if it has no files and no options.
        reads_prompts: whether the score depends on the prompt.
        meaning: what the reward measures, and the usual range of its scores.
        options: {name: `Option`} beside `dtype`, which all that have networks take.
        dtype: precision of its networks, `None` without any.
        has_labels: whether what follows the @ tells several of them apart, and is no revision. The loader gets the whole name.
    """

    source: str
    reads_prompts: bool
    meaning: str
    options: dict = {}
    dtype: Optional[torch.dtype] = torch.float32
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
        "ocr:ocr",
        True,
        "share of the quoted text in the prompt that rapidocr reads in the image, 0 to 1; no gradient",
        dtype=None,
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
    "remote": KnownReward(
        "remote:load",
        True,
        "the score of a server, see --serve; several are remote@A, remote@B; no gradient",
        options={
            "url": Option(address, "its address, http://HOST:PORT/NAME; of remote@A it is remote@A.url"),
            "format": Option(one_of("png", "raw"), "how images are sent: png (8 bits, default) or raw (float32)"),
            "timeout": Option(seconds, "seconds that a request may take (default: 60)"),
        },
        dtype=None,
        has_labels=True,
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
    "motion": KnownReward(
        "motion:motion", False, "how much consecutive frames of a video differ, 0 (still) to 1", dtype=None
    ),
    "jpeg_compressibility": KnownReward(
        "jpeg:jpeg_compressibility", False, "negative size in kB as a JPEG of quality 95; no gradient", dtype=None
    ),
    "jpeg_incompressibility": KnownReward(
        "jpeg:jpeg_incompressibility", False, "size in kB as a JPEG of quality 95; no gradient", dtype=None
    ),
}


def known_reward(name):
    """The `KnownReward` of a name, which may have a label, or `None`."""
    kind, at, _ = name.partition("@")
    known = REWARDS.get(kind)
    return None if known is None or at and not known.has_labels else known


def parse_options(name, options):
    """The values of a known reward's options {name: text}.

    Raises:
        ValueError: if it has no such option, or the option no such value. The message names them.
    """
    known, values = known_reward(name), {}
    own = {**({} if known.dtype is None else {"dtype": DTYPE}), **known.options}
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
