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
"""How a run ends: the adapter is saved, compared with the base model, and uploaded."""

import os

import torch
from accelerate.utils import gather_object

from diffusers.training_utils import free_memory

from .before_after import (
    best_adapter,
    compare_with_base,
    drawn_and_scored,
    evaluation_prompts,
    print_comparison,
    print_result,
)
from .errors import RunError, RunStopped, naming, one_line, saving
from .evaluation import load_base
from .hub import push
from .optimizer import averaged
from .output_dir import METRICS_FILE, place_adapter
from .plots import plot_reward_curve
from .processes import frozen_dtype, unlock
from .report import write_run_report
from .shares import Share


STOPPED = "stopped"


def save_result(args, run, step):
    """Write the adapter, its moving average, the reward curve, the model card and the report into the output folder."""
    place_adapter(run.model, args.output_dir, with_kohya=getattr(args, "export_kohya", False))
    if run.optimization.ema is not None:
        with averaged(run.optimization):
            place_adapter(run.model, args.output_dir, "ema")
    metrics_file, curve, card, report = (
        os.path.join(args.output_dir, name) for name in (METRICS_FILE, "reward_curve.png", "README.md", "report.html")
    )
    with saving(curve):
        base = {} if run.heldout is None else run.heldout.base
        plot_reward_curve(metrics_file, curve, list(run.rewards.members), run.rewards.floors, base)
    with saving(card):
        run.save_card(run.command, step)
    with saving(report):
        write_run_report(args, run.command, step, best_adapter(run.stopping, step))


def finish(args, run, step, end):
    """Save the result, compare it with the base model, upload it.

    Args:
        step: the last step that was taken.
        end: from `after_step`, why the run is over.

    Raises:
        RunStopped: if somebody has asked for the end; nothing is saved but the checkpoint.
        RunError: for failures after the adapter has been saved.
    """
    accelerator, failures = run.accelerator, []
    if end == STOPPED:
        accelerator.end_training()
        if not accelerator.is_main_process:
            raise SystemExit(1)
        how = "continue with the same command and --resume_from_checkpoint latest"
        raise RunStopped(f"stopped after step {step}; {how}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with naming(f"step {step}:"):
            save_result(args, run, step)
    accelerator.wait_for_everyone()  # all load what one has saved
    run.model.pipeline.to("cpu", silence_dtype_warnings=True)  # in fp16 it is only kept there
    free_memory()
    # The adapter is already saved; later failures are reported at the end.
    failures = compare_at_the_end(args, run, step)
    if accelerator.is_main_process:
        print_result(args, run.model, run.evaluation_command)
        best = best_adapter(run.stopping, step)
        if best is not None:
            print(best)
        failures += push_at_the_end(args, run)
    accelerator.end_training()
    unlock(args.output_dir)
    if failures:
        raise RunError("; ".join(failures))


def compare_at_the_end(args, run, step):
    """Compare the adapter with the base model on all processes, for the card and on stdout.

    Returns:
        What went wrong, a list of texts, on the main process.

    Raises:
        RunError: with --shard, where this process has failed.
    """
    if args.num_eval_images == 0:
        return []
    prompts, part, failure = evaluation_prompts(args, run.sampler.prompts), None, None
    share = Share(run.accelerator, len(prompts))
    try:
        base = load_base(args, frozen_dtype(args.mixed_precision))
        heldout = None if run.heldout is None else run.heldout.heldout
        part = drawn_and_scored(args, share, run.rewards, heldout, share.of(prompts), base)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        failure = one_line(error)
        if args.shard:  # the others may wait for this process in a call of the network, and end with it
            raise RunError(f"the comparison with the base model has failed: {failure}") from error
    # Also of a process that has failed, or the others would wait for it.
    parts = gather_object([(part, failure)])
    if not run.accelerator.is_main_process:
        return []
    failed = [failure for _, failure in parts if failure is not None]
    if failed:
        return [f"the comparison with the base model has failed: {failed[0]}"]
    try:
        results, failures = compare_with_base(args, share, [part for part, _ in parts], prompts)
        run.save_card(run.command, step, results)
    except (ValueError, OSError) as error:
        return [f"the comparison with the base model has failed: {one_line(error)}"]
    print_comparison(args, results)
    try:
        write_run_report(args, run.command, step, best_adapter(run.stopping, step), results)
    except OSError as error:
        failures.append(f"report.html cannot be written: {one_line(error)}")
    return failures


def push_at_the_end(args, run):
    """Upload the output folder with --push_to_hub; returns what went wrong, a list."""
    if run.repo_id is None:
        return []
    try:
        push(args, run.repo_id, "End of training")
    except ValueError as error:
        return [str(error)]
    return []
