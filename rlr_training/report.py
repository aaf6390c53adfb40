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
"""The results of an evaluation as a table, as CSV, and as an HTML report of one file."""

import base64
import csv
import html

from .display import shown, with_error


OF_VIDEOS = """ Flicker is the mean absolute difference of consecutive frames, motion how little they are correlated, and
subject consistency the cosine of frames in CLIP's embeddings. A video that stands still has no flicker."""
REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>LoRA evaluation</title><style>
body{{font-family:sans-serif;margin:2em auto;max-width:75em}}img{{max-width:100%}}
table{{border-collapse:collapse}}td,th{{border:1px solid #bbb;padding:.3em .7em;text-align:right}}
td:first-child,th:first-child{{text-align:left}}
</style></head><body>
<h1>Base model against {adapters}</h1>
<table>{table}</table>
<p>Rewards are means over {num_images} {kind}s, with their standard errors. The gain is the mean difference from the base
model's {kind}s of the same prompts and seeds, and the win rate the share of {kind}s that score higher than those. Diversity,
drift and Frechet distances are measured in CLIP's embeddings. A fall of diversity and a rise of the distances are signs of
reward hacking.{of_videos}</p>
{figures}
<h2>Settings</h2>
<ul>{settings}</ul>
</body></html>
"""


def rows_of(results):
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
    """Print the table of `rows_of`."""
    header, rows = rows_of(results)
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
    """One HTML file that needs nothing else: the table, the images and plots, and the settings.

    Args:
        results: of evaluate_rlr.py.
        images: {title: PNG or GIF file}.
    """
    header, rows = rows_of(results)
    table = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"
    for row in rows:
        table += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    figures = ""
    for title, file in images.items():
        with open(file, "rb") as opened:
            data = base64.b64encode(opened.read()).decode()
        kind = file.rpartition(".")[2]
        figures += (
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/{kind};base64,{data}">'
        )
    given = {name: value for name, value in results["settings"].items() if value is not None and value is not False}
    settings = "".join(f"<li>{html.escape(f'{name}: {value}')}</li>" for name, value in given.items())
    with open(path, "w", encoding="utf-8") as file:
        adapters = ", ".join(html.escape(name) for name in results["models"] if name != "base")
        num_images, is_of_videos = results["num_images"], "flicker" in results["models"]["base"]
        file.write(
            REPORT.format(
                **{"adapters": adapters, "table": table, "num_images": num_images, "figures": figures},
                **{"settings": settings, "kind": "video" if is_of_videos else "image"},
                of_videos=OF_VIDEOS if is_of_videos else "",
            )
        )
