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
"""What a reward costs beyond its own network: time and memory for an image, beside a bare call of that network.

    python benchmarks/reward_cost.py        or, for a short test on small networks, with --quick

The networks have their full size and random weights, which do not change their speed. The images have 512 x 512 pixels.
Reward and bare network take turns in one process, so the load of the machine affects both. The ratio is the median of the
rounds' ratios, with the smallest and the largest. The bare network gets pixels of its own size and, where it reads prompts,
embeddings that are already computed. Prints a table and writes reward_cost.csv and reward_cost.png.
"""

import os
import statistics
import string
import tempfile
from functools import partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from bench_common import (
    TINY_CLIP,
    fast_garbage_collection,
    machine_name,
    make_parser,
    parse_benchmark,
    peak_memory,
    ratio_errors,
    ratios_of,
    seconds_in_turns,
    write_csv,
)
from matplotlib.figure import Figure
from reward_models.aesthetic import AestheticReward
from reward_models.base import ScoreHead
from reward_models.clip import ClipAgreement, preprocess_letterbox
from reward_models.hpsv2 import VIT_H_14, clip_config
from reward_models.imagereward import VIT_L_16, ImageReward
from tqdm import tqdm
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)


# The vision and the text tower of CLIP ViT-L/14.
CLIP_L_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L_WORDS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PROMPT = "a photo of a red squirrel riding a bicycle"


class Case(NamedTuple):
    """A reward, and its own network as a function of preprocessed pixels (B, 3, size, size)."""

    reward: torch.nn.Module
    network: object
    size: int


def clip_case(config, reward_of):
    clip = CLIPModel(config)
    return Case(
        reward_of(clip),
        lambda pixels: clip.get_image_features(pixel_values=pixels).pooler_output,
        config.vision_config.image_size,
    )


def imagereward_case(vit, bert):
    vision = BlipVisionModel(BlipVisionConfig(**vit, intermediate_size=4 * vit["hidden_size"]))
    config = BlipTextConfig(**bert, encoder_hidden_size=vit["hidden_size"], is_decoder=True, bos_token_id=None)
    text = BlipTextModel(config, add_pooling_layer=False)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
            letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
            file.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
        tokenizer = BertTokenizer.from_pretrained(folder)
    tokens = tokenizer([PROMPT], padding="max_length", max_length=35, truncation=True, return_tensors="pt")

    def network(pixels):
        device, count = pixels.device, len(pixels)
        states = vision(pixels).last_hidden_state
        ids, mask = (tokens[name].to(device).expand(count, -1) for name in ("input_ids", "attention_mask"))
        return text(input_ids=ids, attention_mask=mask, encoder_hidden_states=states).last_hidden_state[:, 0]

    return Case(ImageReward(vision, text, ScoreHead(bert["hidden_size"]), tokenizer), network, vit["image_size"])


def cases(quick):
    """{name: function that builds the `Case`}, so that one network at a time is in memory."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY_CLIP)
    tower, words = CLIP_L_TOWER, CLIP_L_WORDS
    vit_h, vit, bert = clip_config(VIT_H_14), VIT_L_16, {**words, "vocab_size": 30524}
    if quick:
        tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        words = tower
        vit = {**VIT_L_16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        bert = {**tower, "vocab_size": 64}
    vit_l = CLIPConfig(vision_config={**tower, "patch_size": 14}, text_config=words, projection_dim=768)
    for config in (vit_l, vit_h):  # they read the tokens of the embedded tokenizer
        config.text_config.update({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    if quick:
        vit_h = vit_l
    return {
        "aesthetic": lambda: clip_case(vit_l, lambda clip: AestheticReward(clip, ScoreHead(768))),
        "clip_score": lambda: clip_case(vit_l, lambda clip: ClipAgreement(clip, tokenizer)),
        "pickscore": lambda: clip_case(vit_h, lambda clip: ClipAgreement(clip, tokenizer, scale=100.0)),
        "hpsv2": lambda: clip_case(vit_h, lambda clip: ClipAgreement(clip, tokenizer, preprocess_letterbox)),
        "imagereward": lambda: imagereward_case(vit, bert),
    }


def call(function, images, with_gradient):
    """Call a function of images, and with `with_gradient` compute the gradient of its sum."""
    images = images.detach().requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        result = function(images)
        if with_gradient:
            torch.autograd.grad(result.sum(), images)


def measure(name, build, device, batch_size, resolution, rounds):
    """A row for the score, and one for the score with its gradient."""
    torch.manual_seed(0)
    case = build()
    reward = case.reward.to(device).eval().requires_grad_(False)
    images = torch.rand(batch_size, 3, resolution, resolution, device=device)
    pixels = torch.randn(batch_size, 3, case.size, case.size, device=device)
    rows = []
    for with_gradient in (False, True):
        calls = {
            "reward": partial(call, lambda x: reward(x, [PROMPT] * len(x)), images, with_gradient),
            "network": partial(call, case.network, pixels, with_gradient),
        }
        # The first round warms up, and encodes the prompt.
        seconds = {side: values[1:] for side, values in seconds_in_turns(calls, rounds + 1).items()}
        row = {"reward": name, "what": "score + gradient" if with_gradient else "score"}
        row.update(ratios_of(seconds["reward"], seconds["network"]))
        for side, run in calls.items():
            row[f"{side}_seconds"] = statistics.median(seconds[side]) / batch_size
            row[f"{side}_mib"] = peak_memory(run, images.device) / batch_size / 2**20
        rows.append(row)
    return rows


def print_table(rows):
    print(
        f"{'reward':<13}{'':<18}{'s / image':>10}{'network':>10}{'ratio':>8}{'range':>16}{'MiB / image':>14}{'network':>10}"
    )
    for row in rows:
        spread = f"{row['ratio_min']:.3f} - {row['ratio_max']:.3f}"
        print(
            f"{row['reward']:<13}{row['what']:<18}{row['reward_seconds']:>10.4f}{row['network_seconds']:>10.4f}"
            f"{row['ratio']:>8.3f}{spread:>16}{row['reward_mib']:>14.1f}{row['network_mib']:>10.1f}"
        )


def plot(rows, path):
    """Ratio of each reward's time to its network's, with the range of the rounds."""
    names = list(dict.fromkeys(row["reward"] for row in rows))
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for shift, what in ((-0.2, "score"), (0.2, "score + gradient")):
        own = [row for row in rows if row["what"] == what]
        places, ratios = [i + shift for i in range(len(names))], [row["ratio"] for row in own]
        axes.bar(places, ratios, 0.36, yerr=ratio_errors(own), capsize=3, label=what)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.axhline(1.1, color="black", lw=0.8, ls="--")
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="time, bare network = 1", ylim=(0.8, None))
    axes.set_title("What a reward adds to its own network")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="How often each reward and its network take turns.")
    parser.add_argument("--batch_size", type=int, default=2, help="Images at a time.")
    args = parse_benchmark(parser, input_args)
    device = PartialState().device
    rounds, resolution = (1, 64) if args.quick else (args.rounds, 512)
    rows = []
    with fast_garbage_collection():
        for name, build in tqdm(cases(args.quick).items(), desc="Rewards"):
            rows += measure(name, build, device, args.batch_size, resolution, rounds)
    header = (
        f"python benchmarks/reward_cost.py {'--quick' if args.quick else f'--rounds {rounds}'},"
        f" {machine_name(device.type == 'cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__},"
        f" {args.batch_size} images of {resolution} pixels, float32, seed 0"
    )
    print(header)
    print_table(rows)
    write_csv(rows, os.path.join(args.out, "reward_cost.csv"), header)
    plot(rows, os.path.join(args.out, "reward_cost.png"))
    return rows


if __name__ == "__main__":
    main()
