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
"""Peak memory of a training step of large image and video models, and which flags make it fit on a card.

    python benchmarks/memory_models.py       or, for a short test on a small model, with --quick

In bf16, with the LoRA of a run without flags and the ViT-L/14 aesthetic reward, of every frame for videos. The text encoders
have been freed. Bytes are counted as in memory.py, on tensors without values, of the functions that training calls: a step of
the chain, a swept step, and decoding and scoring with their gradient. The reward is counted for one image; for all frames of a
video a buffer of that size stands in for it, one frame at a time. A batch takes the memory of its images; quantized, offloaded
and sharded weights are arithmetic on the counted ones. Prints tables and the fewest flags that fit, and writes
memory_models.csv.
"""

import os
import platform
from typing import NamedTuple

import torch
from bench_common import VERSIONS, make_parser, parse_benchmark, write_csv
from bench_models import counted_models, linear_bytes
from diffusion_models.quantize import BYTES
from memory import peak_of, room_on
from reward_cost import PROMPT
from reward_cost import cases as reward_cases
from reward_models.base import WeightedSum
from reward_models.videos import PerFrame
from rlr_training.memory import GIB
from rlr_training.scoring import score_latents
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm


CARDS = (8, 12, 16, 24, 48, 80)
RANKS = (1, 2, 4, 8)


class Setting(NamedTuple):
    """Flags of memory.

    Attributes:
        checkpointing, split, reward_offload, vae_offload, offload_blocks: whether the flags of these names are on.
        chunk: whether one chunk of a video is scored.
        quantize: --quantize.
        ranks: number of cards over which the blocks' weights are shared out with --shard.
    """

    checkpointing: bool = False
    split: bool = False
    reward_offload: bool = False
    vae_offload: bool = False
    offload_blocks: bool = False
    chunk: bool = False
    quantize: str = None
    ranks: int = 1

    def __str__(self):
        flags = {
            "--gradient_checkpointing": self.checkpointing and not self.offload_blocks,
            "--guidance_batching split": self.split,
            "--reward_offload": self.reward_offload,
            "--vae_offload": self.vae_offload,
            f"--quantize {self.quantize}": self.quantize is not None,
            "--offload_blocks": self.offload_blocks,
            "--score_frames chunk": self.chunk,
        }
        return " ".join(flag for flag, is_on in flags.items() if is_on) or "no flags"


OFFLOADED = {"reward_offload": True, "vae_offload": True}
# In the order in which they cost more: a little time, half a forward of the network in each swept step, a whole one, precision,
# copies of all weights for every call, noise of the gradient.
SETTINGS = [
    *(Setting(), Setting(**OFFLOADED)),
    *(Setting(split=True), Setting(split=True, **OFFLOADED)),
    *(Setting(checkpointing=True), Setting(checkpointing=True, **OFFLOADED)),
    *(Setting(checkpointing=True, split=True), Setting(checkpointing=True, split=True, **OFFLOADED)),
    *(Setting(checkpointing=True, quantize=kind) for kind in ("int8", "nf4")),
    *(Setting(checkpointing=True, split=True, quantize=kind, **OFFLOADED) for kind in ("int8", "nf4")),
    Setting(checkpointing=True, split=True, offload_blocks=True, **OFFLOADED),
    Setting(checkpointing=True, split=True, offload_blocks=True, quantize="int8", **OFFLOADED),
    Setting(checkpointing=True, split=True, offload_blocks=True, chunk=True, quantize="int8", **OFFLOADED),
]


class Numbers(TorchDispatchMode):
    """Gives a number where one is asked for of a tensor without values: as the checks of rewards and lengths of prompts do."""

    def __init__(self, number=0):
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.number
        return func(*args, **(kwargs or {}))


class StandIn(torch.nn.Module):
    """A reward on images that takes the memory of another one, and far fewer operators.

    Args:
        bytes: that the other one and its gradient take for a batch of images.
    """

    differentiable = True

    def __init__(self, bytes):
        super().__init__()
        self.bytes = bytes

    def forward(self, images, prompts):
        torch.empty(self.bytes, dtype=torch.uint8)
        return images.flatten(1).sum(1)


def load_reward(quick):
    """The aesthetic reward, whose weights are never written."""
    with torch.device("meta"):
        reward = reward_cases(quick)["aesthetic"]().reward
    reward.clip.text_model = reward.clip.text_projection = None
    return reward.eval().requires_grad_(False).to_empty(device="cpu")


def of_reward(reward, size):
    """GiB that the score of a frame and its gradient add to the weights."""

    def score():
        with Numbers():
            frame = torch.zeros(1, 3, *size[:2]).requires_grad_()
            torch.autograd.grad(reward(frame, [PROMPT]), frame)

    return peak_of(score)


def of_network(counted, model, size, num_steps, is_split):
    """GiB that a step of the rollout and a swept step add to the weights."""
    chain, shape = counted.conditioned(model, size, num_steps, is_split), model.latents_shape(1, size)
    length = counted.conditions["prompt_embeds"][1]

    def sweep():
        with Numbers(length):
            mean = chain.mean(1, torch.zeros(shape).requires_grad_())
            torch.autograd.backward(mean, torch.zeros_like(mean))
        model.network.zero_grad()

    def roll_out():
        with torch.no_grad(), Numbers(length):
            chain.mean(1, torch.zeros(shape))

    return peak_of(roll_out), peak_of(sweep)


def of_decoder(decode, reward, shape, is_video):
    """GiB that decoding, and scoring the image or every frame, with their gradient add to the weights."""
    rewards = WeightedSum({"reward": (1.0, PerFrame("reward", reward, "mean") if is_video else reward)})

    def score():
        with Numbers():
            score_latents(lambda x_0, vae: decode(x_0), rewards, torch.zeros(shape), [PROMPT], 1, with_gradient=True)

    return peak_of(score)


def count(counted, size, reward, num_steps):
    """The row of a model at a size."""
    model = counted.load()
    shape, blocks = model.latents_shape(1, size), [sum(p.nbytes for p in one.parameters()) for one in model.blocks]
    row = {"model": counted.name, **dict(zip(("height", "width", "frames"), (*size, None)[:3]))}
    weights = {"network": model.network, "vae": model.pipeline.vae, "reward": reward}
    row |= {f"{name}_gib": sum(p.nbytes for p in one.parameters()) / GIB for name, one in weights.items()}
    linear, largest = linear_bytes(model.network)
    row |= {"linear_gib": linear / GIB, "largest_linear_gib": largest / GIB}
    row |= {"blocks_gib": sum(blocks) / GIB, "largest_block_gib": max(blocks) / GIB}
    row["stored_gib"] = (2 * num_steps + 1) * 4 * torch.Size(shape).numel() / GIB
    stand_in, is_video = StandIn(int(GIB * of_reward(reward, size))), len(size) == 3
    row |= {"decode_gib": of_decoder(model.decode, stand_in, shape, is_video), "decode_chunk_gib": None}
    if is_video and model.chunk_frames(size[2]) is not None:
        last = shape[2] - 1  # for which all others are decoded, too
        row["decode_chunk_gib"] = of_decoder(lambda x_0: model.decode_chunk(x_0, last), stand_in, shape, is_video)
    for checkpointing in (False, True):
        if checkpointing:
            model.network.enable_gradient_checkpointing()
        for is_split in (False, True) if counted.is_guided else (False,):
            row["rollout_gib"], row[sweep_name(checkpointing, is_split)] = of_network(
                *(counted, model, size, num_steps, is_split)
            )
    return row


def sweep_name(checkpointing, is_split):
    """The column of a swept step."""
    return f"sweep{'_checkpointed' if checkpointing else ''}{'_split' if is_split else ''}_gib"


def network_gib(row, setting):
    """GiB of the network's weights, and of what is brought for a block beside them."""
    smaller = BYTES.get(setting.quantize, 2.0) / 2.0  # bf16 has two
    saved, brought = row["linear_gib"] * (1 - smaller), 0.0 if smaller == 1 else row["largest_linear_gib"]
    # Nearly all weights of a block are linear.
    blocks, block = row["blocks_gib"] * smaller, row["largest_block_gib"] * smaller
    if setting.offload_blocks:
        return row["network_gib"] - saved - blocks + block + brought
    if setting.ranks > 1:  # a block is gathered while the one before it computes
        return row["network_gib"] - saved - blocks + blocks / setting.ranks + 2 * block + brought
    return row["network_gib"] - saved + brought


def peak(row, setting, batch=1):
    """GiB at most, or `None` where the setting does not go with the model."""
    decoding = row["decode_chunk_gib" if setting.chunk else "decode_gib"]
    sweep = row.get(sweep_name(setting.checkpointing, setting.split))
    if decoding is None or sweep is None:
        return None
    always, scoring = network_gib(row, setting) + batch * row["stored_gib"], decoding
    for name, is_offloaded in (("vae_gib", setting.vae_offload), ("reward_gib", setting.reward_offload)):
        always, scoring = (always, scoring + row[name]) if is_offloaded else (always + row[name], scoring)
    return always + max(batch * sweep, batch * row["rollout_gib"], scoring)


def recipe(row, card, ranks=1):
    """The fewest flags with which an image or video fits on each of some cards, and its peak."""
    is_guided = row.get(sweep_name(False, True)) is not None
    for setting in SETTINGS:
        setting = setting._replace(ranks=ranks, split=setting.split and is_guided)
        gib = None if ranks > 1 and (setting.offload_blocks or setting.quantize) else peak(row, setting)
        if gib is not None and gib <= room_on(card):
            batch = max(b for b in (1, 2, 4, 8, 16, 32) if peak(row, setting, b) <= room_on(card))
            return f"{setting}, {gib:.1f} GiB" + (f", up to batch {batch}" if batch > 1 else "")
    return "nothing fits"


def recipes(rows):
    """Lines with the fewest flags for each size and card, and for the largest models on several cards."""
    for row in rows:
        for card in CARDS:
            yield f"{row['model']:<16}{size_in_words(row):<18}{card:>3} GB  {recipe(row, card)}"
    for row in rows:
        for ranks in RANKS[1:]:
            yield f"{row['model']:<16}{size_in_words(row):<18}{ranks} x 24 GB, --shard  {recipe(row, 24, ranks)}"


def size_in_words(row):
    return " x ".join(str(row[name]) for name in ("height", "width", "frames") if row[name] is not None)


def print_table(rows):
    columns = ("weights", "rollout", "decoding", "chunk", "sweep", "split", "checkp.", "both")
    print(f"{'model':<16}{'size':<18}" + "".join(f"{name:>10}" for name in columns))
    for row in rows:
        weights = row["network_gib"] + row["vae_gib"] + row["reward_gib"]
        sweeps = [
            row.get(sweep_name(*setting)) for setting in ((False, False), (False, True), (True, False), (True, True))
        ]
        values = (weights, row["rollout_gib"], row["decode_gib"], row["decode_chunk_gib"], *sweeps)
        cells = (f"{'-' if value is None else f'{value:.2f}':>10}" for value in values)
        print(f"{row['model']:<16}{size_in_words(row):<18}" + "".join(cells))


def main(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="T, for the stored latents.")
    args = parse_benchmark(parser, input_args)
    reward, rows = load_reward(args.quick), []
    cases = [(model, size) for model in counted_models(args.quick) for size in model.sizes]
    for model, size in tqdm(cases, desc="Models"):
        rows.append(count(model, size, reward, args.num_inference_steps))
    header = (
        f"python benchmarks/memory_models.py{' --quick' if args.quick else ''}, {platform.machine()}, {VERSIONS}, T ="
        f" {args.num_inference_steps}, bf16, one image or video, counted, not computed"
    )
    print(header)
    print_table(rows)
    print("\n".join(recipes(rows)))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(
        [{name: row.get(name) for name in columns} for row in rows],
        os.path.join(args.out, "memory_models.csv"),
        header,
    )
    return rows


if __name__ == "__main__":
    main()
