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
"""Reading checkpoints from files, folders and the Hub.

`one_line_errors` turns failures into ValueErrors that name the file, folder or repository in one line.
"""

import ast
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


# What errors mean whose own messages do not say it. The first match counts. The order matters because GatedRepoError is
# a subclass of RepositoryNotFoundError, and LocalEntryNotFoundError of EntryNotFoundError.
PROBLEMS = (
    (GatedRepoError, "the repository is gated: accept its terms on its page and log in with `hf auth login`"),
    (RepositoryNotFoundError, "there is no such repository, or it is private: log in with `hf auth login`"),
    (RevisionNotFoundError, "the repository has no such revision"),
    (
        (LocalEntryNotFoundError, OfflineModeIsEnabled),
        "the Hub cannot be reached and the files are not in the cache: go online once, or name a local folder (for a"
        " reward with --reward_path NAME=FOLDER, for a model with the flag that names it)",
    ),
    (EntryNotFoundError, "the repository has no such file"),
    (pickle.UnpicklingError, "not a plain checkpoint of tensors: it would run code, or it is damaged"),
    (EOFError, "the file is empty, or its end is missing"),
)


def first_line(error):
    """The first line of an error's message, with the next one after a colon, or the name of its type without a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def one_line_errors(source):
    """Turn every exception within the context into a one-line ValueError that names `source`.

    Args:
        source: the file, folder or Hub repository that is being loaded.
    """
    try:
        yield
    except Exception as error:  # file formats and the Hub's HTTP client raise errors of many types
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        problem = next((text for kinds, text in PROBLEMS if any(isinstance(e, kinds) for e in chain)), None)
        if problem is None and isinstance(error, KeyError):
            problem = f"has no entry {error}"
        if problem is None:
            problem = f"cannot be read: {first_line(error)}"
        raise ValueError(f"{source!r}: {problem}") from error


def existing_file(directory, *names):
    """The path of the first of the files `names` that exists in `directory`.

    Raises:
        ValueError: if none of them exists.
    """
    for name in names:
        if os.path.isfile(os.path.join(directory, name)):
            return os.path.join(directory, name)
    raise ValueError(f"{directory!r} holds no {' or '.join(names)}")


def read_json(file):
    """Read a JSON object as a dict.

    Raises:
        ValueError: if the file does not hold one. The message names the file.
    """
    with one_line_errors(file), open(file, encoding="utf-8") as opened:
        content = json.load(opened)
    if not isinstance(content, dict):
        raise ValueError(f"{file!r} does not hold a JSON object")
    return content


def read_texts(file, names):
    """Read the texts that a Python file assigns to some names, without running it.

    Raises:
        ValueError: if it does not assign a text to each of them. The message names the file.
    """
    with one_line_errors(file), open(file, encoding="utf-8") as opened:
        statements = [node for node in ast.parse(opened.read()).body if isinstance(node, ast.Assign)]
        values = {getattr(node.targets[0], "id", None): node.value for node in statements}
        texts = [ast.literal_eval(values[name]) for name in names]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{' or '.join(names)} is no text")
    return texts


def has_file(directory, name):
    """Whether `directory` is not `None` and contains the file `name`."""
    return directory is not None and os.path.isfile(os.path.join(directory, name))


def rename_keys(state, rules):
    """Rename the keys of a state dict. `rules` are pairs (pattern, replacement), all applied to each key in order."""
    result = {}
    for key, value in state.items():
        for old, new in rules:
            key = re.sub(old, new, key)
        result[key] = value
    return result


def hub_file(repository, name, revision=None):
    """Download a file of a Hub repository, unless it is cached, and return its local path.

    Raises:
        ValueError: if the file cannot be downloaded. The message names the repository.
    """
    with one_line_errors(repository):
        return hf_hub_download(repository, name, revision=revision)


def load_state_dict(file, entry=None):
    """Load the state dict of a .safetensors or torch checkpoint onto the CPU.

    Args:
        entry: key of the state dict in the checkpoint. Default: the checkpoint is the state dict itself.

    Raises:
        ValueError: if the file is damaged, is a pickle that would run code, or holds something else. The message names
            the file.
    """
    with one_line_errors(file):
        is_safe = file.endswith(".safetensors")
        state = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        if entry is not None and isinstance(state, dict):
            state = state[entry]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file!r} does not hold a state dict of tensors")
    return state


def load_pretrained(cls, source, **kwargs):
    """Call `cls.from_pretrained`, but raise an error for weights that do not fit.

    transformers itself would initialise them randomly.

    Args:
        source: a folder or Hub repository. If `kwargs` has `config` and `state_dict`, it is only used in messages.

    Raises:
        ValueError: if the source cannot be loaded, or keys are missing, unexpected or of the wrong shape.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # check_keys reports weights that do not fit
    try:
        with one_line_errors(source):
            model, info = cls.from_pretrained(
                None if "state_dict" in kwargs else source,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
    finally:
        logging.set_verbosity(verbosity)
    check_keys(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


def load_into(module, state, source):
    """Load a state dict into a module.

    Args:
        source: name of the state dict's origin, for messages.

    Raises:
        ValueError: if keys are missing, unexpected or of the wrong shape.
    """
    expected = module.state_dict()
    shapes = [(key, state[key].shape, expected[key].shape) for key in expected.keys() & state.keys()]
    wrong_shape = [(key, found, wanted) for key, found, wanted in shapes if found != wanted]
    check_keys(source, expected.keys() - state.keys(), state.keys() - expected.keys(), wrong_shape)
    module.load_state_dict(state)


def check_keys(source, missing, unexpected, wrong_shape):
    """Check that a checkpoint fits a model.

    Args:
        missing, unexpected: keys.
        wrong_shape: triples (key, shape in the checkpoint, shape in the model).

    Raises:
        ValueError: if any list is not empty. The message has up to six keys of each kind.
    """
    # Older checkpoints store position_ids, which are constants and not weights.
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    wrong_shape = [f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in wrong_shape]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong_shape}
    if any(kinds.values()):
        parts = (
            f"{kind} {sorted(keys)[:6]}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
            for kind, keys in kinds.items()
        )
        raise ValueError(f"{source!r} does not fit: {', '.join(parts)}")
