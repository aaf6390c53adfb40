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
"""The configuration of a LoRA, which diffusers writes into a file's header and PEFT into a file beside it."""

import json
import math
import os
from dataclasses import fields

from peft import LoraConfig
from peft.utils.other import get_pattern_key


METADATA = "lora_adapter_metadata"  # the key of diffusers in a header
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # of the tensors' keys in PEFT's layout

# Entries that change nothing where the layers and their matrices are known.
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "task_type", "fan_in_fan_out"),
    *("lora_dropout", "megatron_core", "qalora_group_size"),
)
NUMBERS, PATTERNS = ("r", "lora_alpha"), ("rank_pattern", "alpha_pattern")
UNDERSTOOD = (*WITHOUT_EFFECT, *NUMBERS, *PATTERNS, "use_rslora", "use_dora", "init_lora_weights")
# Initialisations that leave the weights of the base model as they are.
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_configs(path, keys, header, components, trained):
    """The configurations of a file's layers, {component: {entry: value}}, empty if it has none.

    Args:
        path: of the file.
        keys: of its tensors.
        header: {key: text}.
        components: that it may have layers of.
        trained: the component of the entries that name none.

    Raises:
        ValueError: naming what is not the configuration of a plain LoRA or DoRA.
    """
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        beside = os.path.join(os.path.dirname(path), PEFT_CONFIG)
        if not os.path.isfile(beside):
            raise ValueError(f"it is in PEFT's layout, and there is no {PEFT_CONFIG} beside it")
        with open(beside, encoding="utf-8") as file:
            configs = {trained: _parse(file.read(), PEFT_CONFIG)}
    else:
        configs = {}
        for key, value in _parse(header.get(METADATA, "{}"), f"metadata {METADATA!r}").items():
            component, _, entry = key.rpartition(".")
            if component and component not in components:
                raise ValueError(f"its metadata has the key {key!r}, of no component of the base model")
            configs.setdefault(component or trained, {})[entry] = value
    for config in configs.values():
        _check_entries(config)
        _check_numbers(config)
    return configs


def scale_of(config, names, rank):
    """The scale of a layer: alpha / rank, or with rslora alpha / rank ** 0.5.

    Args:
        config: from `read_configs`.
        names: of the layer, of which its patterns may know any.
        rank: of the layer in the file.

    Raises:
        ValueError: if it has another rank in the configuration.
    """
    found = {}
    for key, pattern in zip(NUMBERS, PATTERNS):
        pattern = config.get(pattern) or {}
        matches = (get_pattern_key(pattern, name) for name in names)
        found[key] = next((pattern[match] for match in matches if match in pattern), config[key])
    if found["r"] != rank:
        raise ValueError(f"its configuration has rank {found['r']} for {names[0]!r}, and the file {rank}")
    return found["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def _parse(text, what):
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its {what} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"its {what} is not a JSON object with the entries of a LoRA's configuration")
    return content


def _check_entries(config):
    """Raise ValueError for an entry that makes it something else than a plain LoRA or DoRA."""
    known, defaults = {field.name for field in fields(LoraConfig)}, LoraConfig().to_dict()
    for key, value in config.items():
        if key not in known and value:  # one without a value asks for nothing
            raise ValueError(f"its configuration has the key {key!r}, which peft does not know")
        if key not in UNDERSTOOD and (value or None) != (defaults.get(key) or None):
            raise ValueError(f"its configuration has {key} {value!r}, which is not supported")
    if config.get("init_lora_weights") not in INITIALISATIONS:
        raise ValueError(
            f"its configuration has init_lora_weights {config['init_lora_weights']!r}, which changes the base model"
        )


def _check_numbers(config):
    """Raise ValueError for a rank or an alpha that is not a number, or is not there."""
    for key in NUMBERS:
        if key not in config:
            raise ValueError(f"its configuration has no {key!r}")
        _check_number(key, config[key])
    for key in PATTERNS:
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"its configuration has {key} {pattern!r}, not numbers by layer")
        for layer, value in pattern.items():
            _check_number(f"{key} of {layer!r}", value)


def _check_number(what, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0 or not math.isfinite(value):
        raise ValueError(f"its configuration has {what} {value!r}, not a number other than 0")
