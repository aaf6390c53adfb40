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
"""What the benchmarks share: flags, CSV files, worker processes, and how they measure time and memory."""

import argparse
import csv
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from matplotlib.figure import Figure
from tqdm import tqdm

import diffusers


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Forward passes that a swept step of the U-Net of SD 1.4 is worth, counted by operators.py.
FORWARDS_PER_SWEPT = 2.23

ASSETS = os.path.join(ROOT, "assets")
TINY_SD = os.path.join(ASSETS, "tiny-sd")
TINY_AESTHETIC = os.path.join(ASSETS, "tiny-aesthetic")
TINY_CLIP = os.path.join(TINY_AESTHETIC, "clip")
DIGITS = os.path.join(ASSETS, "digits.txt")
VERSIONS = f"torch {torch.__version__}, diffusers {diffusers.__version__}"

# The benchmarks run from a checkout in which nothing is installed. They import this module before the packages.
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]


# Flags and files


def make_parser(description):
    """A parser whose help begins with the docstring of a benchmark."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_benchmark(parser, input_args):
    """The arguments, with the two flags of all benchmarks: --quick and --out, a folder that exists from then on."""
    parser.add_argument(
        "--quick", action="store_true", help="A short run that tests the benchmark; ignore its figures."
    )
    parser.add_argument(
        "--out", help="Folder of the results. Default: benchmarks/results, or with --quick a temporary folder."
    )
    args = parser.parse_args(input_args)
    if args.out is None:
        args.out = tempfile.mkdtemp() if args.quick else os.path.join(ROOT, "benchmarks", "results")
    os.makedirs(args.out, exist_ok=True)
    print(f"the results are written to {args.out}")
    return args


def plot_seeds(values, xlabel, path, size):
    """The value of every seed as a dot, and the mean as a bar; `values` are {name: [number]}, `size` is in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for place, numbers in enumerate(values.values()):
        axes.plot(numbers, [place] * len(numbers), "o", color="C0", alpha=0.5)
        axes.plot(statistics.mean(numbers), place, "|", color="black", ms=18)
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.6)
    axes.set(xlabel=f"{xlabel} (dot: a seed, bar: mean)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def write_csv(rows, path, header):
    """Write rows of equal keys as CSV, after a comment line."""
    open(path, "w").close()
    append_csv(rows, path, list(rows[0]), header)


def append_csv(rows, path, fields, header):
    """Append rows to a CSV file; a new file begins with a comment line and the names of the fields."""
    is_new = not os.path.isfile(path) or os.path.getsize(path) == 0
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if is_new:
            file.write(f"# {header}\n")
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """The rows of such a file, with numbers as floats; no rows if the file does not exist."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [{name: _number_or_text(value) for name, value in row.items()} for row in rows]


def _number_or_text(value):
    try:
        return float(value)
    except ValueError:
        return value


# Processes


def machine_name(on_cpu):
    """The architecture of the CPU, or the name of the GPU."""
    return platform.machine() if on_cpu else torch.cuda.get_device_name()


def end_with_parent():
    """Let this process end when the process that started it ends, in whatever way."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class ThisProcess(Executor):
    """Runs everything in this process, at once."""

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:  # as in a worker, where a SystemExit ends only the task
            future.set_exception(error)
        return future


def add_workers_flag(parser):
    parser.add_argument(
        "--workers", type=int, default=2, help="Processes, of one thread each; 0 for this one. Default: 2."
    )


def worker_pool(workers):
    """An executor with new processes, which end with this one; with 0 workers it is this process."""
    if workers == 0:
        return ThisProcess()
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def in_own_process(function, *args):
    """The result of a function in a new process."""
    with worker_pool(1) as pool:
        return pool.submit(function, *args).result()


# Training runs


def as_flags(values):
    """{"seed": 0, ...} as the words --seed 0 ..."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def rows_of_runs(path, run, keys, sizes, workers):
    """The rows `run(*key, *sizes)` of all runs; those that are not in the file `path` are run, and added to it.

    Args:
        keys: (estimator, learning rate, seed) of each run; a row has columns of these names.
        workers: as for `worker_pool`.
    """
    rows = _rows_of_ended_runs(path)
    with worker_pool(workers) as pool:
        futures = [pool.submit(run, *key, *sizes) for key in keys if key not in rows]
        for future in tqdm(as_completed(futures), desc="Runs", total=len(futures)):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(future.result()) + "\n")
    rows = _rows_of_ended_runs(path)
    return [rows[key] for key in keys]


def _rows_of_ended_runs(path):
    """{(estimator, learning rate, seed): row}."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {(row["estimator"], row["learning_rate"], row["seed"]): row for row in rows}


def forget_earlier_run():
    """Set this process to one thread, without the accelerator of a run that it has made before."""
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def best_rates(rows, estimators):
    """{estimator: its rows at the learning rate of the largest mean gain}."""
    best = {}
    for name in estimators:
        by_rate = {}
        for row in rows:
            if row["estimator"] == name:
                by_rate.setdefault(row["learning_rate"], []).append(row)
        best[name] = max(by_rate.values(), key=lambda group: statistics.mean(row["gain"] for row in group))
    return best


# Time and memory


def seconds_of(run):
    """How long `run()` takes, until the device has finished."""
    started = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def seconds_in_turns(calls, rounds, desc=None):
    """{name: seconds of each round} of calls {name: run}, which take turns so that the machine's load affects all alike.

    Args:
        desc: of the progress bar; without one there is no bar.
    """
    seconds = {name: [] for name in calls}
    for i in tqdm(range(rounds), desc=desc, disable=desc is None):
        for name in sorted(calls, reverse=i % 2 == 0):
            seconds[name].append(seconds_of(calls[name]))
    return seconds


def ratios_of(seconds, others):
    """Median, smallest and largest ratio of the seconds of the same rounds, as columns of a table."""
    ratios = [a / b for a, b in zip(seconds, others)]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def ratio_errors(rows):
    """The error bars of these ratios, for matplotlib."""
    return [
        [row["ratio"] - row["ratio_min"] for row in rows],
        [row["ratio_max"] - row["ratio"] for row in rows],
    ]


def resident(name):
    """Bytes of this process in memory: now for "VmRSS", and for "VmHWM" the peak since it was last reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


@contextmanager
def fast_garbage_collection():
    """Within it, garbage collection skips the objects that exist already, most of which belong to libraries."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_memory(run, device):
    """Peak of the bytes in use during `run()` beyond those before it: of the allocator on a GPU, resident on a CPU."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        return torch.accelerator.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory that earlier calls have freed is used again unnoticed
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # reset the peak
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before
