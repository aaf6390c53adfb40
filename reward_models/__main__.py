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
"""Score pictures: python -m reward_models --reward pickscore,hpsv2 IMAGES... --prompt "a fox in the snow" """

import argparse
import json
import statistics
import sys

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from . import REWARDS, load_rewards, parse_reward, parse_reward_paths


def parse_args(input_args=None):
    width = max(map(len, REWARDS))
    parser = argparse.ArgumentParser(
        prog="python -m reward_models",
        description="Score pictures with one or more rewards. They are scored one at a time, so they may be of any sizes.",
        epilog="rewards, higher is better:\n"
        + "\n".join(f"  {name:<{width}}  {known.meaning}" for name, known in REWARDS.items())
        + "\n  anything else is one of your own, package.module:callable or path/to/file.py:callable",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Picture files.")
    parser.add_argument(
        "--reward",
        required=True,
        help="NAME[@REVISION][:WEIGHT], or several with commas between; their weighted sum is the total.",
    )
    parser.add_argument(
        "--reward_path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="Local folder of a reward's model instead of the Hub's; may be repeated.",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="The prompt of all pictures.")
    prompts.add_argument("--prompts", metavar="FILE", help="A text file with the prompt of each picture, one a line.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    return parser.parse_args(input_args)


def prompts_of(args, names):
    """One prompt per image.

    Raises:
        ValueError: if the file has another number of lines, or there is none and a reward reads it.
    """
    if args.prompts is not None:
        with open(args.prompts, encoding="utf-8") as file:
            prompts = file.read().splitlines()
        if len(prompts) != len(args.images):
            raise ValueError(f"{args.prompts!r} has {len(prompts)} lines for {len(args.images)} images")
        return prompts
    readers = [name for name in names if name not in REWARDS or REWARDS[name].reads_prompts]
    if args.prompt is None and readers:
        raise ValueError(f"reward {readers[0]!r} may read the prompt: give --prompt or --prompts")
    return [args.prompt or ""] * len(args.images)


def open_image(path):
    """The picture, whose pixels are read when they are asked for.

    Raises:
        ValueError: naming the file, if it is missing or no picture.
    """
    try:
        picture = Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path!r} cannot be opened as a picture: {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path!r} has more than 8 bits a channel ({picture.mode}): convert it first")
    return picture


def read_image(path):
    """The picture as (1, 3, H, W) in [0, 1].

    Raises:
        ValueError: naming the file, if it is missing, damaged or no picture.
    """
    picture = open_image(path)
    try:
        pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def table(rows, names):
    """The scores as lines of text, with mean and standard deviation below where there is more than one."""
    columns = {name: [row["scores"][name] for row in rows] for name in names}
    if len(names) > 1:
        columns["total"] = [row["total"] for row in rows]
    labels = [row["image"] for row in rows]
    if len(rows) > 1:
        labels += ["mean", "standard deviation"]
        columns = {name: [*v, statistics.mean(v), statistics.stdev(v)] for name, v in columns.items()}
    width = max(map(len, labels))
    lines = ["  ".join([" " * width, *(f"{name:>10}" for name in columns)])]
    for i, label in enumerate(labels):
        cells = (f"{values[i]:>{max(10, len(name))}.4f}" for name, values in columns.items())
        lines.append("  ".join([f"{label:<{width}}", *cells]))
    return "\n".join(lines)


def main(args):
    try:
        terms = parse_reward(args.reward)
        prompts = prompts_of(args, terms)
        for path in args.images:
            open_image(path).close()  # all before the first is scored
        device = PartialState().device
        rewards = load_rewards(
            terms, parse_reward_paths(args.reward_path), device=device, prompts=(prompts[0], prompts[-1])
        )
        rows = []
        for path, prompt in zip(tqdm(args.images, desc="Images"), prompts):
            scores = rewards(read_image(path).to(device), [prompt])
            members = {name: score.item() for name, score in scores.members.items()}
            rows.append({"image": path, "prompt": prompt, "scores": members, "total": scores.total.item()})
    except (ValueError, OSError) as error:
        sys.exit(f"python -m reward_models: error: {' '.join(str(error).split())}")
    print(json.dumps(rows, indent=2) if args.json else table(rows, list(terms)))


if __name__ == "__main__":
    main(parse_args())
