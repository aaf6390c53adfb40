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
"""What is due after an optimizer step: held-out rewards, metrics, checkpoint, validation, upload."""

from accelerate.logging import get_logger
from reward_models.remote import ServiceError

from .checkpoints import save_checkpoint
from .evaluation import log_validation, score_held_out
from .finish import STOPPED, save_result
from .hub import push
from .metrics import log_metrics
from .optimizer import averaged
from .output_dir import place_adapter
from .services import end_for_service


logger = get_logger(__name__, log_level="INFO")


def add_heldout(args, run, step, line):
    """Add the held-out figures to the line of a step, and keep the adapter if it is the best; returns why to stop, or `None`."""
    accelerator = run.accelerator
    with averaged(run.optimization):
        figures, is_best, reason = score_held_out(accelerator, run.heldout, run.stopping, run.draw, step)
        if is_best and accelerator.is_main_process:
            place_adapter(run.model, args.output_dir, "best", getattr(args, "export_kohya", False))
    line.update(figures)
    return reason


def finish_step(args, run):
    """Score the held-out images of the step that a resumed run begins after, if a server failed then."""
    if run.stopping.pending is not None:
        line, run.stopping.pending = run.stopping.pending, None
        add_heldout(args, run, run.first_step, line)
        log_metrics(run.accelerator, args.output_dir, line)


def after_step(args, run, step, line, progress):
    """Do what is due after a step.

    Args:
        run: `Run`.
        line: from `metrics_of`; the held-out figures are added.
        progress: `Progress`.

    Returns:
        Why the run is over: `STOPPED` if somebody has asked for it, the reason of early stopping, or `None`.
    """
    accelerator, reason = run.accelerator, None
    if run.units is not None:
        run.units.update(line)
    if args.heldout_reward is not None and step % args.heldout_steps == 0:
        try:
            reason = add_heldout(args, run, step, line)
        except ServiceError as error:
            run.stopping.pending = line  # for `finish_step` when the run goes on
            end_for_service(args, run, step, error)
    log_metrics(accelerator, args.output_dir, line)
    progress.update(line)
    stopped = accelerator.check_trigger()
    is_last = step == args.max_train_steps or reason is not None
    # What is uploaded can be resumed from, and a finished run can be made longer.
    pushing = args.push_every is not None and step % args.push_every == 0 and not is_last
    if step % args.checkpointing_steps == 0 or stopped or pushing or is_last:
        save_checkpoint(accelerator, args, step, run.optimization.trainable)
    if reason is not None:
        logger.info(reason)
        return reason
    if stopped:
        return STOPPED
    if args.validation_prompts and (step % args.validation_steps == 0 or is_last):
        with averaged(run.optimization):
            log_validation(run.draw, args, accelerator, step)
    if pushing and accelerator.is_main_process:
        save_result(args, run, step)
        try:
            push(args, run.repo_id, f"Step {step}")
        except ValueError as error:
            logger.warning(str(error))
    return None
