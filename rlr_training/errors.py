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
"""What ends a run is one line on stderr that names the culprit and the remedy."""

import os
import shutil
from contextlib import contextmanager


# What an error says that is about memory: the CPU's allocator, cuBLAS, cuDNN.
OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
MEMORY_SAVERS = (
    "a smaller --train_batch_size with more --gradient_accumulation_steps, --keep_graphs 0, --decode_batch_size 1,"
    " --gradient_checkpointing, --guidance_batching split, --mixed_precision bf16, --quantize, --offload_blocks,"
    " --vae_offload, or --preset_low_memory"
)


class RunError(Exception):
    """Ends a run with one line that names the culprit and the remedy."""


class RunStopped(RunError):
    """The run ends because somebody asked for it."""


def one_line(error):
    """The message of an error in one line."""
    return " ".join(str(error).split())


def is_out_of_memory(error):
    """Whether a RuntimeError is about memory: for the CPU's and the libraries of CUDA it is no OutOfMemoryError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def errors_in_one_line(script, memory_savers=MEMORY_SAVERS):
    """Around the main of a script: exit with "SCRIPT: error: ..." for a RunError, and for want of memory."""
    try:
        yield
    except RunStopped as error:
        raise SystemExit(f"{script}: {error}") from error
    except RunError as error:
        raise SystemExit(f"{script}: error: {error}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = f"{script}: error: out of memory: use {memory_savers} ({str(error).splitlines()[0]})"
        raise SystemExit(message) from error


@contextmanager
def bad_input_ends_the_run():
    """Within it, a ValueError or OSError, which all packages raise for bad input, is a RunError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError(one_line(error)) from error


@contextmanager
def naming(prefix):
    """Within it, the message of a ValueError or RunError begins with a prefix, such as the flag or step that it is about."""
    try:
        yield
    except RunStopped:
        raise
    except RunError as error:
        raise RunError(f"{prefix} {error}") from error
    except ValueError as error:
        raise ValueError(f"{prefix} {error}") from error


@contextmanager
def saving(path):
    """Within it, a failure to write `path` ends the run. A half-written folder is removed; what was saved before stays."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        raise RunError(
            f"cannot write {path!r}: {one_line(error)}; fix that, and continue from the last checkpoint with"
            " --resume_from_checkpoint latest"
        ) from error
