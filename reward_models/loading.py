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
"""Reading checkpoints: what cannot be read is a ValueError of one line that names the file or repository."""

import json
import os
import pickle
import re
from contextlib import contextmanager

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from transformers.utils import logging


# The first that fits: GatedRepoError is a RepositoryNotFoundError, and LocalEntryNotFoundError an EntryNotFoundError.
HUB_PROBLEMS = (
    (GatedRepoError, "the repository is gated: accept its terms on its page and log in with `hf auth login`"),
    (RepositoryNotFoundError, "there is no such repository, or it is private: log in with `hf auth login`"),
    (RevisionNotFoundError, "the repository has no such revision"),
    (
        (LocalEntryNotFoundError, OfflineModeIsEnabled),
        "the Hub cannot be reached and the files are not in the cache: go online once, or name a local folder",
    ),
    (EntryNotFoundError, "the repository has no such file"),
)


def first_line(error):
    """What an error says, in one line, or what it is if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def loading(source):
    """Within it, every way in which the file, folder or Hub repository `source` fails to load is a ValueError."""
    try:
        yield
    except Exception as error:  # the formats and the Hub's HTTP client have errors of their own
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        problem = next((text for kinds, text in HUB_PROBLEMS if any(isinstance(e, kinds) for e in chain)), None)
        if problem is None and any(isinstance(e, pickle.UnpicklingError) for e in chain):
            problem = "no plain checkpoint of tensors: it would run code, or is damaged"
        if problem is None:
            problem = f"cannot be read: {first_line(error)}"
        raise ValueError(f"{source!r}: {problem}") from error


def existing_file(directory, *names):
    """The path of the first of `names` that is a file in `directory`.

    Raises:
        ValueError: if none is.
    """
    for name in names:
        if os.path.isfile(os.path.join(directory, name)):
            return os.path.join(directory, name)
    raise ValueError(f"{directory!r} holds no {' nor '.join(names)}")


def read_json(file):
    """What a JSON file holds."""
    with open(file, encoding="utf-8") as opened:
        return json.load(opened)


def holds(directory, name):
    """Whether there is a directory, and the file in it."""
    return directory is not None and os.path.isfile(os.path.join(directory, name))


def renamed(state, rules):
    """Tensors under other names: `rules` are pairs of a pattern and its replacement, applied one after the other."""
    result = {}
    for key, value in state.items():
        for old, new in rules:
            key = re.sub(old, new, key)
        result[key] = value
    return result


def hub_file(repository, name, revision=None):
    """The local path of one file of a Hub repository."""
    with loading(repository):
        return hf_hub_download(repository, name, revision=revision)


def load_state_dict(file):
    """The tensors of a .safetensors or a torch checkpoint, on the CPU; a pickle that would run code is refused."""
    with loading(file):
        if file.endswith(".safetensors"):
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)


def load_pretrained(cls, source, **kwargs):
    """`cls.from_pretrained`, that refuses what does not fit instead of filling it with random numbers.

    Args:
        source: a folder or Hub repository; with `config` and `state_dict` among `kwargs`, just the name for errors.

    Raises:
        ValueError: naming the source, and the missing, unexpected or misshapen keys.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is reported below
    try:
        with loading(source):
            model, info = cls.from_pretrained(
                None if "state_dict" in kwargs else source,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
    finally:
        logging.set_verbosity(verbosity)
    check_keys(source, info["missing_keys"], info["unexpected_keys"], [key for key, *_ in info["mismatched_keys"]])
    return model


def load_into(module, state, source):
    """Load tensors into a module, strictly.

    Raises:
        ValueError: naming the source, and the missing, unexpected or misshapen keys.
    """
    own = module.state_dict()
    misshapen = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    check_keys(source, own.keys() - state.keys(), state.keys() - own.keys(), misshapen)
    module.load_state_dict(state)


def check_keys(source, missing, unexpected, misshapen):
    """Refuse a checkpoint that does not fit; a few keys of each kind tell which model it is of."""
    # Positions are counted, not learned: older checkpoints hold them all the same.
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    kinds = {"missing": missing, "unexpected": unexpected, "other shape": misshapen}
    if any(kinds.values()):
        parts = (
            f"{kind} {sorted(keys)[:6]}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
            for kind, keys in kinds.items()
        )
        raise ValueError(f"{source!r} does not fit: {', '.join(parts)}")
