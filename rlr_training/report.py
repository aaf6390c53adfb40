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


REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>LoRA evaluation</title><style>
body{{font-family:sans-serif;margin:2em auto;max-width:75em}}img{{max-width:100%}}
table{{border-collapse:collapse}}td,th{{border:1px solid #bbb;padding:.3em .7em;text-align:right}}
td:first-child,th:first-child{{text-align:left}}
</style></head><body>
<h1>Base model against {adapters}</h1>
<table>{table}</table>
<p>Rewards are means with their standard errors. The win rate is the share of images that score higher than the base model's
image of the same prompt and seed. Diversity, drift and Frechet distances are measured in CLIP's embeddings. A fall of
diversity and a rise of the distances are signs of reward hacking.</p>
{figures}
<h2>Settings</h2>
<ul>{settings}</ul>
</body></html>
"""


def rows_of(results):
    """The results as a table of text: the header, and a row per model."""
    rewards = list(results["models"]["base"]["rewards"])
    distances = [key for key in results["models"]["base"] if key != "rewards"]
    header = ["model", *(f"{name} | win rate" for name in rewards), *(key.replace("_", " ") for key in distances)]
    rows = []
    for name, summary in results["models"].items():
        row = [name]
        for reward in summary["rewards"].values():
            cell = f"{reward['mean']:.4f} +- {reward['standard_error']:.4f}"
            row.append(cell if name == "base" else f"{cell} | {100 * reward['win_rate']:.0f} %")
        rows.append(row + [f"{summary[key]:.4f}" for key in distances])
    return header, rows


def print_table(results):
    """Print the table of `rows_of`."""
    header, rows = rows_of(results)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)))


def write_csv(results, path):
    """A row per model, with mean, standard error and win rate of every reward."""
    rows = []
    for name, summary in results["models"].items():
        row = {"model": name}
        for reward, figures in summary["rewards"].items():
            row[reward] = figures["mean"]
            row.update({f"{reward}_{key}": figures[key] for key in ("standard_error", "win_rate")})
        rows.append({**row, **{key: value for key, value in summary.items() if key != "rewards"}})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_report(results, images, path):
    """One HTML file that needs nothing else: the table, the images and plots, and the settings.

    Args:
        results: of evaluate_rlr.py.
        images: {title: PNG file}.
    """
    header, rows = rows_of(results)
    table = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"
    for row in rows:
        table += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    figures = ""
    for title, file in images.items():
        with open(file, "rb") as opened:
            data = base64.b64encode(opened.read()).decode()
        figures += f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    settings = "".join(f"<li>{html.escape(f'{name}: {value}')}</li>" for name, value in results["settings"].items())
    with open(path, "w", encoding="utf-8") as file:
        adapters = ", ".join(html.escape(name) for name in results["models"] if name != "base")
        file.write(REPORT.format(adapters=adapters, table=table, figures=figures, settings=settings))
