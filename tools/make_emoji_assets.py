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
"""Train the emoji models in assets/ from scratch: a small Stable Diffusion, a small Stable Diffusion 3,
their CLIP, an aesthetic head, a classifier.

    make emoji-assets

The data are the emoji in assets/emoji. Each stage is seeded, takes ten minutes to an hour on two cores, continues where it
was stopped, and writes what it made to assets/, where the next stage reads it.
"""

import argparse
import os

from emoji_models.cards import write_cards, write_flow_card
from emoji_models.classifier import train_classifier
from emoji_models.clip import train_clip
from emoji_models.data import EmojiImages
from emoji_models.flow import train_flow
from emoji_models.saving import save_clip, save_flow_pipeline, save_pipeline, save_vae
from emoji_models.unet import train_unet
from emoji_models.vae import load_vae, train_decoder, train_vae


STAGES = ["vae", "decoder", "clip", "classifier", "unet", "flow", "cards"]
# The steps of the trainings; the images that are encoded for the U-Net; and those of the cards' figures: of prompts of all
# kinds, and of each concept without style and background.
SIZES = {
    **{"vae": 20_000, "decoder": 12_000, "clip": 2_500, "classifier": 1_500, "unet": 12_000, "flow": 14_000},
    **{"latents": 64_000, "images": 500, "seeds": 8},
}
QUICK = {
    "vae": 2,
    "decoder": 2,
    "clip": 2,
    "classifier": 2,
    "unet": 2,
    "flow": 2,
    "latents": 100,
    "images": 8,
    "seeds": 2,
}


def make(stage, emoji, out, work_dir, sizes):
    """Train one of the models and write it to `out`; `cards` measures and describes what is there."""
    state_file = os.path.join(work_dir, f"{stage}.pt")
    if stage == "vae":
        save_vae(train_vae(emoji, state_file, sizes[stage]), out)
    elif stage == "decoder":
        save_vae(train_decoder(load_vae(out), emoji, state_file, sizes[stage]), out)
    elif stage == "clip":
        save_clip(*train_clip(emoji, state_file, sizes[stage]), out)
    elif stage == "classifier":
        train_classifier(emoji, state_file, sizes[stage], out)
    elif stage == "unet":
        save_pipeline(train_unet(emoji, state_file, sizes[stage], out, sizes["latents"]), out)
    elif stage == "flow":
        save_flow_pipeline(train_flow(emoji, state_file, sizes[stage], out, sizes["latents"]), out)
    else:
        write_cards(emoji, out, work_dir, sizes)
        write_flow_card(emoji, out, sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="What to make.")
    parser.add_argument("--emoji", default="assets/emoji", help="Folder of the source images. Default: assets/emoji.")
    parser.add_argument("--out", default="assets", help="Where the models go. Default: assets.")
    parser.add_argument(
        "--work_dir", default="emoji-training", help="Where interrupted stages are kept. Default: emoji-training."
    )
    parser.add_argument(
        "--quick", action="store_true", help="Two steps of each stage, to try the script; needs --out and --work_dir."
    )
    args = parser.parse_args()
    if args.quick and (args.out == "assets" or args.work_dir == "emoji-training"):
        parser.error("--quick would replace the trained models: give it an --out and a --work_dir of its own")
    os.makedirs(args.work_dir, exist_ok=True)
    emoji = EmojiImages(args.emoji)
    for stage in args.stages:
        make(stage, emoji, args.out, args.work_dir, QUICK if args.quick else SIZES)


if __name__ == "__main__":
    main()
