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
"""What the gradient estimators gain on the embedded Wan (assets/tiny-wan) for the same work, and what it costs.

    python benchmarks/video_estimators.py        or, for a short test, with --quick

Each estimator trains at several seeds, on a smooth reward (aesthetic and motion) and on a rough one (the same plus a fast sine of
the pixels). The aesthetic score alone likes digits in the middle, and makes videos stand still. All get the work of the same
number of steps of rlr, counted in forward passes of the transformer. vader differentiates the last step, as VADER does
(huggingface.co/papers/2407.08737), but scores all frames and not one, in which no motion could be seen. A run whose line is in
video_estimators.jsonl is not repeated. Prints a table and writes video_estimators.csv, and video_estimators.png with the mean
reward by work.
"""

import functools
import math
import os
import platform
import statistics
import tempfile

import torch
from bench_common import (
    ASSETS,
    FORWARDS_PER_SWEPT,
    TINY_AESTHETIC,
    TINY_CLIP,
    VERSIONS,
    add_workers_flag,
    as_flags,
    forget_earlier_run,
    make_parser,
    metrics_of,
    parse_benchmark,
    rows_of_runs,
    write_csv,
)
from diffusion_models.adapters import load_adapter
from matplotlib.figure import Figure
from rlr_training.chains import set_defaults, set_size
from rlr_training.checks import rlr_settings
from rlr_training.evaluation import HELDOUT_SEED, heldout_prompts, load_base, make_draw
from rlr_training.prompts import load_prompts
from rlr_training.scoring import load_reward_sum
from rlr_utils import RLRStep
from study_plan import SINE
from train_rlr_video import main as train
from train_rlr_video import parse_args


MODEL, READER = os.path.join(ASSETS, "tiny-wan"), os.path.join(ASSETS, "tiny-wan-rewards", "video_reader.py")
FLAGS = [
    *("--pretrained_model_name_or_path", MODEL, "--prompts", os.path.join(ASSETS, "videos.txt")),
    *("--reward_path", f"aesthetic={TINY_AESTHETIC}", "--height", "32", "--width", "32", "--num_frames", "9"),
    *("--train_batch_size", "16", "--gradient_accumulation_steps", "1", "--decode_batch_size", "16"),
    *("--report_to", "none", "--checkpointing_steps", "1000", "--num_eval_images", "0"),
    *("--heldout_reward", f"{READER}:DigitAccuracy", "--feature_model", TINY_CLIP),
    *("--max_sequence_length", "16", "--guidance_scale", "3"),
]
# {column: what judges the videos, beside the reward that is trained on}
JUDGES = {"digits": f"{READER}:DigitAccuracy", "directions": f"{READER}:DirectionAccuracy", "motion": "motion"}
REWARDS = {"smooth": "aesthetic,motion:20", "rough": f"aesthetic,motion:20,{SINE}:0.5"}
# {name: flags}
ESTIMATORS = {
    "rlr": [],
    "alignprop": ["--gradient_estimator", "alignprop"],
    "truncated_bp 5": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "5"],
    "vader": ["--gradient_estimator", "truncated_bp", "--truncation_steps", "1"],
    "ddpo": ["--gradient_estimator", "ddpo"],
}
CASES = [f"{name}, {reward}" for reward in REWARDS for name in ESTIMATORS]
LOSS = 0.05  # of the frames in which the digit is read, at which gains are compared


def flags_of(case):
    """The flags of an estimator and a reward."""
    name, _, reward = case.rpartition(", ")
    return [*FLAGS, "--reward", REWARDS[reward], *ESTIMATORS[name]]


def work_of(case, num_steps):
    """Forward passes of the transformer that an optimizer step takes for a video, guided ones counted as one."""
    args = parse_args([*flags_of(case), "--num_inference_steps", str(num_steps)])
    rlr = RLRStep(num_steps, True, **rlr_settings(args))
    calls = rlr.expected_calls(rlr.draw_schedule())
    return calls.forward + FORWARDS_PER_SWEPT * calls.swept


def run(case, rate, seed, num_steps, steps, videos, heldout):
    """The row of one training run.

    Args:
        case: one of `CASES`.
        rate: the learning rate.
        num_steps: T.
        steps: optimizer steps of rlr, whose work the run gets.
        videos: number of those on which base and tuned model are compared.
        heldout: number of those that the run scores while it trains.
    """
    forget_earlier_run()
    reward = case.rpartition(", ")[2]
    work = work_of(case, num_steps)
    steps = max(1, round(steps * work_of(f"rlr, {reward}", num_steps) / work))
    numbers = {"num_inference_steps": num_steps, "max_train_steps": steps, "seed": seed, "learning_rate": rate}
    numbers["num_heldout_images"] = heldout
    # The rough reward is not hacked so soon: one scoring at the end will do.
    numbers["heldout_steps"] = max(1, steps // 8) if reward == "smooth" else steps
    flags = [*flags_of(case), *as_flags(numbers)]
    with tempfile.TemporaryDirectory() as folder:
        args = parse_args([*flags, "--output_dir", os.path.join(folder, "out")])
        train(args)
        lines = metrics_of(args.output_dir)
        judge = judged(args.reward, num_steps, videos, heldout)
        base, tuned = judge.base, judge.tuned(args.output_dir)
    gain = tuned["total"] - base["total"]
    first, digits, motion = (judge.heldout[name].mean().item() for name in ("total", "digits", "motion"))
    scored = [line for line in lines if "heldout_mean" in line]
    path = [(line["heldout_mean"], line["heldout_trained_mean"] - first, line["motion"] / motion) for line in scored]
    digits_lost, gain_at_loss, motion_at_loss = at_loss([(digits, 0.0, 1.0), *path])
    return {
        **{"estimator": case, "learning_rate": rate, "seed": seed, "steps": steps, "work_per_step": work},
        **{"base": base["total"].mean().item(), "base_std": base["total"].std().item()},
        **{"gain": gain.mean().item(), "gain_error": gain.std().item() / videos**0.5},
        **{name: tuned[name].mean().item() for name in JUDGES},
        "motion_kept": (tuned["motion"].mean() / base["motion"].mean()).item(),
        "seconds_per_step": statistics.median(line["seconds"] for line in lines),
        **{"digits_lost": digits_lost, "gain_at_loss": gain_at_loss, "motion_at_loss": motion_at_loss},
        **{"path": path, "rewards": [line["reward_mean"] for line in lines]},
    }


def at_loss(path):
    """(digits lost, gain, motion kept) where a run has lost `LOSS` of the digits for the first time, or else at its end.

    Args:
        path: (digits, gain, motion kept) of the base model and of each scoring; between two it is taken to be straight.
    """
    digits = path[0][0]
    for before, after in zip(path, path[1:]):
        if after[0] <= digits - LOSS:
            share = (before[0] - (digits - LOSS)) / (before[0] - after[0])
            return LOSS, *(a + share * (b - a) for a, b in zip(before[1:], after[1:]))
    return digits - path[-1][0], *path[-1][1:]


class Judged:
    """The model without an adapter, and the scores {"total", names of `JUDGES`} -> (N,) of videos of fixed seeds.

    Attributes:
        base, heldout: scores of the base model: of N videos, and of those that a run scores while it trains.
    """

    def __init__(self, reward, num_steps, videos, heldout):
        flags = ["--reward", reward, "--num_inference_steps", str(num_steps), "--final_noise", "0"]
        self.args = parse_args([*FLAGS, *flags])
        pool = load_prompts(self.args.prompts)
        # A stride that meets all digits, colors and directions.
        self.prompts = [pool[i * 7 % len(pool)] for i in range(videos)]
        self.model = load_base(self.args, torch.float32)
        set_size(self.args, self.model)
        set_defaults(self.args, self.model)
        self.rewards, self.judges = (
            load_reward_sum(self.args, text, self.prompts, "cpu", None) for text in (reward, ",".join(JUDGES.values()))
        )
        self.base = self.scores(self.prompts)
        self.heldout = self.scores(heldout_prompts(pool, heldout), first_seed=HELDOUT_SEED)

    def scores(self, prompts, **seed):
        drawn = make_draw(self.args, self.model)(prompts, self.args.train_batch_size, **seed)
        members = self.judges(drawn, prompts).members
        scores = {name: members[judge] for name, judge in JUDGES.items()}
        return {"total": self.rewards(drawn, prompts).total, **scores}

    def tuned(self, output_dir):
        """The scores of the videos with the adapter of a run."""
        load_adapter(self.model.pipeline, output_dir, "tuned")
        try:
            return self.scores(self.prompts)
        finally:
            self.model.pipeline.unload_lora_weights()


judged = functools.cache(Judged)


def by_case(rows):
    """{(estimator and reward, rate): its rows}, in their order."""
    groups = {}
    for row in rows:
        groups.setdefault((row["estimator"], row["learning_rate"]), []).append(row)
    return groups


def print_table(rows):
    """A line for each estimator and reward, with standard errors over the seeds."""
    print(f"{'':<26}{'rate':>7}{'steps':>7}{'gain at loss':>17}{'digits lost':>13}{'motion kept':>13}   at the end:"
          f"{'gain':>8}{'digits':>8}{'directions':>12}{'motion kept':>13}{'s/step':>8}")  # fmt: skip
    for (name, rate), of_case in by_case(rows).items():
        mean = {
            key: statistics.mean(row[key] for row in of_case) for key, value in of_case[0].items() if is_number(value)
        }
        spread = statistics.stdev(row["gain_at_loss"] for row in of_case) if len(of_case) > 1 else math.nan
        print(
            f"{name:<26}{rate:>7g}{mean['steps']:>7g}{mean['gain_at_loss']:>8.3f} +- {spread / len(of_case) ** 0.5:>5.3f}"
            f"{mean['digits_lost']:>13.3f}{mean['motion_at_loss']:>13.2f}{mean['gain']:>22.3f}{mean['digits']:>8.3f}"
            f"{mean['directions']:>12.3f}{mean['motion_kept']:>13.2f}{mean['seconds_per_step']:>8.2f}"
        )


def is_number(value):
    return isinstance(value, (int, float))


def plot(rows, rates, path):
    """The mean over all seeds of the reward of the training videos by work, and of the smooth reward's gain by digits.

    A row for each rate.
    """
    figure = Figure(figsize=(4.8 * (1 + len(REWARDS)), 3.4 * len(rates)), layout="constrained")
    grid = figure.subplots(len(rates), 1 + len(REWARDS), squeeze=False)
    for (case, rate), of_case in by_case(rows).items():
        name, _, reward = case.rpartition(", ")
        axes, *_, last = [grid[rates.index(rate)][i] for i in (list(REWARDS).index(reward), -1)]
        curve = torch.tensor([row["rewards"] for row in of_case]).mean(0)
        work = [(i + 1) * of_case[0]["work_per_step"] for i in range(len(curve))]
        axes.plot(work, curve, label=name)
        axes.set(title=f"{reward}, rate {rate:g}", xlabel="forward passes of a video", ylabel="reward in training")
        axes.legend(fontsize=8)
        if reward == "smooth":
            digits, gain, _ = torch.tensor([row["path"] for row in of_case]).mean(0).T
            last.plot(digits, gain, marker=".", label=name)
            last.set(title="smooth, what it costs", xlabel="frames with the digit", ylabel="gain, fixed seeds")
    for row in grid:
        row[-1].invert_xaxis()
    figure.savefig(path, dpi=110)


def main(input_args=None):
    parser = make_parser(__doc__)
    add_workers_flag(parser)
    args = parse_benchmark(parser, input_args)
    cases = ["rlr, smooth", "vader, rough"] if args.quick else CASES
    rates, seeds, sizes = ((1e-3,), 1, (5, 1, 4, 4)) if args.quick else ((1e-3,), 3, (10, 24, 64, 64))
    blocks = [[case for case in cases if case.endswith(reward)] for reward in REWARDS]
    keys = [(case, rate, seed) for block in blocks for rate in rates for seed in range(seeds) for case in block]
    rows = rows_of_runs(os.path.join(args.out, "video_estimators.jsonl"), run, keys, sizes, args.workers)
    header = (
        f"python benchmarks/video_estimators.py{' --quick' if args.quick else ''}, {platform.machine()}, {VERSIONS},"
        f" {seeds} seeds, the work of {sizes[1]} steps of rlr with 16 videos, T = {sizes[0]}"
    )
    print(header)
    print_table(rows)
    write_csv(
        [{key: value for key, value in row.items() if key not in ("rewards", "path")} for row in rows],
        *(os.path.join(args.out, "video_estimators.csv"), header),
    )
    plot(rows, rates, os.path.join(args.out, "video_estimators.png"))
    return rows


if __name__ == "__main__":
    main()
