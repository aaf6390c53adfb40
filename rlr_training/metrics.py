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
"""What is logged of an optimizer step, and the plan of a run."""

import datetime
import json
import math
import os
import time

import torch
from accelerate.logging import get_logger
from rlr_utils import prediction_weights
from tqdm.auto import tqdm

from .chains import kind_of
from .display import shown
from .errors import saving
from .optimizer import images_of_a_step
from .output_dir import METRICS_FILE


logger = get_logger(__name__, log_level="INFO")

# The share of a step's work from which the decoding of predicted images is worth a smaller decoder.
LARGE_SHARE = 0.2


def print_plan(accelerator, args, rlr, schedule, chain, sampler, trainable, costs, expected):
    """Print the arithmetic of the run as one table.

    Args:
        rlr: `RLRStep`.
        schedule: one of its schedules.
        chain: of a batch.
        sampler: `PromptSampler`.
        trainable: the parameters that are trained.
        costs: `Costs`.
        expected: `Footprint`.
    """
    images, num_prompts, kind = images_of_a_step(args, accelerator), len(sampler.prompts), kind_of(args)
    epochs = args.max_train_steps * images / (num_prompts * args.images_per_prompt)
    extra = {
        "predictions": len(rlr.predicted_steps(schedule)),
        "branches": 2 * args.branches,
        "other last steps": args.lv_samples if args.gradient_estimator == "draft_lv" else 0,
    }
    rows = {
        "model": args.pretrained_model_name_or_path,
        "reward": args.reward + (", normalized" if args.reward_normalize else ""),
        **({"reward floors": ", ".join(args.reward_floor)} if args.reward_floor else {}),
        "gradient estimator": args.gradient_estimator,
        "prompts": num_prompts,
        f"{kind}s per step": f"{images} = {args.train_batch_size} batch x {args.gradient_accumulation_steps}"
        f" accumulation x {accelerator.num_processes} ranks",
        "network calls per step": _describe_calls(args, rlr, schedule, chain, images),
        f"{kind}s scored per step": f"{images * (1 + sum(extra.values()))}"
        + (f" = {images}" if any(extra.values()) else "")
        + "".join(f" + {number} {what} of each" for what, number in extra.items() if number),
        "work per step": _describe_work(args, rlr, schedule, costs, images),
        "memory per device": expected,
        "weight of the steps": _describe_weights(chain),
        "steps": f"{args.max_train_steps} = {epochs:.1f} passes over the prompts",
        "trainable parameters": f"{sum(p.numel() for p in trainable):,}",
    }
    width = max(map(len, rows))
    accelerator.print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))


def _describe_weights(chain):
    """What the predictions of the last steps are worth."""
    weights = prediction_weights(chain.steps)
    counts = range(1, min(len(weights), 4))
    return ", ".join(f"{100 * sum(weights[-n:]):.2g} % the last{'' if n == 1 else f' {n}'}" for n in counts) or "100 %"


def _describe_calls(args, rlr, schedule, chain, images):
    """How often the network is called in an optimizer step, in forward passes for one image without guidance."""
    calls = rlr.expected_calls(schedule)
    guided = 2 if chain.guided else 1
    forwards, swept = (round(guided * images * number) for number in (calls.forward, calls.swept))
    leaves_out = min(schedule.probabilities.values()) < 1
    is_drawn = leaves_out or args.branches or args.gradient_estimator == "alignprop"
    return (
        f"{forwards} forward + {swept} with backward"
        + (" (on average)" if is_drawn else "")
        + (f", the latter x {args.num_inner_epochs} inner epochs" if args.num_inner_epochs > 1 else "")
        + (", at first" if args.sweep_fraction == "auto" and leaves_out else "")
    )


def _describe_work(args, rlr, schedule, costs, images):
    """The arithmetic of an optimizer step, and what would save much of it."""
    calls, predictions = rlr.expected_calls(schedule), len(rlr.predicted_steps(schedule))
    network = costs.forward * calls.forward + costs.swept * calls.swept * args.num_inner_epochs
    predicting = costs.predict * predictions
    total = network + predicting + costs.decode
    text = f"{images * total / 1e12:.3g} TFLOP, and what the rewards take; a step with backward takes"
    text += f" {costs.swept / costs.forward:.2f} times as much as a forward pass"
    share = predicting / total
    if share > LARGE_SHARE:
        text += f"; {100 * share:.0f} % of it decode predictions"
        text += "" if args.baseline_vae else ", which --baseline_vae does for less"
    return text


def gather_scores(accelerator, scorers):
    """{"total", names of rewards...} -> (N,), the scores of the images of all batches and ranks.

    Args:
        scorers: the `BatchScorer` of each batch.
    """
    names = scorers[0].scores
    return accelerator.gather({name: torch.cat([scorer.scores[name] for scorer in scorers]) for name in names})


def metrics_of(step, scores, statistics, grad_norm, learning_rate, seconds):
    """The line of an optimizer step in metrics.jsonl.

    Args:
        scores: from `gather_scores`.
        statistics: what `RLRStep.backward` returned, of each inner epoch.
        grad_norm: before clipping.
        seconds: that the step has taken.
    """
    num_images = len(scores["total"])
    figures = {
        name: (values.mean().item(), values.std(correction=int(num_images > 1)).item())
        for name, values in scores.items()
    }
    line = {
        "step": step,
        "reward_mean": figures["total"][0],
        "reward_std": figures["total"][1],
        "num_images": num_images,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "gamma_mean": statistics[0]["gamma_mean"],
        "predicted_steps": statistics[0]["predicted_steps"],
        "swept_steps": statistics[0]["swept_steps"],
        "seconds": seconds,
        "images_per_second": num_images / seconds,
        "learning_rate": learning_rate,
    }
    for name in ("kl", "clip_fraction"):
        if name in statistics[0]:
            line[name] = sum(one[name] for one in statistics) / len(statistics)
    for name, (mean, std) in figures.items():
        if name != "total":
            line[f"{name}_mean"], line[f"{name}_std"] = mean, std
    return line


def start_trackers(accelerator, config, tracker, first_step):
    """Open the trackers of --report_to, on the main process."""
    if accelerator.is_main_process:
        # TensorBoard takes no lists.
        shown = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.items()}
        accelerator.init_trackers(tracker, shown, {"tensorboard": {"purge_step": first_step + 1}})


def trim_metrics(output_dir, last_step):
    """Keep the lines of metrics.jsonl up to a step: the later ones will be taken again."""
    path, kept = os.path.join(output_dir, METRICS_FILE), []
    if last_step > 0 and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            # A killed run may have left its last line unfinished.
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(path + ".partial", path)


def log_metrics(accelerator, output_dir, line):
    """Append the line to metrics.jsonl and hand it to the trackers."""
    if accelerator.is_main_process:
        path = os.path.join(output_dir, METRICS_FILE)
        with saving(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=line["step"])


class Progress:
    """A progress bar over the optimizer steps, a log line that estimates how long the run takes, and a warning of a reward
    that teaches nothing.
    """

    def __init__(self, accelerator, first_step, num_steps):
        self.first_step, self.num_steps = first_step, num_steps
        show = accelerator.is_local_main_process
        self.bar = tqdm(total=num_steps, initial=first_step, desc="Steps", disable=not show)
        self.times = []
        self.silent, self.last_mean = 0, None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def update(self, line):
        """Take in the metrics of a step that has ended."""
        self.bar.update()
        self.bar.set_postfix(reward=shown(line["reward_mean"], line["reward_std"]), seconds=f"{line['seconds']:.2f}")
        self._watch(line)
        self.times.append(time.perf_counter())
        if len(self.times) == 3:  # the first step is slower than the others
            per_step, num_steps = (self.times[2] - self.times[0]) / 2, self.num_steps - self.first_step
            total = datetime.timedelta(seconds=round(per_step * num_steps))
            logger.info(
                f"about {total} for {num_steps} steps in all, at {per_step:.1f} seconds a step as the last two"
            )

    def _watch(self, line):
        """Warn after three steps in a row without a gradient, or in which all images scored the same."""
        mean, alone = line["reward_mean"], line["num_images"] == 1
        is_constant = line["reward_std"] == 0 and (not alone or mean == self.last_mean)
        self.silent = self.silent + 1 if is_constant or line["grad_norm"] == 0 else 0
        self.last_mean = mean
        if self.silent == 3:
            logger.warning(
                f"the last steps had no signal: every image scored {mean:g}, or the gradient was 0; nothing is learnt from a"
                " reward that does not tell images apart"
            )
