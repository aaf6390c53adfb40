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
"""Base against tuned model at the end of a run, on images of fixed seeds."""

import json
import os

from diffusion_models.adapters import files_of, load_adapter, lora_disabled

from diffusers.training_utils import offload_models

from .chains import kind_of
from .display import evenly_spaced, rows_of, scores_shown, shortened, shown, without_files
from .errors import one_line
from .evaluation import EVALUATION_SEED, encode_and_place, make_draw
from .plots import plot_before_after
from .videos import animate, plot_strips


def evaluation_prompts(args, prompts):
    """The prompts of the --num_eval_images images, from those of the run."""
    pool = args.validation_prompts or prompts
    return [pool[i % len(pool)] for i in range(args.num_eval_images)]


def drawn_and_scored(args, share, rewards, heldout, prompts, model):
    """Base against tuned model on a process's share of images of fixed seeds, the adapter loaded from disk into a pipeline.

    Args:
        share: `Share`.
        rewards, heldout: `WeightedSum` of the reward that is trained on, and of the held-out one or `None`.
        prompts: of the share.
        model: without an adapter, on the CPU.

    Returns:
        {"images": {"base", "tuned"} -> (n, 3, H, W) or (n, F, 3, H, W), "rewards": {"total", members...} -> {"base", "tuned"}
        -> (n,), "heldout": {"base", "tuned"} -> (n,), or `None`, or the text of what has failed}.
    """
    device = share.accelerator.device
    load_adapter(model.pipeline, args.output_dir, "tuned")
    draw = make_draw(args, model, encode_and_place(args, model, prompts, share.accelerator))
    shows, seed = share.accelerator.is_main_process, {"first_seed": EVALUATION_SEED + share.first}

    def draw_as(name):
        return draw(prompts, args.train_batch_size, f"{name} {kind_of(args)}s" if shows else None, **seed)

    with lora_disabled(model):
        images = {"base": draw_as("base")}
    images["tuned"] = draw_as("tuned")

    def scores_of(rewards):
        with offload_models(*rewards.modules, device=device, offload=args.reward_offload):
            return {name: rewards(drawn, prompts, device=device) for name, drawn in images.items()}

    scored, held = scores_of(rewards), None
    scores = {"total": {name: rewards.plain(one).cpu() for name, one in scored.items()}}
    for member in rewards.members:
        scores[member] = {name: one.members[member].cpu() for name, one in scored.items()}
    if heldout is not None:
        try:
            held = {name: one.total.cpu() for name, one in scores_of(heldout).items()}
        except (ValueError, OSError) as error:  # a prompt that a custom reward was not tried on, a server that is gone
            held = one_line(error)
    return {"images": images, "rewards": scores, "heldout": held}


def compare_with_base(args, share, parts, prompts):
    """The results of base against tuned model, on the main process.

    Args:
        share: `Share`.
        parts: from `drawn_and_scored`, of each process.
        prompts: of all images.

    Returns:
        (results, failures). The results are {"num_images", "base": {"mean", "std"}, "tuned": {...}, "gain": {"mean",
        "standard_error"}} of the reward; "members", {name: the same three}; and with a held-out reward "heldout", the same
        three. They are also written to evaluation.json, with images in before_after.png, of videos also in before_after.gif.
        The failures are a list of texts.
    """

    def joined(values):
        return {name: share.in_order([one[name] for one in values]) for name in ("base", "tuned")}

    members, failures = list(parts[0]["rewards"]), []
    scores = {member: joined([part["rewards"][member] for part in parts]) for member in members}
    results = {"num_images": len(prompts), **compared(scores["total"])}
    results["members"] = {member: compared(scores[member]) for member in members[1:]}
    held = [part["heldout"] for part in parts]
    failed = next((one for one in held if isinstance(one, str)), None)
    if failed is not None:
        failures.append(f"the held-out reward has failed in the comparison with the base model: {failed}")
    elif held[0] is not None:
        results["heldout"] = compared(joined(held))
    with open(os.path.join(args.output_dir, "evaluation.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
    images = joined([part["images"] for part in parts])
    plot_comparison(args, images, scores["total"], prompts, footer_lines(args, results))
    return results, failures


def plot_comparison(args, images, totals, prompts, lines):
    """Write before_after.png, and for videos before_after.gif, with frames of videos beside each other in the former.

    Args:
        images: {"base", "tuned"} -> (N, 3, H, W) or (N, F, 3, H, W).
        totals: their rewards, {"base", "tuned"} -> (N,).
        lines: at the foot of the plot.
    """
    path = os.path.join(args.output_dir, "before_after")

    def plot(images, file):
        plot_before_after(images, totals, prompts, file, lines)

    if images["base"].dim() == 4:
        plot(images, f"{path}.png")
        return
    few = evenly_spaced(len(prompts), 8)
    animate(plot, images, f"{path}.gif", args.fps)
    plot_strips({name: videos[few] for name, videos in images.items()}, [prompts[i] for i in few], f"{path}.png")


def compared(scores):
    """Means and standard deviations of the scores {"base", "tuned"} -> (N,), and the gain of the second over the first."""
    gain = scores["tuned"] - scores["base"]
    figures = {name: {"mean": values.mean().item(), "std": values.std().item()} for name, values in scores.items()}
    error = gain.std().item() / len(gain) ** 0.5
    return {**figures, "gain": {"mean": gain.mean().item(), "standard_error": error}}


def footer_lines(args, results):
    """One line for each reward, with the means of both models, for the foot of before_after.png."""
    lines = []
    for name, row in rows_of(results, without_files(args.reward), without_files(args.heldout_reward or "")).items():
        base, tuned = (scores_shown(row[model], results["num_images"])[0] for model in ("base", "tuned"))
        lines.append(f"mean {shortened(name)}: base {base}, tuned {tuned}")
    return lines


def print_result(args, model, command):
    """Print where the adapter of a run is, and the command that evaluates it."""
    paths = [os.path.join(args.output_dir, name) for name in files_of(model).values()]
    print(f"the adapter is {' and '.join(paths)}; README.md beside it shows how to use it")
    print(f"to evaluate it: {command}")


def best_adapter(stopping, step):
    """Which adapter is the best by the held-out reward, in a sentence, or `None` where none was scored.

    Args:
        stopping: `EarlyStopping`.
        step: the last one.
    """
    if stopping.best_step == 0:
        never = "of the adapters that the held-out reward scored none was better than the base model"
        return never if stopping.waited else None
    if stopping.best_step == step:
        return "by the held-out reward the last adapter is the best"
    scored = "of the adapters that the held-out reward scored"
    return f"{scored} the one of step {stopping.best_step} is the best: it is in the folder best, and the last one beside it"


def print_comparison(args, results):
    """Print the results of `compare_with_base`."""
    for reward, row in rows_of(results, args.reward, args.heldout_reward).items():
        for name in ("base", "tuned"):
            mean, deviation = scores_shown(row[name], results["num_images"])
            print(f"{name:>6} {reward}: {mean} mean, {deviation} standard deviation")
        gain, error = row["gain"]["mean"], row["gain"]["standard_error"]
        print(f"  gain {reward}: {shown(gain, error, '+')} mean, {shown(error, error)} standard error")
    print(f"over {results['num_images']} {kind_of(args)}s of the same prompts and seeds")
