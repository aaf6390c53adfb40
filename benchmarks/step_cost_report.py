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
"""Tables and plots of step_cost.py."""

from bench_common import ratio_errors
from matplotlib.figure import Figure


def print_table(title, rows):
    print(f"\n{title}")
    print(
        f"{'estimator':<34}{'T':>4}{'batch':>6}{'h':>3}{'pixels':>7}{'s / image':>11}{'images / s':>11}{'ratio':>7}"
        f"{'range':>15}{'forwards':>9}{'VJPs':>6}{'utilisation':>12}{'peak MiB':>9}{'of the step':>12}{'stored':>7}"
    )
    for row in rows:
        spread = f"{row['ratio_min']:.3f} - {row['ratio_max']:.3f}"
        print(
            f"{row['estimator']:<34}{row['num_steps']:>4}{row['batch_size']:>6}{row['length']:>3}{row['resolution']:>7}"
            f"{row['seconds_per_image']:>11.4f}{row['images_per_second']:>11.3f}{row['ratio']:>7.3f}{spread:>15}"
            f"{row['unet_forwards_per_image']:>9}{row['unet_vjps_per_image']:>6}{row['utilisation']:>12.2f}"
            f"{row['peak_mib']:>9.1f}{row['step_mib']:>12.1f}{row['stored_mib']:>7.1f}"
        )


def plot(groups, path):
    """The ratio and memory of every estimator, then seconds per image and peak memory by what is varied.

    Args:
        groups: {title: (column that varies, rows)}.
    """
    figure = Figure(figsize=(3.2 * len(groups) + 2, 5.2), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False)
    for (time_axes, memory_axes), (title, (key, rows)) in zip(axes.T, groups.items()):
        if key == "estimator":
            _plot_estimators(time_axes, memory_axes, rows)
        else:
            _plot_curve(time_axes, rows, key, "seconds_per_image", "seconds per image")
            _plot_curve(memory_axes, rows, key, "peak_mib", "peak memory, MiB")
        time_axes.set_title(title)
    figure.savefig(path, dpi=120)


def _plot_estimators(time_axes, memory_axes, rows):
    several_sizes = len({row["batch_size"] for row in rows}) > 1
    names = [row["estimator"] + (f", batch {row['batch_size']}" if several_sizes else "") for row in rows]
    time_axes.barh(names, [row["ratio"] for row in rows], xerr=ratio_errors(rows), capsize=2)
    time_axes.axvline(1.0, color="black", lw=0.8)
    time_axes.set_xlabel("time, bare calls = 1")
    memory_axes.barh(names, [row["peak_mib"] for row in rows])
    memory_axes.set_xlabel("peak memory, MiB")
    for axes in (time_axes, memory_axes):
        axes.invert_yaxis()


def _plot_curve(axes, rows, key, column, label):
    values = [row[column] for row in rows]
    axes.plot([row[key] for row in rows], values, "o-")
    axes.set(xlabel=key, ylabel=label, ylim=(0, 1.15 * max(values)))
    axes.grid(alpha=0.3)


def limits(groups):
    """Lines that say which limits are met: on time at batches of 16 and more, and on memory by estimator and by T.

    Args:
        groups: as for `plot`.
    """
    lines, by_estimator = [], groups["estimators"][1]
    large = [row for row in by_estimator if row["batch_size"] >= 16]
    if large:
        worst = max(large, key=lambda row: row["ratio"])
        lines.append((worst["ratio"], 1.1, f"time / time of the bare calls, at most ({worst['estimator']})"))
    peak = {(row["estimator"], row["batch_size"]): row["peak_mib"] for row in by_estimator}
    for (name, size), used in peak.items():
        if name in ("rlr", "full_bp") and ("truncated_bp", size) in peak:
            ratio = used / peak["truncated_bp", size]
            lines.append((ratio, 1.1, f"memory of {name} / memory of truncated_bp with K = 1, batch {size}"))
    if "steps T" in groups:
        rows = groups["steps T"][1]
        first, last = (row["step_mib"] - row["stored_mib"] for row in (rows[0], rows[-1]))
        steps = f"at T = {rows[-1]['num_steps']} / at T = {rows[0]['num_steps']}"
        lines.append((last / first, 1.05, f"memory of a step without the stored latents, {steps}"))
    return [f"{'met   ' if ratio <= limit else 'MISSED'}  {text}: {ratio:.3f}" for ratio, limit, text in lines]
