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
"""Score images from the command line:

python -m reward_models --reward pickscore,hpsv2 IMAGES... --prompt "a fox in the snow"
"""

import argparse
import json
import statistics
import sys

from . import REWARDS, load_rewards, parse_reward, parse_reward_paths


def parse_args(input_args=None):
    width = max(map(len, REWARDS))
    parser = argparse.ArgumentParser(
        prog="python -m reward_models",
        description="Score images with one or more rewards. Images are scored one at a time and may differ in size.",
        epilog="rewards (higher is better):\n"
        + "\n".join(f"  {name:<{width}}  {known.meaning}" for name, known in REWARDS.items())
        + "\n\nyour own reward: package.module:callable or path/to/file.py:callable",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="Image files. Transparent parts are white; of animations the first frame counts.",
    )
    parser.add_argument(
        "--reward",
        required=True,
        help="NAME[@REVISION][:WEIGHT], or several separated by commas; the total is their weighted sum. The default"
        " weight is 1, the default revision is the main branch of the reward's Hub repository.",
    )
    parser.add_argument(
        "--reward_path",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="Local folder with the files of a reward; may be repeated (default: download them from the Hub).",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", help="Prompt of all images (default: none; required by rewards that read the prompt)."
    )
    prompts.add_argument("--prompts", metavar="FILE", help="Text file with one prompt per line, one for each image.")
    parser.add_argument("--json", action="store_true", help="Print JSON (default: print a table).")
    return parser.parse_args(input_args)


def read_prompts(args, names):
    """Return one prompt per image.

    Raises:
        ValueError: if the number of lines in the file is not the number of images, or a reward needs prompts and none
            are given.
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


def format_table(rows, names):
    """Format the scores as lines of text. Two or more images also get their mean and standard deviation."""
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
    # Imported here so that --help and argument errors are fast.
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from .images import open_image, read_image

    try:
        terms = parse_reward(args.reward)
        prompts = read_prompts(args, terms)
        for path in args.images:
            open_image(path).close()  # report an unreadable file before any image is scored
        device, size = PartialState().device, read_image(args.images[0]).shape[-2:]
        paths, ends = parse_reward_paths(args.reward_path), (prompts[0], prompts[-1])
        rewards = load_rewards(terms, paths, device=device, size=size, prompts=ends)
        rows = []
        for path, prompt in zip(tqdm(args.images, desc="Images"), prompts):
            scores = rewards(read_image(path).to(device), [prompt])
            members = {name: score.item() for name, score in scores.members.items()}
            rows.append({"image": path, "prompt": prompt, "scores": members, "total": scores.total.item()})
    except (ValueError, OSError) as error:
        sys.exit(f"python -m reward_models: error: {' '.join(str(error).split())}")
    print(json.dumps(rows, indent=2) if args.json else format_table(rows, list(terms)))


if __name__ == "__main__":
    main(parse_args())
