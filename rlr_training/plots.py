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
"""Plots and grids of images, as PNG files."""

import json
import textwrap
import unicodedata
import warnings

import torch

from .display import evenly_spaced, shown, without_files


# {figure of metrics.jsonl: its title} of images of fixed seeds, measured now and then
MEASURED = {"heldout": "held-out reward", "diversity": "diversity, held-out images"}


def caption(text, width=20, lines=3):
    """A prompt or name beside a small image: wrapped, shortened to a few lines, with dollar signs as they are.

    Between two dollar signs matplotlib would set a formula, or fail to.
    """
    # Chinese and emoji are twice as wide as Latin letters: they count with a filler.
    text = "".join(f"{c}\0" if unicodedata.east_asian_width(c) in "WF" else c for c in " ".join(text.split()))
    wrapped = "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))
    return wrapped.replace("\0", "").replace("$", r"\$")


def new_figure(figsize):
    """A figure of matplotlib, which is imported here so that no run waits for it at its beginning."""
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def save(figure, path, dpi):
    """Write a figure as PNG. Characters that the font lacks are drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=dpi)


def plot_reward_curve(metrics_file, path, members, floors, base):
    """Figures by optimizer step, from metrics.jsonl: the mean reward with its standard deviation, of a sum also those of its
    members, and where they were measured the held-out reward and diversity.

    Args:
        members: names of the members of the sum.
        floors: {name: `Floor`} of some of them.
        base: figures of the base model's held-out images, drawn as dashed lines; {} for none.
    """
    with open(metrics_file, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    names = {"reward": "reward", **({name: name for name in members} if len(members) > 1 else {})}
    names |= {name: title for name, title in MEASURED.items() if any(mean_key(name) in line for line in lines)}
    figure = new_figure((7, 1.4 + 2.6 * len(names)))
    for name, axes in zip(names, figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]):
        own = [line for line in lines if mean_key(name) in line]
        steps, mean = ([line[key] for line in own] for key in ("step", mean_key(name)))
        axes.plot(steps, mean, marker="." if name in MEASURED else None)
        if name not in MEASURED:  # the same seeds each time: their deviation is no spread of the curve
            std = [line[f"{name}_std"] for line in own]
            low, high = ([m + side * s for m, s in zip(mean, std)] for side in (-1, 1))
            axes.fill_between(steps, low, high, alpha=0.2, lw=0)
        if mean_key(name) in base:
            axes.axhline(base[mean_key(name)], color="tab:gray", lw=1, ls="--", label="base model")
            axes.legend(fontsize=8)
        if name in floors:
            axes.axhline(floors[name].value, color="tab:red", lw=1, ls="--")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(caption(without_files(names[name]), 40))
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    figure.suptitle("Training images: mean and standard deviation" + ("; held-out images: mean" if base else ""))
    save(figure, path, dpi=120)


def mean_key(name):
    return name if name == "diversity" else f"{name}_mean"


def plot_before_after(images, scores, prompts, path, below=(), columns=8):
    """Images of the same prompts and seeds, a row per model, with their rewards.

    Args:
        images: {"base", "tuned"} -> (N, 3, H, W).
        scores: {"base", "tuned"} -> (N,).
        below: lines of text under the images.
        columns: the largest number of images in a row, evenly spaced among all.
    """
    picks = evenly_spaced(len(prompts), columns)
    columns = len(picks)
    height, width = images["base"].shape[2:]
    figure = new_figure((max(1.5 * columns, 5), 3 * height / width + 1.3 + 0.2 * len(below)))
    axes = figure.subplots(2, columns, squeeze=False)
    spread = torch.cat(list(scores.values())).std().item()
    for row, name in enumerate(("base", "tuned")):
        for column, pick in enumerate(picks):
            cell = axes[row][column]
            cell.imshow(images[name][pick].permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[], xlabel=shown(scores[name][pick].item(), spread))
            if row == 0:
                cell.set_title(caption(prompts[pick]), fontsize=8)
        axes[row][0].set_ylabel(name, fontsize=12)
    figure.suptitle("Same prompts, same seeds; the reward under each image")
    figure.supxlabel("\n".join(caption(line, 100) for line in below), fontsize=10)
    save(figure, path, dpi=120)


def plot_grid(images, prompts, path):
    """Images {model: (N, 3, H, W)} of N prompts: a row per prompt and seed, a column per model."""
    height, width = images["base"].shape[2:]
    side = 1.8 * max(width / height / 3, 1)  # in inches; frames beside each other need room
    height *= side / width
    figure = new_figure((side * len(images) + 1.2, height * len(prompts) + 0.6))
    cells = figure.subplots(len(prompts), len(images), squeeze=False)
    for column, (name, drawn) in enumerate(images.items()):
        cells[0][column].set_title(caption(name), fontsize=9)
        for row, image in enumerate(drawn):
            cells[row][column].imshow(image.permute(1, 2, 0).numpy())
            cells[row][column].set(xticks=[], yticks=[])
    for row, prompt in enumerate(prompts):
        cells[row][0].set_ylabel(caption(prompt, max(8, int(11 * height))), fontsize=8)
    save(figure, path, dpi=100)


def plot_gains(results, path):
    """The gain of each adapter over the base model by reward, with its standard error, and the diversity of its images.

    Args:
        results: of evaluate_rlr.py.
    """
    models = {name: summary for name, summary in results["models"].items() if name != "base"}
    rewards = list(results["models"]["base"]["rewards"])
    figure = new_figure(((1.6 + 0.6 * len(results["models"])) * (len(rewards) + 1), 3.8))
    *cells, last = figure.subplots(1, len(rewards) + 1)
    for axes, reward in zip(cells, rewards):
        gains, errors = gains_of(models, reward)
        _draw_bars(axes, f"{reward}: gain over base", list(models), gains, yerr=errors, capsize=4)
        axes.axhline(0, color="black", lw=0.8)
    diversity = [summary["diversity"] for summary in results["models"].values()]
    _draw_bars(last, "diversity", list(results["models"]), diversity, color="C2")
    save(figure, path, dpi=100)


def gains_of(models, reward):
    """The gains over the base model's images of the same prompts and seeds, and their standard errors, as two lists."""
    figures = [summary["rewards"][reward] for summary in models.values()]
    return [one["gain"] for one in figures], [one["gain_standard_error"] for one in figures]


def _draw_bars(axes, title, names, heights, **style):
    axes.bar(range(len(names)), heights, **style)
    axes.set_xticks(range(len(names)), [caption(name, 16) for name in names], rotation=30, ha="right", fontsize=8)
    axes.set_title(caption(title, 25), fontsize=10)


def plot_scales(results, path):
    """Gain against drift along the LoRA scales of each adapter, by which to pick a scale.

    Args:
        results: of evaluate_rlr.py with --lora_scales.
    """
    rewards = list(results["models"]["base"]["rewards"])
    figure = new_figure((4.2 * len(rewards), 3.6))
    for axes, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards):
        for name, by_scale in results["lora_scales"].items():
            x = [summary["drift"] for summary in by_scale.values()]
            y, errors = gains_of(by_scale, reward)
            line, *_ = axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=caption(name, 24, lines=1))
            for scale, a, b in zip(by_scale, x, y):
                style = {"fontsize": 8, "color": line.get_color()}
                axes.annotate(scale, (a, b), textcoords="offset points", xytext=(4, 4), **style)
        axes.set(xlabel="drift from the base model", ylabel=caption(f"{reward}: gain over base", 40))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path, dpi=100)
