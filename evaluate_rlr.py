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
"""Compare LoRA adapters with their base model on the same prompts and seeds.

    python evaluate_rlr.py --adapters my-lora --reward aesthetic,clip_score,hpsv2

For every adapter: mean, gain and win rate of each reward, diversity, drift from the base model, and Frechet distances; with
--lora_scales the curve of gain against drift. The rewards to look at are those that were not trained on.
Prints a table and writes results.json, results.csv, images, plots and report.html into the output folder.
"""

import json
import math
import os

from diffusion_models.levels import BOUNDARIES
from diffusion_models.schedulers import SCHEDULERS
from rlr_training import sampling
from rlr_training.errors import bad_input_ends_the_run, errors_in_one_line
from rlr_training.flags import FlagParser, whole_number
from rlr_training.reward_flags import add_reward_files


SCRIPT = "evaluate_rlr.py"
MEMORY_SAVERS = "a smaller --batch_size, --decode_batch_size 1, --mixed_precision bf16, or one reward at a time"


def parse_args(input_args=None):
    parser = FlagParser(prog=SCRIPT, description="Compare LoRA adapters with their base model on the same seeds.")
    add = parser.add_argument_group("models").add_argument
    add("--adapters", nargs="+", required=True, help="Folders, files or Hub repositories of adapters.")
    add(
        "--pretrained_model_name_or_path",
        default="CompVis/stable-diffusion-v1-4",
        help="The base model: folder, name on huggingface.co/models, or a .safetensors file of SD 1.x or XL.",
    )
    add("--pretrained_vae_model_name_or_path", help="A VAE instead of the model's own.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--cache_dir", help="Folder for downloaded models.")
    add("--quantize", choices=["nf4", "int8", "fp8"], help="Hold the weights of the network in four or eight bits.")
    add("--lora_scales", type=numbers, default=[], help="Strengths of the adapter to compare, such as 0,.25,.5,.75,1.")

    add = parser.add_argument_group("rewards").add_argument
    add("--reward", default="aesthetic,clip_score", help="Rewards, separated by commas, as for training.")
    add_reward_files(add)
    add("--feature_model", metavar="DIR", help="Folder of a CLIPModel for the distances. Default: the Hub's ViT-L/14.")
    add("--real_images", metavar="DIR", help="Folder of images: also measure the distance to them.")

    add = parser.add_argument_group("prompts").add_argument
    add("--prompts", default="simple_animals", help="simple_animals, activities, or a file as for training.")
    add("--num_prompts", type=whole_number(0), default=16, help="Use the first so many prompts; 0 for all.")
    add("--images_per_prompt", type=whole_number(2), default=4, help="Images of each prompt.")
    add(
        "--dcot_boundaries", type=float, nargs=2, default=list(BOUNDARIES), metavar=("A", "B"), help="As for training."
    )
    group = sampling.add_sampling_flags(parser)
    sampling.add_scheduler_flags(group, SCHEDULERS)
    sampling.add_flow_flags(group)
    sampling.add_video_flags(group)

    add = parser.add_argument_group("run").add_argument
    add("--batch_size", type=whole_number(), default=8, help="Images drawn at a time.")
    add("--decode_batch_size", type=whole_number(), default=1, help="Images decoded and scored at a time.")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="Precision of the pipeline.")
    add("--output_dir", default="evaluation", help="Folder for everything that is written.")
    add("--overwrite_output_dir", action="store_true", help="Replace an evaluation that is already there.")
    args = parser.parse_args(input_args)
    from rlr_training.checks import check_shared_flags

    try:
        check_shared_flags(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def numbers(text):
    """The type of numbers that are separated by commas."""
    from argparse import ArgumentTypeError

    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ArgumentTypeError(f"{text!r} must be numbers, separated by commas")
    return values


def draw_and_measure(args, draw, names, prompts, measured):
    """Draw and measure the images of every model.

    Args:
        draw: `draw(name, scale, desc)`, the images of an adapter, or of the base model, for which the name is `None`.
        names: of the adapters in the pipeline.
        measured: `measured(images, base) -> (summary, details)`.

    Returns:
        (results as in results.json, {model: images or videos} for the grid, the prompts of the grid).
    """
    # Only the images of the grid are kept: all images of many models may not fit in memory.
    in_grid = [prompts.index(prompt) for prompt in list(dict.fromkeys(prompts))[:8]]
    images = draw(None, 1.0, "base")
    summary, base = measured(images, None)
    results = {"settings": vars(args), "num_images": len(prompts), "models": {"base": summary}, "lora_scales": {}}
    grid = {"base": images[in_grid]}
    for name in names:
        images = draw(name, 1.0, name)
        results["models"][name], _ = measured(images, base)
        grid[name] = images[in_grid]
        by_scale = {}
        for scale in args.lora_scales:
            images = draw(name, scale, f"{name} at {scale:g}")
            by_scale[f"{scale:g}"], _ = measured(images, base)
        if by_scale:
            results["lora_scales"][name] = by_scale
    return results, grid, [prompts[i] for i in in_grid]


def write(output_dir, results, grid, grid_prompts, fps):
    """Print the table and write everything into the output folder.

    Args:
        fps: frames per second, if the grid is one of videos.
    """
    from rlr_training.plots import plot_gains, plot_scales
    from rlr_training.report import print_table, write_csv, write_report

    print_table(results)
    write_csv(results, os.path.join(output_dir, "results.csv"))
    files = plot_seeds(output_dir, grid, grid_prompts, fps) | {"Gains": "gains.png"}
    plot_gains(results, os.path.join(output_dir, "gains.png"))
    if results["lora_scales"]:
        files["Gain against drift, by the scale of the adapter"] = "scales.png"
        plot_scales(results, os.path.join(output_dir, "scales.png"))
    images = {title: os.path.join(output_dir, file) for title, file in files.items()}
    write_report(results, images, os.path.join(output_dir, "report.html"))
    # Last: a folder with results.json holds a whole evaluation, which `main` does not write over.
    with open(os.path.join(output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
    print(f"images, plots and figures are in {os.path.join(output_dir, 'report.html')}")


def plot_seeds(output_dir, grid, prompts, fps):
    """Plot what models {name: (N, 3, H, W) or (N, F, 3, H, W)} drew from the same seeds; returns {title: file}."""
    from rlr_training.plots import plot_grid
    from rlr_training.videos import animate, plot_strips

    path = os.path.join(output_dir, "grid.png")
    if grid["base"].dim() == 4:
        plot_grid(grid, prompts, path)
        return {"Images of the same seeds": "grid.png"}
    animate(lambda images, file: plot_grid(images, prompts, file), grid, os.path.join(output_dir, "grid.gif"), fps)
    plot_strips(grid, prompts, path)
    return {"Videos of the same seeds": "grid.gif", "Their frames": "grid.png"}


@errors_in_one_line(SCRIPT, MEMORY_SAVERS)
def main(args):
    # Here and not above, so that --help and errors of the command line do not wait for heavy libraries.
    from accelerate import PartialState
    from reward_models.features import load_features
    from rlr_training.chains import set_defaults, set_size
    from rlr_training.comparison import encode_for, load_adapters, load_real, measure, switch_to
    from rlr_training.evaluation import load_base, make_draw
    from rlr_training.offload import place
    from rlr_training.output_dir import check_writable
    from rlr_training.processes import frozen_dtype, refuse_engines, set_up_logging
    from rlr_training.prompts import load_prompts, warn_of_long_prompts
    from rlr_training.scoring import load_reward_sum

    with bad_input_ends_the_run():
        refuse_engines(args.mixed_precision)
        device = PartialState().device
        set_up_logging(is_main_process=True)
        check_writable(args.output_dir)
        if os.path.exists(os.path.join(args.output_dir, "results.json")) and not args.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {args.output_dir!r} holds another evaluation: use another, or --overwrite_output_dir"
            )
        known = load_prompts(args.prompts)
        prompts = known[: args.num_prompts or None]
        if len(prompts) < len(known):
            print(f"the first {len(prompts)} of {len(known)} prompts are used; --num_prompts 0 takes all")
        prompts = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
        features = load_features(args.feature_model, device)
        real = None if args.real_images is None else load_real(args.real_images, features)
        model = load_base(args, frozen_dtype(args.mixed_precision))
        set_size(args, model)
        set_defaults(args, model)
        rewards = load_reward_sum(args, args.reward, prompts, device, args.decode_batch_size)
        warn_of_long_prompts(args.prompts, [*prompts, args.negative_prompt], *model.prompt_reader)
        names = load_adapters(model.pipeline, args.adapters, args.cache_dir)
        embeds = encode_for(args, model, names, prompts, device)
        place(args, model, PartialState())
        os.makedirs(args.output_dir, exist_ok=True)

        def measured(images, base):
            return measure(images, prompts, rewards, features, base, real, device)

        def draw(name, scale, desc):
            switch_to(model.pipeline, name, scale)
            return make_draw(args, model, embeds[name, scale])(prompts, args.batch_size, desc)

        results, grid, grid_prompts = draw_and_measure(args, draw, names, prompts, measured)
        write(args.output_dir, results, grid, grid_prompts, args.fps)
    return results


def cli():
    """Entry point of `rlr-evaluate`."""
    main(parse_args())


if __name__ == "__main__":
    cli()
