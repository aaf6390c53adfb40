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
"""Score images, or videos, from the command line:

python -m reward_models --reward pickscore,hpsv2 IMAGES... --prompt "a fox in the snow"
python -m reward_models --reward pickscore,motion --videos VIDEOS... --prompt "a fox runs through the snow"
python -m reward_models --serve aesthetic,pickscore --port 8000
"""

import argparse
import json
import statistics
import sys

from . import (
    REWARDS,
    check_options,
    known_reward,
    load_rewards,
    options_in_help,
    parse_reward,
    parse_reward_options,
    parse_reward_paths,
)
from .videos import REDUCTIONS


def parse_args(input_args=None):
    width = max(map(len, REWARDS))
    parser = argparse.ArgumentParser(
        prog="python -m reward_models",
        description="Score images or videos with one or more rewards. They are scored one at a time and may differ in"
        " size.",
        epilog="rewards (higher is better):\n"
        + "\n".join(f"  {name:<{width}}  {known.meaning}" for name, known in REWARDS.items())
        + "\n\nyour own reward: package.module:callable or path/to/file.py:callable"
        + "\n\noptions, for --reward_option:\n"
        + options_in_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="Image files. Transparent parts are white; of animations the first frame counts. With --videos, videos.",
    )
    parser.add_argument(
        "--videos",
        action="store_true",
        help="Score videos: animations (GIF, WebP), video files (MP4 and others, which need imageio and"
        " imageio-ffmpeg), or folders of frames.",
    )
    parser.add_argument(
        "--frame_reduction",
        choices=REDUCTIONS,
        default="mean",
        help="How the scores that a reward on images gives to the frames of a video become one (default: mean).",
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="Frames per second of the videos, for rewards that need it (default: as in the file).",
    )
    parser.add_argument(
        "--reward",
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
    parser.add_argument(
        "--reward_option",
        action="append",
        default=[],
        metavar="NAME.OPTION=VALUE",
        help="An option of a reward, see below; may be repeated.",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", help="Prompt of all images (default: none; required by rewards that read the prompt)."
    )
    prompts.add_argument("--prompts", metavar="FILE", help="Text file with one prompt per line, one for each image.")
    parser.add_argument("--json", action="store_true", help="Print JSON (default: print a table).")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--serve",
        metavar="NAMES",
        help="Instead of scoring images, answer requests for these rewards, one process for each, at"
        " http://HOST:PORT/NAME. A training scores with it by --reward remote --reward_option remote.url=http://HOST:PORT/NAME.",
    )
    server.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to listen at (default: this machine alone). Others need a token in the environment variable"
        " RLR_REWARD_TOKEN, here and where images are sent from.",
    )
    server.add_argument("--port", type=int, default=8000, help="Port to listen at (default: 8000).")
    server.add_argument("--max_body_mb", type=float, default=64, help="Largest request in MB (default: 64).")
    args = parser.parse_args(input_args)
    if args.serve is None and not (args.reward and args.images):
        parser.error("give images and --reward, or --serve")
    if args.serve is not None and (args.reward or args.images):
        parser.error("--serve scores no images of its own: give it without images and --reward")
    return args


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
            kind = "videos" if args.videos else "images"
            raise ValueError(f"{args.prompts!r} has {len(prompts)} lines for {len(args.images)} {kind}")
        return prompts
    known = {name: known_reward(name) for name in names}
    readers = [name for name in names if known[name] is None or known[name].reads_prompts]
    if args.prompt is None and readers:
        raise ValueError(f"reward {readers[0]!r} may read the prompt: give --prompt or --prompts")
    return [args.prompt or ""] * len(args.images)


def format_table(rows, names):
    """Format the scores as lines of text. Two or more rows also get their mean and standard deviation."""
    columns = {name: [row["scores"][name] for row in rows] for name in names}
    if len(names) > 1:
        columns["total"] = [row["total"] for row in rows]
    labels = [row.get("image", row.get("video")) for row in rows]
    if len(rows) > 1:
        labels += ["mean", "standard deviation"]
        columns = {name: [*v, statistics.mean(v), statistics.stdev(v)] for name, v in columns.items()}
    width = max(map(len, labels))
    lines = ["  ".join([" " * width, *(f"{name:>10}" for name in columns)])]
    for i, label in enumerate(labels):
        cells = (f"{values[i]:>{max(10, len(name))}.4f}" for name, values in columns.items())
        lines.append("  ".join([f"{label:<{width}}", *cells]))
    return "\n".join(lines)


def read(path, args):
    """Read an image (1, 3, H, W), or with --videos a video (1, F, 3, H, W), and its number of frames per second.

    Raises:
        ValueError: if it cannot be read.
    """
    # Imported here so that --help and argument errors are fast.
    from .images import read_image
    from .video_files import read_video

    if not args.videos:
        return read_image(path), None
    video, fps = read_video(path)
    return video, args.fps or fps


def score(path, prompt, rewards, args, device):
    """Score one image or video. Returns its row of the result."""
    pixels, fps = read(path, args)
    rewards.set_fps(fps)
    scores = rewards(pixels.to(device), [prompt])
    members = {name: score.item() for name, score in scores.members.items()}
    kind = "video" if args.videos else "image"
    return {kind: path, "prompt": prompt, "scores": members, "total": scores.total.item()}


def main(args):
    try:
        if args.serve is not None:
            from .serving import serve

            return serve(args)
        score_all(args)
    except (ValueError, OSError) as error:
        sys.exit(f"python -m reward_models: error: {' '.join(str(error).split())}")


def score_all(args):
    """Score the images or videos and print the result."""
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from .images import open_image

    terms = parse_reward(args.reward)
    prompts, options = read_prompts(args, terms), parse_reward_options(args.reward_option)
    check_options(options, terms)
    for path in [] if args.videos else args.images:
        open_image(path).close()  # report an unreadable file before any image is scored
    first, fps = read(args.images[0], args)
    device, ends = PartialState().device, (prompts[0], prompts[-1])
    rewards = load_rewards(
        *(terms, parse_reward_paths(args.reward_path)),
        options=options,
        device=device,
        size=(*first.shape[-2:], *first.shape[1:-3]),
        prompts=ends,
        frame_reduction=args.frame_reduction,
        fps=fps,
    )
    paths = tqdm(args.images, desc="Videos" if args.videos else "Images")
    rows = [score(path, prompt, rewards, args, device) for path, prompt in zip(paths, prompts)]
    print(json.dumps(rows, indent=2) if args.json else format_table(rows, list(terms)))


if __name__ == "__main__":
    main(parse_args())
