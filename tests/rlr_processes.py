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
"""The training script in processes of its own, forked from one in which everything has been imported."""

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from multiprocessing import forkserver

import matplotlib.figure  # noqa: F401
import rlr_training.after_step
import rlr_training.evaluation
import rlr_training.finish
import rlr_training.run  # noqa: F401
import torch
from rlr_testing import BASE, ROOT, tiny_model


# A process that has used a pool of threads must not be forked: the copy would wait for them for ever.
torch.set_num_threads(1)
tiny_model()  # diffusers and transformers import most of their modules at the first use only
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
LONGEST = 300  # seconds that two ranks may take


def start_run(output_dir, *flags, script="train_rlr_sd", **environment):
    """Start a run of the training script on the embedded models; returns the process.

    Args:
        output_dir: of the run. What the process prints goes to a file beside it, see `printed_by`.
        script: the module of the training script.
        environment: further variables of the process.
    """
    return start(_run_script, script, [*BASE, "--output_dir", str(output_dir), *flags], log=output_dir, **environment)


def start(function, *args, log, **environment):
    """Start function(*args) in a process of its own; returns the process.

    Args:
        function: of a module that can be imported.
        log: where the process prints to, see `printed_by`.
        environment: further variables of the process.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the process that imports; it does not get sys.path
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    process = CONTEXT.Process(target=_call, args=(function, args, f"{log}.log", environment))
    process.start()
    return process


def _call(function, args, log, environment):
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    function(*args)


def _run_script(script, arguments):
    module = importlib.import_module(script)
    module.main(module.parse_args(arguments))


def printed_by(output_dir):
    """All that the runs with an output folder have printed so far."""
    with open(f"{output_dir}.log", encoding="utf-8") as file:
        return file.read()


def run(output_dir, *flags, **environment):
    """`start_run` until its end, which must be without an error."""
    process = start_run(output_dir, *flags, **environment)
    process.join()
    assert process.exitcode == 0, printed_by(output_dir)


def run_two_ranks(output_dir, *flags, script="train_rlr_sd"):
    """A run on two ranks, as torchrun starts them; it must end without an error."""
    arguments = [*BASE, "--output_dir", str(output_dir), *flags]
    call_on_two_ranks(_run_script, script, arguments, log=output_dir)


def fail_on_two_ranks(output_dir, *flags):
    """A run on two ranks, both of which must end with an error; returns what they have printed."""
    arguments = [*BASE, "--output_dir", str(output_dir), *flags]
    assert exit_codes(_run_script, "train_rlr_sd", arguments, log=output_dir) == [1, 1]
    return printed_by(output_dir)


def torchrun(output_dir, *flags):
    """A run of two ranks by torchrun itself, which may fail; returns the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, os.path.join(ROOT, "train_rlr_sd.py"), *BASE, "--output_dir", str(output_dir), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)


def call_on_two_ranks(function, *args, log):
    """function(*args) on two ranks, as torchrun starts them; it must end without an error, and neither may wait for ever.

    Args:
        function, log: as for `start`.
    """
    assert exit_codes(function, *args, log=log) == [0, 0], printed_by(log)


def exit_codes(function, *args, log):
    """Those of the two ranks of `call_on_two_ranks`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start(function, *args, log=log, **shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    for rank in ranks:
        rank.join(LONGEST)
    for rank in ranks:
        if rank.is_alive():  # and will wait for ever
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]
