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
"""What a reward costs beyond its own network: seconds and memory per picture beside a bare call of that network.

    python benchmarks/reward_cost.py        or, on small networks to see that it runs, with --quick

The networks have their full size and random weights, which do not change speed, and the pictures 512 x 512 pixels. The
reward and the bare network take turns in one process, so that the load of the machine falls on both; the ratio is the
median of the rounds' ratios, with the smallest and the largest. The bare network sees pixels of its own size and, where
it reads prompts, embeddings that are there already. Prints a table and writes reward_cost.csv and reward_cost.png.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import string
import sys
import tempfile
import time
from typing import NamedTuple

import torch
from accelerate import PartialState
from matplotlib.figure import Figure
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


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from gradient_quality import parse_benchmark, write_csv  # noqa: E402
from reward_models.aesthetic import AestheticReward  # noqa: E402
from reward_models.base import ScoreHead  # noqa: E402
from reward_models.clip import ClipAgreement, preprocess_letterbox  # noqa: E402
from reward_models.hpsv2 import VIT_H_14, clip_config  # noqa: E402
from reward_models.imagereward import VIT_L_16, ImageReward  # noqa: E402


PROMPT = "a photo of a red squirrel riding a bicycle"


class Case(NamedTuple):
    """A reward and its own network, as a function of pixels (B, 3, size, size) that are prepared already."""

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
    """{name: a function that builds the Case}; one network at a time is in memory."""
    tokenizer = CLIPTokenizer.from_pretrained(os.path.join(ROOT, "assets", "tiny-aesthetic", "clip"))
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    words = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vit_h, vit, bert = clip_config(VIT_H_14), VIT_L_16, {**words, "vocab_size": 30524}
    if quick:
        tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        words = tower
        vit = {**VIT_L_16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        bert = {**tower, "vocab_size": 64}
    vit_l = CLIPConfig(vision_config={**tower, "patch_size": 14}, text_config=words, projection_dim=768)
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
    """The function of the images, or that and the gradient of its sum."""
    images = images.detach().requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        result = function(images)
        if with_gradient:
            torch.autograd.grad(result.sum(), images)


def seconds_of(run):
    """How long `run()` takes, until the device is done with it."""
    started = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def resident(name):
    """VmRSS, the bytes that this process has in memory, or VmHWM, the most it had since its peak was last reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def peak_memory(run, device):
    """Bytes in use at the most during `run()`, beyond those before: the allocator's on a GPU, resident ones on a CPU."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        return torch.accelerator.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier calls have freed is there to be used again unseen
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure(name, build, device, batch_size, resolution, rounds, bar):
    """A row for the score and one for the score with its gradient."""
    torch.manual_seed(0)
    case = build()
    reward = case.reward.to(device).eval().requires_grad_(False)
    images = torch.rand(batch_size, 3, resolution, resolution, device=device)
    pixels = torch.randn(batch_size, 3, case.size, case.size, device=device)
    sides = {
        "reward": (lambda x: reward(x, [PROMPT] * len(x)), images),
        "network": (case.network, pixels),
    }
    rows = []
    for with_gradient in (False, True):
        seconds = {side: [] for side in sides}
        for i in range(rounds + 1):  # the first warms up, and has the prompt encoded
            for side in sorted(sides, reverse=i % 2 == 0):
                seconds[side].append(seconds_of(lambda: call(*sides[side], with_gradient)))
            bar.update()
        ratios = [a / b for a, b in zip(seconds["reward"][1:], seconds["network"][1:])]
        row = {"reward": name, "what": "score + gradient" if with_gradient else "score"}
        row["ratio"], row["ratio_min"], row["ratio_max"] = statistics.median(ratios), min(ratios), max(ratios)
        for side in sides:
            row[f"{side}_seconds"] = statistics.median(seconds[side][1:]) / batch_size
            peak = peak_memory(lambda: call(*sides[side], with_gradient), images.device)
            row[f"{side}_mib"] = peak / batch_size / 2**20
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
        chosen = [row for row in rows if row["what"] == what]
        ratios = [row["ratio"] for row in chosen]
        spread = [
            [row["ratio"] - row["ratio_min"] for row in chosen],
            [row["ratio_max"] - row["ratio"] for row in chosen],
        ]
        axes.bar([i + shift for i in range(len(names))], ratios, 0.36, yerr=spread, capsize=3, label=what)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.axhline(1.1, color="black", lw=0.8, ls="--")
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="time, bare network = 1", ylim=(0.8, None))
    axes.set_title("What a reward adds to its own network")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each reward and its network.")
    parser.add_argument("--batch_size", type=int, default=2, help="Pictures at a time.")
    args = parse_benchmark(parser, input_args)
    device = PartialState().device
    rounds, resolution = (1, 64) if args.quick else (args.rounds, 512)

    built, rows = cases(args.quick), []
    with tqdm(total=2 * len(built) * (rounds + 1), desc="Rounds") as bar:
        for name, build in built.items():
            rows += measure(name, build, device, args.batch_size, resolution, rounds, bar)
    machine = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name()
    header = (
        f"python benchmarks/reward_cost.py {'--quick' if args.quick else f'--rounds {rounds}'}, {machine},"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, {args.batch_size} pictures of {resolution}"
        " pixels, float32, seed 0"
    )
    print(header)
    print_table(rows)
    write_csv(rows, os.path.join(args.out, "reward_cost.csv"), header)
    plot(rows, os.path.join(args.out, "reward_cost.png"))
    return rows


if __name__ == "__main__":
    main()
