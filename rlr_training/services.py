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
"""Rewards that servers score: what a run does when one fails."""

import json
import random
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import gather_object
from reward_models.base import deferred_checks
from reward_models.remote import ServiceError

from .checkpoints import checkpoints_of, save_checkpoint
from .errors import RunError, bad_input_ends_the_run


@contextmanager
def checking_rewards(args, run, step):
    """Within it, the images of a step are drawn and scored.

    The numbers that rewards get and return are checked at its end, all at once, so that no device waits. If a server that
    scores fails, also one that another process asks, the state before the step is saved.

    Args:
        run: `Run`.

    Raises:
        RunError: when a reward fails.
    """
    states = states_of(run) if run.rewards.services else None
    try:
        with bad_input_ends_the_run(), agreeing_on_services(args, run.rewards), deferred_checks():
            yield
    except RunError as error:
        if isinstance(error.__cause__, ServiceError):
            restore(run, states)
            end_for_service(args, run, step - 1, error)
        raise


@contextmanager
def agreeing_on_services(args, *sums):
    """Within it, the processes ask servers, and unless they share a network make no calls in common.

    Args:
        sums: each `WeightedSum` that is scored.

    Raises:
        ServiceError: on all of them, if a server fails for one.
    """
    gone = None
    try:
        yield
    except ServiceError as error:
        if args.shard:  # the others may wait for this one in a call of the network, and end with it
            raise
        gone = str(error)
    if any(rewards.services for rewards in sums) and not args.shard:
        gone = next(filter(None, gather_object([gone])), None)
        if gone is not None:
            raise ServiceError(gone)


def states_of(run):
    """What a step changes before the optimizer: the random states, the prompts drawn, and what RLRStep remembers."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda
    return random_states, run.sampler.position, json.dumps(run.rlr.state_dict())


def restore(run, states):
    """Undo a step that has not changed the adapter yet."""
    (of_python, of_numpy, of_torch, of_cuda), run.sampler.position, remembered = states
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    for device, state in enumerate(of_cuda):
        torch.cuda.set_rng_state(state, device)
    run.rlr.load_state_dict(json.loads(remembered))


def end_for_service(args, run, step, error):
    """Save a checkpoint of a step, unless there is one, and end a run whose server fails.

    Raises:
        RunError: saying how to go on.
    """
    if args.shard:
        raise RunError(f"{error}; continue from the last checkpoint with --resume_from_checkpoint latest") from error
    if step > 0 and step not in checkpoints_of(args.output_dir):
        save_checkpoint(run.accelerator, args, step, run.optimization.trainable)
    raise RunError(
        f"{error}; nothing is lost: when the server is well, continue with the same command and --resume_from_checkpoint latest"
    ) from error
