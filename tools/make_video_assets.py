#!/usr/bin/env python
# coding=utf-8
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
"""Train the video models in assets/ from scratch: a small Wan and a network that reads its videos.

    make video-assets

The data are the handwritten digits of scikit-learn, colored, as they move across a black background. Each stage is seeded,
takes minutes to an hour on one core, continues where it was stopped, and writes what it made to assets/, where the next
stage reads it.
"""

import argparse
import os

from video_models.cards import write_cards
from video_models.data import DigitVideos, write_prompts
from video_models.flow import train_flow
from video_models.reader import train_reader
from video_models.saving import save_pipeline, save_vae
from video_models.vae import train_vae


STAGES = ["prompts", "vae", "reader", "flow", "cards"]
# The steps of the trainings; the videos that are encoded for the transformer; those of the cards' figures, all in all and of
# each prompt; and the steps in which they are drawn.
SIZES = {
    **{"vae": 5_000, "reader": 1_500, "flow": 14_000},
    **{"latents": 32_000, "videos": 200, "seeds": 8, "drawing": 20},
}
QUICK = {"vae": 2, "reader": 2, "flow": 2, "latents": 100, "videos": 4, "seeds": 2, "drawing": 1}


def make(stage, digits, out, work_dir, sizes):
    """Make what one of the stages is for, and write it to `out`; `cards` measures and describes what is there."""
    state_file = os.path.join(work_dir, f"{stage}.pt")
    if stage == "prompts":
        write_prompts(os.path.join(out, "videos.txt"))
    elif stage == "vae":
        save_vae(train_vae(digits, state_file, sizes[stage]), out)
    elif stage == "reader":
        train_reader(digits, state_file, sizes[stage], out)
    elif stage == "flow":
        save_pipeline(train_flow(digits, state_file, sizes[stage], out, sizes["latents"]), out)
    else:
        write_cards(out, sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="What to make.")
    parser.add_argument("--out", default="assets", help="Where the models go. Default: assets.")
    parser.add_argument(
        "--work_dir", default="video-training", help="Where interrupted stages are kept. Default: video-training."
    )
    parser.add_argument(
        "--quick", action="store_true", help="Two steps of each stage, to try the script; needs --out and --work_dir."
    )
    args = parser.parse_args()
    if args.quick and (args.out == "assets" or args.work_dir == "video-training"):
        parser.error("--quick would replace the trained models: give it an --out and a --work_dir of its own")
    os.makedirs(args.work_dir, exist_ok=True)
    digits = DigitVideos()
    for stage in args.stages:
        make(stage, digits, args.out, args.work_dir, QUICK if args.quick else SIZES)


if __name__ == "__main__":
    main()
