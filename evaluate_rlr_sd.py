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
"""Did the pictures get better? The base model against one or more LoRA adapters, on the same prompts and seeds.

    python evaluate_rlr_sd.py --adapters my-lora --reward aesthetic,clip_score,hpsv2

For every adapter: mean, standard error and win rate of each reward (those that were not trained on are the ones to look
at), diversity, drift from the base model, and Frechet distances; with --lora_scales the curve of reward against drift.
Prints a table and writes results.json, results.csv, pictures, plots and report.html into the output folder.
"""

import base64
import csv
import html
import json
import math
import os

import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from reward_models import REWARDS, load_rewards, parse_reward, parse_reward_paths
from reward_models.__main__ import read_image
from reward_models.features import diversity, drift, frechet_distance, load_features
from reward_models.loading import first_line
from rlr_utils import BOUNDARIES, SCHEDULERS, levels_of_steps, load_prompts
from tqdm.auto import tqdm
from train_rlr_sd import (
    OneLineParser,
    adapter_file,
    ending_in_one_line,
    generate,
    literal,
    load_pipeline,
    refusing_bad_input,
    set_size,
)
from train_rlr_sdxl import load_xl_pipeline

from diffusers import DiffusionPipeline


def parse_args(input_args=None):
    parser = OneLineParser(
        prog="evaluate_rlr_sd.py", description="Compare LoRA adapters with their base model on the same seeds."
    )
    parser.add_argument("--adapters", nargs="+", required=True, help="Folders, files or Hub repositories of adapters.")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        default="CompVis/stable-diffusion-v1-4",
        help="Path to the base model's pipeline or its name on huggingface.co/models.",
    )
    parser.add_argument(
        "--pretrained_vae_model_name_or_path", default=None, help="For SDXL: a VAE instead of the model's own."
    )
    parser.add_argument("--revision", default=None, help="Revision of the model to take from the Hub.")
    parser.add_argument("--variant", default=None, help="Variant of the model files, such as fp16.")
    parser.add_argument("--cache_dir", default=None, help="Where downloads are kept.")
    parser.add_argument(
        "--reward", default="aesthetic,clip_score", help=f"Rewards with commas between: {', '.join(REWARDS)}."
    )
    parser.add_argument(
        "--reward_path", action="append", default=[], metavar="NAME=DIR", help="Local folder of a reward's model."
    )
    parser.add_argument(
        "--feature_model",
        default=None,
        metavar="DIR",
        help="Folder of the CLIPModel for diversity, drift and Frechet distances instead of the Hub's ViT-L/14.",
    )
    parser.add_argument(
        "--real_images", default=None, metavar="DIR", help="Pictures to measure the distance to as well."
    )
    parser.add_argument(
        "--lora_scales", default=None, help="Strengths of the adapter to compare, such as 0,.25,.5,.75,1."
    )
    parser.add_argument(
        "--prompts", default="simple_animals", help="simple_animals, activities, or a file as for training."
    )
    parser.add_argument(
        "--dcot_boundaries", type=float, nargs=2, default=list(BOUNDARIES), metavar=("A", "B"), help="As in training."
    )
    parser.add_argument("--num_prompts", type=int, default=16, help="The first so many prompts; 0 for all.")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="Pictures of each prompt.")
    parser.add_argument("--resolution", type=int, default=None, help="Side in pixels; default: the model's own.")
    parser.add_argument("--height", type=int, default=None, help="Height in pixels, instead of --resolution.")
    parser.add_argument("--width", type=int, default=None, help="Width in pixels, instead of --resolution.")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="Sampler, as in training.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="Classifier-free guidance.")
    parser.add_argument("--negative_prompt", default=None, help="Negative prompt of all pictures.")
    parser.add_argument("--eta", type=float, default=1.0, help="Noise of --scheduler ddim.")
    parser.add_argument("--batch_size", type=int, default=8, help="Pictures drawn at a time.")
    parser.add_argument("--decode_batch_size", type=int, default=1, help="Pictures decoded and scored at a time.")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="Of the pipeline.")
    parser.add_argument("--output_dir", default="evaluation", help="Where everything is written.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Write over an evaluation that is already there."
    )
    args = parser.parse_args(input_args)
    least_of = {"images_per_prompt": 2, "num_prompts": 0, "num_inference_steps": 1, "guidance_scale": 0}
    for name, least in {**least_of, "batch_size": 1, "decode_batch_size": 1}.items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    if not 0 <= args.eta <= 1:
        parser.error(f"--eta {args.eta} must be in [0, 1]")
    args.train_batch_size = args.batch_size  # as the training script calls it, whose pictures these are
    try:
        levels_of_steps(args.num_inference_steps, args.dcot_boundaries)
    except ValueError as error:
        parser.error(f"--dcot_boundaries: {error}")
    try:
        scales = [float(scale) for scale in args.lora_scales.split(",")] if args.lora_scales else []
    except ValueError:
        scales = [math.nan]
    if not all(map(math.isfinite, scales)):
        parser.error(f"--lora_scales {args.lora_scales!r} are not numbers with commas between")
    args.lora_scales = scales
    return args


def load_base(args, dtype):
    """The base model's pipeline, Stable Diffusion's or SDXL's as the model says itself.

    Raises:
        ValueError: if it is neither.
    """
    name = args.pretrained_model_name_or_path
    try:
        found = DiffusionPipeline.load_config(name, revision=args.revision, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_model_name_or_path {name!r} cannot be loaded: {error}") from error
    is_xl = found["_class_name"] == "StableDiffusionXLPipeline"
    return (load_xl_pipeline if is_xl else load_pipeline)(args, dtype)


def load_real(directory, features):
    """The embeddings of the pictures of a folder.

    Raises:
        ValueError: if there are not at least two.
    """
    paths = sorted(
        os.path.join(directory, name)
        for name in (os.listdir(directory) if os.path.isdir(directory) else [])
        if os.path.splitext(name)[1].lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    )
    if len(paths) < 2:
        raise ValueError(f"--real_images {directory!r} holds fewer than two pictures")
    return torch.cat([features(read_image(path)) for path in tqdm(paths, desc="real pictures")])


def load_adapters(pipeline, sources, cache_dir):
    """Adapters by the name they have in the pipeline and in the results: the end of their path, made unique."""
    names = []
    for source in sources:
        name = os.path.basename(os.path.normpath(source)).removesuffix(".safetensors").replace(".", "-")
        # Nor may it be a member of the module in which peft keeps adapters by their names, such as "train".
        while name in (*names, "base") or hasattr(torch.nn.ModuleDict(), name):
            name += "-again"
        try:
            file = adapter_file(source, cache_dir)
            pipeline.load_lora_weights(source, weight_name=file, adapter_name=name, cache_dir=cache_dir)
        except Exception as error:  # peft's, safetensors' and the Hub's
            raise ValueError(f"--adapters {source!r} cannot be loaded: {first_line(error)}") from error
        names.append(name)
    return names


def measure(images, prompts, rewards, features, base, real, device):
    """What is to be known of the pictures (N, 3, H, W) of one model.

    Args:
        base: the same of the base model, or `None` for itself.
        real: (M, D), embeddings of real pictures, or `None`.

    Returns:
        (summary, details): numbers for results.json, and {"scores": {reward: (N,)}, "embeds": (N, D)}.
    """
    embeds = features(images)
    scores = {name: values.cpu() for name, values in rewards(images, prompts, device=device).members.items()}
    base_scores, base_embeds = (scores, embeds) if base is None else (base["scores"], base["embeds"])
    summary = {"rewards": {}}
    for name, values in scores.items():
        gain = values - base_scores[name]
        summary["rewards"][name] = {
            "mean": values.mean().item(),
            "standard_error": values.std().item() / len(values) ** 0.5,
            "gain": gain.mean().item(),
            "gain_standard_error": gain.std().item() / len(gain) ** 0.5,
            "win_rate": ((gain > 0).float() + 0.5 * (gain == 0).float()).mean().item(),
        }
    summary["diversity"] = diversity(embeds, prompts)
    summary["drift"] = drift(base_embeds, embeds).mean().item()
    summary["frechet_to_base"] = frechet_distance(embeds, base_embeds)
    if real is not None:
        summary["frechet_to_real"] = frechet_distance(embeds, real)
    return summary, {"scores": scores, "embeds": embeds}


def rows_of(results):
    """The results as a table: header, and one row of text per model."""
    rewards = list(results["models"]["base"]["rewards"])
    distances = [key for key in results["models"]["base"] if key != "rewards"]
    header = ["model", *(f"{name} | win rate" for name in rewards), *(key.replace("_", " ") for key in distances)]
    rows = []
    for name, summary in results["models"].items():
        row = [name]
        for reward in summary["rewards"].values():
            row.append(f"{reward['mean']:.4f} +- {reward['standard_error']:.4f} | {100 * reward['win_rate']:.0f} %")
        rows.append(row + [f"{summary[key]:.4f}" for key in distances])
    return header, rows


def write_table(results, path):
    """results.csv: a row per model, with mean, standard error and win rate of every reward."""
    rows = []
    for name, summary in results["models"].items():
        row = {"model": name}
        for reward, found in summary["rewards"].items():
            row[reward] = found["mean"]
            row.update({f"{reward}_{key}": found[key] for key in ("standard_error", "win_rate")})
        rows.append({**row, **{key: value for key, value in summary.items() if key != "rewards"}})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot_grid(images, prompts, path):
    """Pictures {model: (N, 3, H, W)} of N prompts: rows are prompts, columns models; a row has one seed."""
    figure = Figure(figsize=(1.8 * len(images) + 1.2, 1.8 * len(prompts) + 0.6), layout="constrained")
    cells = figure.subplots(len(prompts), len(images), squeeze=False)
    for column, (name, pictures) in enumerate(images.items()):
        cells[0][column].set_title(name, fontsize=9)
        for row, picture in enumerate(pictures):
            cells[row][column].imshow(picture.permute(1, 2, 0).numpy())
            cells[row][column].set(xticks=[], yticks=[])
    for row, prompt in enumerate(prompts):
        cells[row][0].set_ylabel(literal(prompt), fontsize=8, wrap=True)
    figure.savefig(path, dpi=100)


def plot_gains(results, path):
    """Each adapter's gain over the base model by reward, in standard errors' bars, and its diversity."""
    models = {name: summary for name, summary in results["models"].items() if name != "base"}
    rewards = list(results["models"]["base"]["rewards"])
    figure = Figure(figsize=(3.2 * (len(rewards) + 1), 3.4), layout="constrained")
    *cells, last = figure.subplots(1, len(rewards) + 1)
    for axes, reward in zip(cells, rewards):
        chosen = [summary["rewards"][reward] for summary in models.values()]
        axes.bar(
            list(models),
            [one["gain"] for one in chosen],
            yerr=[one["gain_standard_error"] for one in chosen],
            capsize=4,
        )
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(f"{reward}: gain over base")
    last.bar(list(results["models"]), [summary["diversity"] for summary in results["models"].values()], color="C2")
    last.set_title("diversity")
    for axes in (*cells, last):
        axes.tick_params(axis="x", rotation=20)
    figure.savefig(path, dpi=100)


def plot_scales(results, path):
    """Reward against drift along the scales of each adapter: pick the scale where the curve stops to be worth it."""
    rewards = list(results["models"]["base"]["rewards"])
    figure = Figure(figsize=(4.2 * len(rewards), 3.6), layout="constrained")
    for axes, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards):
        for name, sweep in results["lora_scales"].items():
            x = [summary["drift"] for summary in sweep.values()]
            y = [summary["rewards"][reward]["mean"] for summary in sweep.values()]
            error = [summary["rewards"][reward]["standard_error"] for summary in sweep.values()]
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=name)
            for scale, a, b in zip(sweep, x, y):
                axes.annotate(scale, (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="drift from the base model", ylabel=reward)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def write_report(results, pictures, path):
    """One HTML file that needs nothing else: the table, the plots, and what was compared."""
    header, rows = rows_of(results)
    table = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    for row in rows:
        table += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    body = ""
    for title, file in pictures.items():
        with open(file, "rb") as opened:
            data = base64.b64encode(opened.read()).decode()
        body += f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    settings = "".join(f"<li>{html.escape(f'{name}: {value}')}</li>" for name, value in results["settings"].items())
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>LoRA evaluation</title><style>'
            "body{font-family:sans-serif;margin:2em auto;max-width:75em}img{max-width:100%}"
            "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3em .7em;text-align:right}"
            "td:first-child,th:first-child{text-align:left}</style></head><body>"
            f"<h1>Base model against {len(results['models']) - 1} adapter(s)</h1><table>{table}</table>"
            "<p>Rewards are means with their standard errors; the win rate is the share of pictures that score higher"
            " than the base model's of the same prompt and seed. Diversity, drift and Frechet distances are taken in"
            " CLIP's embeddings: a fall of diversity and a rise of the distances tell of a reward that is exploited.</p>"
            f"{body}<h2>Settings</h2><ul>{settings}</ul></body></html>\n"
        )


def compare(args, pipeline, names, prompts, rewards, features, real, device):
    """Draw, measure, print and write everything; the results as in results.json."""
    # The grid's pictures are kept; all of them, of many models, may be more than the memory holds.
    in_grid = [prompts.index(prompt) for prompt in list(dict.fromkeys(prompts))[:8]]
    pipeline.disable_lora()
    images = generate(pipeline, prompts, args, desc="base")
    summary, base = measure(images, prompts, rewards, features, None, real, device)
    results = {"settings": {**vars(args), "num_images": len(prompts)}, "models": {"base": summary}, "lora_scales": {}}
    grid = {"base": images[in_grid]}
    pipeline.enable_lora()
    for name in names:
        pipeline.set_adapters([name], [1.0])
        images = generate(pipeline, prompts, args, desc=name)
        results["models"][name], _ = measure(images, prompts, rewards, features, base, real, device)
        grid[name] = images[in_grid]
        sweep = {}
        for scale in args.lora_scales:
            pipeline.set_adapters([name], [scale])
            images = generate(pipeline, prompts, args, desc=f"{name} at {scale:g}")
            sweep[f"{scale:g}"], _ = measure(images, prompts, rewards, features, base, real, device)
        if sweep:
            results["lora_scales"][name] = sweep

    header, rows = rows_of(results)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)))
    write_table(results, os.path.join(args.output_dir, "results.csv"))
    pictures = {"Pictures of the same seeds": "grid.png", "Gains": "gains.png"}
    plot_grid(grid, [prompts[i] for i in in_grid], os.path.join(args.output_dir, "grid.png"))
    plot_gains(results, os.path.join(args.output_dir, "gains.png"))
    if results["lora_scales"]:
        pictures["Reward against drift, by the scale of the adapter"] = "scales.png"
        plot_scales(results, os.path.join(args.output_dir, "scales.png"))
    pictures = {title: os.path.join(args.output_dir, file) for title, file in pictures.items()}
    write_report(results, pictures, os.path.join(args.output_dir, "report.html"))
    # The last of all: where it is, there is a whole evaluation, which `main` does not write over.
    with open(os.path.join(args.output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
    return results


@ending_in_one_line(
    "evaluate_rlr_sd.py",
    "a smaller --batch_size, --decode_batch_size 1, --mixed_precision bf16, or one reward at a time",
)
def main(args):
    device = PartialState().device
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[args.mixed_precision]
    with refusing_bad_input():
        if os.path.exists(os.path.join(args.output_dir, "results.json")) and not args.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {args.output_dir!r} holds another evaluation: name another, or use --overwrite_output_dir"
            )
        prompts = load_prompts(args.prompts)[: args.num_prompts or None]
        prompts = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
        rewards = load_rewards(
            parse_reward(args.reward),
            parse_reward_paths(args.reward_path),
            device=device,
            size=(args.height or args.resolution or 512, args.width or args.resolution or 512),
            prompts=(prompts[0], prompts[-1]),
            batch_size=args.decode_batch_size,
        )
        features = load_features(args.feature_model, device)
        real = None if args.real_images is None else load_real(args.real_images, features)
        pipeline = load_base(args, dtype).to(device)
        set_size(args, pipeline)
        names = load_adapters(pipeline, args.adapters, args.cache_dir)
        os.makedirs(args.output_dir, exist_ok=True)
        return compare(args, pipeline, names, prompts, rewards, features, real, device)


if __name__ == "__main__":
    main(parse_args())
