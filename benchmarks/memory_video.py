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
"""Peak memory of a training step of video models, and which flags make it fit on a card.

    python benchmarks/memory_video.py        or, for a short test on a small model, with --quick

One video in bf16, guided, with the LoRA of a run without flags and the ViT-L/14 aesthetic reward of every frame. The text
encoders have been freed. Bytes are counted as in memory.py, on tensors without values, of the functions that training
calls: a step of the chain, a swept step, and decoding and scoring with their gradient. The reward is counted for one frame;
for all frames of a video a buffer of that size stands in for it, one frame at a time. Prints a table and the fewest flags that
fit, and writes memory_video.csv.
"""

import os
import platform
from typing import Any, Callable, NamedTuple, Optional

import torch
from bench_common import VERSIONS, make_parser, parse_benchmark, write_csv
from diffusion_models.cogvideox import CogVideoX
from diffusion_models.decoders import recompute_blocks
from diffusion_models.ltx import LTX
from diffusion_models.wan import Wan
from memory import copy_lora, peak_of, room_on
from operators import WAN_SMALL, add_run_lora, in_bf16
from reward_cost import PROMPT
from reward_cost import cases as reward_cases
from reward_models.base import WeightedSum
from reward_models.videos import PerFrame
from rlr_training.memory import GIB
from rlr_training.scoring import score_latents
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)


CARDS = (24, 80)
OFFLOAD, CHECKPOINTING, CHUNK = "--reward_offload", "--gradient_checkpointing", "--score_frames chunk"
# In the order in which they cost more: a little time, a forward of the network in each swept step, noise of the gradient.
FLAGS = [
    *([], [OFFLOAD], [CHECKPOINTING], [CHECKPOINTING, OFFLOAD]),
    *([CHUNK], [CHUNK, OFFLOAD], [CHUNK, CHECKPOINTING], [CHUNK, CHECKPOINTING, OFFLOAD]),
]

# For --quick.
TINY_WAN = {
    **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 32},
    **{"freq_dim": 16, "rope_max_seq_len": 32},
}
TINY_WAN_VAE = {"base_dim": 4, "num_res_blocks": 1}


class Part(NamedTuple):
    """A network: its class, and the entries of the Hub's config.json that are not the class's defaults."""

    make: Callable
    config: dict


class VideoModel(NamedTuple):
    """A model to count.

    Attributes:
        name: what the table calls it.
        family: that trains it.
        pipeline: its class.
        transformer, vae: `Part`s.
        scheduler: one that its chain takes; memory does not depend on it.
        conditions: {name: shape} of a prompt.
        sizes: (height, width, frames).
    """

    name: str
    family: Any
    pipeline: Callable
    transformer: Part
    vae: Part
    scheduler: Any
    conditions: dict
    sizes: list

    def load(self):
        """The `DiffusionModel` with a new LoRA, as a training run has it on its device."""
        transformer, vae = in_bf16(self.transformer), in_bf16(self.vae)
        add_run_lora(transformer, self.family)
        copy_lora(transformer)
        recompute_blocks(vae.decoder)
        parts = {"transformer": transformer, "vae": vae, "scheduler": self.scheduler}
        return self.family(self.pipeline(**parts, text_encoder=None, tokenizer=None))


def video_models(quick):
    """The `VideoModel`s of the table."""
    flow = FlowMatchEulerDiscreteScheduler()
    if quick:
        transformer, vae = Part(WanTransformer3DModel, TINY_WAN), Part(AutoencoderKLWan, TINY_WAN_VAE)
        conditions = {"prompt_embeds": (1, 7, 32)}
        return [VideoModel("tiny", Wan, WanPipeline, transformer, vae, flow, conditions, [(32, 32, 9)])]
    return [
        VideoModel(
            *("Wan 2.1 1.3B", Wan, WanPipeline),
            *(Part(WanTransformer3DModel, WAN_SMALL), Part(AutoencoderKLWan, {})),
            *(flow, {"prompt_embeds": (1, 512, 4096)}, [(480, 832, 33), (480, 832, 81)]),
        ),
        VideoModel(
            *("LTX-Video 0.9.0", LTX, LTXPipeline),
            *(Part(LTXVideoTransformer3DModel, {}), Part(AutoencoderKLLTXVideo, {})),
            flow,
            {"prompt_embeds": (1, 128, 4096), "prompt_attention_mask": (1, 128)},
            [(480, 704, 97), (512, 704, 161)],
        ),
        VideoModel(
            *("CogVideoX 2B", CogVideoX, CogVideoXPipeline),
            *(Part(CogVideoXTransformer3DModel, {}), Part(AutoencoderKLCogVideoX, {})),
            CogVideoXDDIMScheduler(prediction_type="v_prediction"),
            *({"prompt_embeds": (1, 226, 4096)}, [(480, 720, 49)]),
        ),
    ]


class ZeroNumbers(TorchDispatchMode):
    """Gives 0 for a number of a tensor without values, as the checks of rewards ask for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
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
        with ZeroNumbers():
            frame = torch.zeros(1, 3, *size[:2]).requires_grad_()
            torch.autograd.grad(reward(frame, [PROMPT]), frame)

    return peak_of(score)


def chain_of(model, conditions, size, num_steps):
    """The guided chain of a video."""
    prompt = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in conditions.items()}
    chain = model.make_chain(model.network, num_steps, size, guidance_scale=model.guidance_scale)
    return chain.conditioned_on(prompt, prompt)


def of_network(model, chain, shape):
    """GiB that a step of the rollout and a swept step add to the weights."""

    def sweep():
        mean = chain.mean(1, torch.zeros(shape).requires_grad_())
        torch.autograd.backward(mean, torch.zeros_like(mean))
        model.network.zero_grad()

    with torch.no_grad():
        rollout = peak_of(lambda: chain.mean(1, torch.zeros(shape)))
    return {"rollout_gib": rollout, "sweep_gib": peak_of(sweep)}


def of_decoder(decode, reward, shape):
    """GiB that decoding, and scoring every frame, with their gradient add to the weights."""
    rewards = WeightedSum({"reward": (1.0, PerFrame("reward", reward, "mean"))})

    def score():
        with ZeroNumbers():
            score_latents(lambda x_0, vae: decode(x_0), rewards, torch.zeros(shape), [PROMPT], 1, with_gradient=True)

    return peak_of(score)


def count(video, size, reward, num_steps):
    """Two rows for a size, without and with checkpointing."""
    model, rows = video.load(), []
    shape = model.latents_shape(1, size)
    chain = chain_of(model, video.conditions, size, num_steps)
    weights = {"transformer": model.network, "vae": model.pipeline.vae, "reward": reward}
    row = {"model": video.name, **dict(zip(("height", "width", "frames"), size))}
    row |= {f"{name}_gib": sum(p.nbytes for p in network.parameters()) / GIB for name, network in weights.items()}
    stand_in = StandIn(int(GIB * of_reward(reward, size)))
    decoding = {"decode_gib": of_decoder(model.decode, stand_in, shape), "decode_chunk_gib": None}
    if model.chunk_frames(size[2]) is not None:
        last = shape[2] - 1  # for which all others are decoded, too
        decoding["decode_chunk_gib"] = of_decoder(lambda x_0: model.decode_chunk(x_0, last), stand_in, shape)
    stored = {"stored_gib": (2 * num_steps + 1) * 4 * torch.Size(shape).numel() / GIB}
    for checkpointing in (False, True):
        if checkpointing:
            model.network.enable_gradient_checkpointing()
        added = of_network(model, chain, shape)
        rows.append({**row, "gradient_checkpointing": checkpointing, **added, **decoding, **stored})
        rows[-1]["peak_gib"] = peak(rows[-1])
        rows[-1]["peak_chunk_gib"] = peak(rows[-1], CHUNK)
    return rows


def peak(row, *flags) -> Optional[float]:
    """GiB at most, or `None` where the flags do not go with the model."""
    decoding = row["decode_chunk_gib" if CHUNK in flags else "decode_gib"]
    if decoding is None:
        return None
    network, decoding = max(row["rollout_gib"], row["sweep_gib"]), decoding + row["reward_gib"]
    if OFFLOAD not in flags:
        network += row["reward_gib"]
    return row["transformer_gib"] + row["vae_gib"] + row["stored_gib"] + max(network, decoding)


def recipes(rows):
    """Lines with the fewest flags with which each video fits on each card."""
    lines = []
    for plain, checkpointed in zip(rows[::2], rows[1::2]):
        for card in CARDS:
            recipe = "nothing fits"
            for flags in FLAGS:
                gib = peak(checkpointed if CHECKPOINTING in flags else plain, *flags)
                if gib is not None and gib <= room_on(card):
                    recipe = f"{' '.join(flags) or 'no flags'}, {gib:.1f} GiB"
                    break
            lines.append(f"{plain['model']:<16}{size_in_words(plain):<18}{card:>3} GB  {recipe}")
    return lines


def size_in_words(row):
    return f"{row['height']} x {row['width']} x {row['frames']}"


def print_table(rows):
    print(f"{'model':<16}{'size':<18}{'network':<14}{'weights':>9}{'rollout':>9}{'decoding':>10}{'chunk':>8}{'sweep':>8}"
          f"{'peak GiB':>10}{'with a chunk':>14}")  # fmt: skip
    for row in rows:
        weights = row["transformer_gib"] + row["vae_gib"] + row["reward_gib"]
        chunk, with_chunk = (
            "-" if row[name] is None else f"{row[name]:.2f}" for name in ("decode_chunk_gib", "peak_chunk_gib")
        )
        print(
            f"{row['model']:<16}{size_in_words(row):<18}"
            f"{'checkpointed' if row['gradient_checkpointing'] else 'plain':<14}{weights:>9.2f}{row['rollout_gib']:>9.2f}"
            f"{row['decode_gib']:>10.2f}{chunk:>8}{row['sweep_gib']:>8.2f}{row['peak_gib']:>10.2f}{with_chunk:>14}"
        )


def main(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="T, for the stored latents.")
    args = parse_benchmark(parser, input_args)
    reward, rows = load_reward(args.quick), []
    cases = [(video, size) for video in video_models(args.quick) for size in video.sizes]
    for video, size in tqdm(cases, desc="Videos"):
        rows += count(video, size, reward, args.num_inference_steps)
    header = (
        f"python benchmarks/memory_video.py{' --quick' if args.quick else ''}, {platform.machine()}, {VERSIONS}, T ="
        f" {args.num_inference_steps}, bf16, one video, counted, not computed"
    )
    print(header)
    print_table(rows)
    print("\n".join(recipes(rows)))
    write_csv(rows, os.path.join(args.out, "memory_video.csv"), header)
    return rows


if __name__ == "__main__":
    main()
