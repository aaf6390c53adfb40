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
"""The results of a run and of an evaluation as HTML files that need nothing else; those of an evaluation also as CSV."""

import base64
import csv
import html
import os

from .chains import kind_of
from .display import rows_of, scores_shown, shown, with_error, without_files
from .hub import settings_shown, versions_shown, without_folders


OF_VIDEOS = """ Flicker is the mean absolute difference of consecutive frames, motion how little they are correlated, and
subject consistency the cosine of frames in CLIP's embeddings. A video that stands still has no flicker."""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; line-height: 1.45; margin: 1.5em auto; max-width: 75em; padding: 0 1em; }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere; }}
img {{ height: auto; max-width: 100%; }}
table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid #bbb; padding: .3em .7em; text-align: right; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; }}
.wide {{ overflow-x: auto; }}
pre {{ background: #f4f4f4; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }}
li {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
OF_EVALUATION = """Rewards are means over {num_images} {kind}s, with their standard errors. The gain is the mean difference from the
base model's {kind}s of the same prompts and seeds, and the win rate the share of {kind}s that score higher than those. Diversity,
drift and Frechet distances are measured in CLIP's embeddings. A fall of diversity and a rise of the distances are signs of
reward hacking.{of_videos}"""
OF_RUN = """"a +- b" is a mean and its standard error. Diversity is how different the images of one prompt are. A held-out reward,
which is not trained on, or a diversity that falls while the reward rises is a sign of reward hacking. A reward that is
still rising at the end asks for more steps, and one that never rose for a higher learning rate or more images a step."""


# An HTML page


def write_page(path, title, parts):
    with open(path, "w", encoding="utf-8") as file:
        file.write(PAGE.format(title=html.escape(title), body="\n".join(parts)))


def paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def table(header, rows):
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table>\n{chr(10).join(lines)}\n</table></div>'


def image(title, file, alt=None):
    """A heading and a PNG or GIF file under it, whose bytes become part of the page."""
    with open(file, "rb") as opened:
        data = base64.b64encode(opened.read()).decode()
    source = f"data:image/{file.rpartition('.')[2]};base64,{data}"
    return f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(alt or title)}" src="{source}">'


def settings_list(settings):
    """A list that is folded until it is asked for."""
    lines = [f"<li>{html.escape(f'{name}: {value}')}</li>" for name, value in settings.items()]
    return f"<details>\n<summary>Settings</summary>\n<ul>\n{chr(10).join(lines)}\n</ul>\n</details>"


# A run


def write_run_report(args, command, step, best, results=None):
    """Write report.html into the output folder: results, images before and after, curves, command and settings.

    Args:
        command: that starts the same run.
        step: how many optimizer steps were taken.
        best: from `before_after.best_adapter`.
        results: from `before_after.compare_with_base`, or `None` where there are none.
    """
    reward, model = without_folders(args.reward), without_folders(args.pretrained_model_name_or_path)
    parts = [paragraph(f"A LoRA for {model}, trained with {args.gradient_estimator}; {step} optimizer steps.")]
    if best is not None:
        parts.append(paragraph(f"{best[0].upper()}{best[1:]}."))
    if results is not None:
        parts += _results_of_run(args, reward, results)
    curves = "Mean reward of the training images by optimizer step; beside it the held-out reward and diversity, if measured"
    parts += [image("Curves", os.path.join(args.output_dir, "reward_curve.png"), curves), paragraph(OF_RUN)]
    parts += [f"<h2>Command</h2>\n<pre>{html.escape(command)}</pre>", paragraph(f"{versions_shown()}.")]
    parts.append(settings_list(settings_shown(vars(args))))
    write_page(os.path.join(args.output_dir, "report.html"), f"Trained to raise {without_files(reward)}", parts)


def _results_of_run(args, reward, results):
    """The table of base against tuned model, and some of their images."""
    kind, rows = kind_of(args), rows_of(results, reward, without_folders(args.heldout_reward or ""))
    if len(results["members"]) > 1:
        rows |= results["members"]
    lines = []
    for name, row in rows.items():
        cells = [scores_shown(row[model], results["num_images"])[0] for model in ("base", "tuned")]
        gain = with_error(row["gain"]["mean"], row["gain"]["standard_error"], "+")
        lines.append([without_folders(name), *cells, gain])
    file = os.path.join(args.output_dir, f"before_after.{'gif' if kind == 'video' else 'png'}")
    alt = f"{kind.capitalize()}s of the base model above those of the tuned one, of the same prompts and seeds"
    return [
        table(["reward", "base", "tuned", "gain"], lines),
        paragraph(f"Means over {results['num_images']} {kind}s of fixed seeds; the gain with its standard error."),
        image("Base above tuned", file, alt),
    ]


# An evaluation


def table_of(results):
    """The results as a table of text: the header, and a row per model."""
    rewards = list(results["models"]["base"]["rewards"])
    distances = [key for key in results["models"]["base"] if key != "rewards"]
    header = ["model", *(f"{name} | gain | win rate" for name in rewards)]
    header += [key.replace("_", " ") for key in distances]
    largest = {key: max(abs(summary[key]) for summary in results["models"].values()) for key in distances}
    rows = []
    for name, summary in results["models"].items():
        row = [name]
        for reward in summary["rewards"].values():
            cells = [with_error(reward["mean"], reward["standard_error"])]
            if name != "base":
                cells.append(with_error(reward["gain"], reward["gain_standard_error"], "+"))
                cells.append(f"{100 * reward['win_rate']:.0f} %")
            row.append(" | ".join(cells))
        rows.append(row + [shown(summary[key], largest[key]) for key in distances])
    return header, rows


def print_table(results):
    """Print the table of `table_of`."""
    header, rows = table_of(results)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)))


def write_csv(results, path):
    """A row per model, with mean, standard error and win rate of every reward; the base model has no win rate."""
    rows = []
    for name, summary in results["models"].items():
        row = {"model": name}
        for reward, figures in summary["rewards"].items():
            row[reward], row[f"{reward}_standard_error"] = figures["mean"], figures["standard_error"]
            row[f"{reward}_win_rate"] = None if name == "base" else figures["win_rate"]
        rows.append({**row, **{key: value for key, value in summary.items() if key != "rewards"}})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_report(results, images, path):
    """One HTML file of an evaluation: the table, the images and plots, and the settings.

    Args:
        results: of evaluate_rlr.py.
        images: {title: PNG or GIF file}.
    """
    adapters = ", ".join(name for name in results["models"] if name != "base")
    is_of_videos = "flicker" in results["models"]["base"]
    text = OF_EVALUATION.format(
        num_images=results["num_images"],
        kind="video" if is_of_videos else "image",
        of_videos=OF_VIDEOS if is_of_videos else "",
    )
    parts = [table(*table_of(results)), paragraph(text), *(image(title, file) for title, file in images.items())]
    parts.append(settings_list(settings_shown(results["settings"])))
    write_page(path, f"Base model against {adapters}", parts)
