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
"""Peak memory of a training step of SD 1.4 at 512 x 512, by batch size and precision, and what fits on a card.

    python benchmarks/memory.py              or, for a short test at small sizes, with --quick
    python benchmarks/memory.py --measure    also runs one step of full_bp through 50 denoising steps, which takes half an
                                             hour on one core of a CPU

The real networks run at full size on tensors without values: the bytes of every tensor are counted from its creation to its
release, and nothing is computed. The sum is what a GPU's allocator is asked for. Its rounding and fragmentation, the
workspaces of convolutions and the context of the GPU come on top; the recipes leave 1.5 GiB and a tenth of the card for them.
Rollout, decoding and sweep follow one another, so the peak is that of the largest. The text encoder is on the device only for
new prompts. Prints tables and writes memory.csv and memory.png. Videos are counted by memory_video.py.
"""

import os
import platform
from types import SimpleNamespace

import torch
from bench_common import VERSIONS, in_own_process, make_parser, parse_benchmark, write_csv
from bench_networks import load
from matplotlib.figure import Figure
from reward_models.clip import image_embeds
from rlr_training.memory import GIB, LiveBytes
from step_cost import Case, memory
from torch._subclasses import FakeTensorMode
from tqdm import tqdm


CARDS = (8, 12, 16, 24, 80)


def peak_of(run):
    """GiB at most that `run()` creates."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        run()
    return live.peak / GIB


def copy_lora(network):
    """Make the copies of its LoRA that a network in half precision uses from its first call on."""
    for hook in network._forward_pre_hooks.values():
        hook(network, ())


def room_on(card):
    """GiB of a card that the recipes fill."""
    return 0.9 * card - 1.5


def phases(networks, batch_size, latents_size, num_steps):
    """GiB that each phase of a step adds to the weights; for the decoder, with one image at a time."""
    unet, shape = networks.unet, (batch_size, 4, latents_size, latents_size)
    embeds = networks.embeds.expand(2 * batch_size, -1, -1)

    def predict(x):
        return unet(torch.cat([x, x]).to(embeds.dtype), torch.ones((), dtype=torch.long), encoder_hidden_states=embeds)

    def sweep(with_input_grad):
        x = torch.zeros(shape).requires_grad_(with_input_grad)
        out = predict(x).sample
        torch.autograd.backward(out, torch.zeros_like(out))
        unet.zero_grad()

    def decode():
        x_0 = torch.zeros(1, *shape[1:]).requires_grad_()
        images = networks.model.decode(x_0)
        pixels = images.detach().requires_grad_()
        embeds = image_embeds(networks.reward.clip, pixels)
        (gradient,) = torch.autograd.grad(networks.reward.head(embeds).sum(), pixels)
        torch.autograd.grad(images, x_0, gradient)

    with torch.no_grad():
        rollout = peak_of(lambda: predict(torch.zeros(shape)))
    return {
        "rollout_gib": rollout,
        "decode_gib": peak_of(decode),
        "sweep_gib": peak_of(lambda: sweep(True)),
        "sweep_truncated_gib": peak_of(lambda: sweep(False)),
        "stored_gib": (2 * num_steps + 1) * 4 * torch.Size(shape).numel() / GIB,
    }


def settings_of(preset, device, precision, checkpointing):
    """The arguments of `bench_networks.load`."""
    return SimpleNamespace(
        preset=preset, device=device, mixed_precision=precision, gradient_checkpointing=checkpointing
    )


def count(precision, checkpointing, batch_sizes, preset, num_steps):
    """A row for each batch size. It needs a process of its own, since accelerate allows one precision per process."""
    networks, rows = load(settings_of(preset, "cpu", precision, checkpointing)), []
    copy_lora(networks.unet)
    weights = {
        name: sum(p.nbytes for p in getattr(networks, name).parameters()) / GIB for name in ("unet", "vae", "reward")
    }
    size = networks.model.network.config.sample_size
    for batch_size in batch_sizes:
        added = phases(networks, batch_size, size, num_steps)
        always = weights["unet"] + weights["vae"] + added["stored_gib"]
        unet_peak = max(added["rollout_gib"], added["sweep_gib"])
        rows.append(
            {
                "precision": precision,
                "gradient_checkpointing": checkpointing,
                "batch_size": batch_size,
                "weights_gib": sum(weights.values()),
                **added,
                "peak_gib": always + weights["reward"] + max(unet_peak, added["decode_gib"]),
                "peak_offload_gib": always + max(unet_peak, weights["reward"] + added["decode_gib"]),
            }
        )
    return rows


def compare(counted, preset, num_steps):
    """Measure a step of full_bp; returns a line with that and the count, a row of `count`."""
    device = "GPU" if torch.accelerator.is_available() else "CPU"
    precision, batch_size = counted["precision"], counted["batch_size"]
    case = Case("full_bp", num_steps, batch_size, 2, 32 if preset == "bundle" else 512)
    settings = settings_of(preset, None, precision, counted["gradient_checkpointing"])
    measured = in_own_process(memory, settings, [case])[0]
    return (
        f"full_bp, {num_steps} steps, batch {batch_size}, {precision}, {device}:"
        f" {measured['peak_mib'] / 1024:.2f} GiB measured, {counted['peak_gib']:.2f} counted"
    )


def recipes(rows):
    """Lines with the largest batch that fits on each card, by precision, without and with checkpointing."""
    lines = []
    for card in CARDS:
        for variant in dict.fromkeys((row["precision"], row["gradient_checkpointing"]) for row in rows):
            own = [row for row in rows if (row["precision"], row["gradient_checkpointing"]) == variant]
            fitting = [row for row in own if row["peak_gib"] <= room_on(card)]
            recipe = "nothing fits"
            if fitting:
                recipe = f"batch {fitting[-1]['batch_size']}, {fitting[-1]['peak_gib']:.1f} GiB"
            precision, checkpointing = variant
            lines.append(f"{card:>3} GB  {precision:<5} {'checkpointed' if checkpointing else 'plain':<13} {recipe}")
    return lines


def print_table(rows):
    print(f"{'precision':<10}{'U-Net':<14}{'batch':>6}{'weights':>9}{'rollout':>9}{'decoding':>10}{'sweep':>8}"
          f"{'K = 1':>8}{'peak GiB':>10}{'reward offloaded':>18}")  # fmt: skip
    for row in rows:
        print(
            f"{row['precision']:<10}{'checkpointed' if row['gradient_checkpointing'] else 'plain':<14}"
            f"{row['batch_size']:>6}{row['weights_gib']:>9.2f}{row['rollout_gib']:>9.2f}{row['decode_gib']:>10.2f}"
            f"{row['sweep_gib']:>8.2f}{row['sweep_truncated_gib']:>8.2f}{row['peak_gib']:>10.2f}"
            f"{row['peak_offload_gib']:>18.2f}"
        )


def plot(rows, path):
    """Peak by batch size, a line for each precision without and with checkpointing, and the cards."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for checkpointing, style in ((False, "o-"), (True, "o--")):
            own = [r for r in rows if (r["precision"], r["gradient_checkpointing"]) == (precision, checkpointing)]
            name = {"bf16": "bf16", "no": "float32"}[precision] + (", checkpointed" if checkpointing else "")
            axes.plot([r["batch_size"] for r in own], [r["peak_gib"] for r in own], style, label=name)
    for card in CARDS:
        axes.axhline(card, color="black", lw=0.6, ls=":")
        axes.text(rows[0]["batch_size"], card, f"{card} GB card", fontsize=8, va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="--train_batch_size", ylabel="peak, GiB")
    ticks = sorted({row["batch_size"] for row in rows})
    axes.set_xticks(ticks, ticks)
    axes.set_xticks([], minor=True)
    axes.set_yticks([4, 8, *CARDS], ["4", "8", *map(str, CARDS)])
    axes.set_title("A training step of SD 1.4, for any number of denoising steps")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(input_args=None):
    parser = make_parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="Also run a step of full_bp, of one image in bf16.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="T, for the stored latents.")
    args = parse_benchmark(parser, input_args)
    preset, batch_sizes = ("bundle", [1, 2]) if args.quick else ("sd14", [1, 2, 4, 8, 16, 32])
    variants = [(precision, checkpointing) for precision in ("bf16", "no") for checkpointing in (False, True)]
    if args.quick:
        variants = [("no", False)]
    rows = []
    for variant in tqdm(variants, desc="Precisions"):
        rows += in_own_process(count, *variant, batch_sizes, preset, args.num_inference_steps)
    flags = (" --quick" if args.quick else "") + (" --measure" if args.measure else "")
    header = (
        f"python benchmarks/memory.py{flags}, {platform.machine()}, {VERSIONS}, T = {args.num_inference_steps}, counted, not"
        " computed"
    )
    print(header)
    print_table(rows)
    print("\n".join(recipes(rows)))
    if args.measure:
        print(compare(rows[0], preset, args.num_inference_steps))
    write_csv(rows, os.path.join(args.out, "memory.csv"), header)
    plot(rows, os.path.join(args.out, "memory.png"))
    return rows


if __name__ == "__main__":
    main()
