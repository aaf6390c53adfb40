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
"""Reading LoRA files: the layouts that trainers write, as the update of each layer.

| layout | the first matrix of a layer | its scale |
|---|---|---|
| diffusers | `unet.mid_block...to_q.lora.down.weight`, `...lora_A.weight`, `...processor.to_q_lora.down.weight` | metadata |
| PEFT | `base_model.model.mid_block...to_q.lora_A.weight` | adapter_config.json |
| kohya | `lora_unet_mid_block_..._to_q.lora_down.weight`, or with the original names of `original_names` | a tensor `.alpha` |

Layers of a transformer have the prefixes `transformer.` and `lora_transformer_` instead, and the names of diffusers only.

Everything else in a file is refused by name. diffusers skips what it does not know, and of several alphas takes the most
frequent for most layers, so that an adapter would be half there.
"""

import os
import re
from typing import NamedTuple, Optional

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import safe_open

from .lora_config import PEFT_CONFIG, PEFT_PREFIX, read_configs, scale_of
from .original_names import original_names


LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"

# Components that may be trained. A pipeline has one of them, to which keys without a component belong.
TRAINED = ("unet", "transformer")
# The second transformer of a pipeline that has two, whose LoRA is a file of its own, with the keys of one of the first.
SECOND, SECOND_FILE = "transformer_2", "pytorch_lora_weights_2.safetensors"
# {component: its prefixes in the layout of kohya}
PREFIXES = {
    "unet": ("lora_unet",),
    "transformer": ("lora_transformer",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
KEY = re.compile(
    r"(?P<layer>.+?)(?:\.lora|_lora|\.lora_linear_layer)?"
    r"\.(?P<part>(?:lora_)?(?:down|up)|lora_[AB]|alpha|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
PARTS = {"lora_A": "A", "lora_down": "A", "down": "A", "lora_B": "B", "lora_up": "B", "up": "B"}


class LayerUpdate(NamedTuple):
    """What a LoRA adds to the weight W of a layer: scale * B.flatten(1) @ A.flatten(1), in the shape of W.

    Attributes:
        A: (rank, *W.shape[1:]) in float32.
        B: (len(W), rank) for a linear layer, (len(W), rank, 1, 1) for a convolution, in float32.
        scale: alpha / rank, or with rslora alpha / rank ** 0.5.
        magnitude: of a DoRA, as many numbers as W has rows, else `None`.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: Optional[torch.Tensor] = None


# Finding a file


def find_loras(source, pipeline, cache_dir=None):
    """{component: the path of its LoRA} in a folder, file or Hub repository.

    Of a pipeline with two transformers there may be a LoRA of one or of both, `LORA_FILE` and `SECOND_FILE`.

    Raises:
        ValueError, OSError: if there is none, if it cannot be told which one, or if the Hub cannot be reached.
    """
    if pipeline.components.get(SECOND) is None:
        return {next(name for name in TRAINED if name in pipeline.components): find_lora(source, cache_dir)}
    if os.path.isfile(source):
        raise ValueError(
            f"the model has two transformers: give a folder with {LORA_FILE!r} or {SECOND_FILE!r}, or both"
        )
    found = {}
    for component, name in (("transformer", LORA_FILE), (SECOND, SECOND_FILE)):
        try:
            path = os.path.join(source, name) if os.path.isdir(source) else _download(source, name, cache_dir)
        except EntryNotFoundError:
            continue
        if os.path.isfile(path):
            found[component] = path
    if not found:
        raise ValueError(f"it holds neither {LORA_FILE!r} nor {SECOND_FILE!r}, and the model has two transformers")
    return found


def find_lora(source, cache_dir=None):
    """The path of the LoRA of a folder, file or Hub repository.

    It is `LORA_FILE`, or else PEFT's, or else the only file of weights. Our folders hold others in best/ and ema/ too.

    Raises:
        ValueError, OSError: if there is none, if there are several, or if the Hub cannot be reached.
    """
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        return os.path.join(source, _choose(os.listdir(source)))
    try:
        for name in (LORA_FILE, PEFT_FILE):
            try:
                return _download(source, name, cache_dir)
            except EntryNotFoundError:
                continue
        return _download(source, _choose(list_repo_files(source)), cache_dir)
    except HFValidationError as error:
        raise ValueError("there is no such file or folder") from error


def _download(repository, name, cache_dir):
    if name == PEFT_FILE:
        hf_hub_download(repository, PEFT_CONFIG, cache_dir=cache_dir)
    return hf_hub_download(repository, name, cache_dir=cache_dir)


def _choose(names):
    """The file with the LoRA among the names of a folder."""
    for name in (LORA_FILE, PEFT_FILE):
        if name in names:
            return name
    others = ("optimizer", "scheduler", "checkpoint")
    for ending in (".safetensors", ".bin"):
        found = sorted(name for name in names if name.endswith(ending) and not any(other in name for other in others))
        if len(found) > 1:
            raise ValueError(
                f"it holds {len(found)} files, such as {found[0]!r} and {found[1]!r}: give the path of one"
            )
        if found:
            return found[0]
    raise ValueError(f"it holds no file of weights, such as {LORA_FILE!r}")


# Reading it


def read_lora(path, pipeline):
    """The updates in a LoRA file, checked against the layers of a pipeline.

    Args:
        path: of a .safetensors file, or of one that torch.load reads without running code.
        pipeline: of diffusers, with a U-Net or a transformer.

    Returns:
        {component of the pipeline: {name of a layer: `LayerUpdate`}}, of which none is empty.

    Raises:
        ValueError: naming the tensor or the entry that is not one of a LoRA for this model.
    """
    tensors, header = _read_tensors(path)
    # Not all that the pipeline has: diffusers adapts no other text encoders than CLIP's.
    components = [name for name in PREFIXES if name in pipeline._lora_loadable_modules]
    (trained,) = (name for name in components if name in TRAINED)
    configs = read_configs(path, tensors, header, components, trained)
    spellings = _spellings(pipeline, components)
    found = {}
    for key, tensor in tensors.items():
        place, part = _place_of(key, spellings)
        _check_tensor(key, tensor, part)
        parts = found.setdefault(place, {})
        if part in parts:
            raise ValueError(f"{parts[part][0]!r} and {key!r} are the same matrix in two layouts")
        parts[part] = key, tensor
    if not found:
        raise ValueError("it holds no tensors")
    updates = {}
    for (component, name), parts in found.items():
        shape = getattr(pipeline, component).get_submodule(name).weight.shape
        if configs and component not in configs:
            raise ValueError(f"it has layers of the {component}, and no configuration of them")
        update = _update(parts, shape, configs.get(component), _names_in_files(component, name))
        updates.setdefault(component, {})[name] = update
    return updates


def _read_tensors(path):
    """({key: tensor}, {key: text} of the header)."""
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    return tensors, {}


def _spellings(pipeline, components):
    """{how files spell a layer: (component, name)}, of all linear and convolutional layers of some components."""
    found = {}
    for component in components:
        network = getattr(pipeline, component, None)
        if network is None:
            continue
        originals = original_names(network) if component == "unet" else {}
        for name, module in network.named_modules():
            if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) or ".lora_" in name:
                continue
            name = name.removesuffix(".base_layer")  # of a layer that has an adapter already
            for spelled in {*_names_in_files(component, name), originals.get(name, name)}:
                for prefix in PREFIXES[component]:
                    found[f"{prefix}_{spelled.replace('.', '_')}"] = component, name
                found[f"{component}.{spelled}"] = component, name
                if component in TRAINED:
                    found[spelled] = component, name
    return found


def _names_in_files(component, name):
    """How a layer was called by the versions of diffusers and transformers that have written files."""
    if component == "unet":
        return name, name.removesuffix(".0") if name.endswith("to_out.0") else name
    if component == "transformer":
        return (name,)
    return name, f"text_model.{name.removeprefix('text_model.')}"


def _place_of(key, spellings):
    """((component, name), part) of a tensor."""
    match = KEY.fullmatch(key.removeprefix(PEFT_PREFIX).replace(".processor.", "."))
    if match is None:
        raise ValueError(f"{key!r} is no matrix of a LoRA, and other kinds of adapters are not supported")
    place = spellings.get(match["layer"])
    if place is None:
        raise ValueError(f"{key!r}: the base model has no such linear or convolutional layer")
    return place, PARTS.get(match["part"], match["part"])


def _check_tensor(key, tensor, part):
    """Raise ValueError for what is not a matrix of finite numbers, or for an alpha or a magnitude not a few of them."""
    if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or part == "alpha"):
        raise ValueError(f"{key!r} has no floating-point numbers")
    if part in ("A", "B") and (tensor.ndim not in (2, 4) or tensor.numel() == 0):
        raise ValueError(f"{key!r} is no matrix, it has the shape {list(tensor.shape)}")
    if part == "alpha" and (tensor.numel() != 1 or tensor.item() == 0):
        raise ValueError(f"{key!r} is not one number other than 0")
    if not tensor.float().isfinite().all():
        raise ValueError(f"{key!r} has numbers that are not finite in float32")


def _update(parts, shape, config, names):
    """The `LayerUpdate` of the tensors of a layer.

    Args:
        parts: {part: (key, tensor)}.
        shape: of the layer's weight.
        config: of its component, or `None`.
        names: of the layer, as a configuration may spell it.
    """
    for part, which in (("A", "first"), ("B", "second")):
        if part not in parts:
            raise ValueError(f"{next(iter(parts.values()))[0]!r} is without the {which} matrix of its layer")
    (key, A), (_, B), rank = parts["A"], parts["B"], len(parts["A"][1])
    if A.numel() != rank * shape[1:].numel() or B.numel() != shape[0] * rank or len(B) != shape[0]:
        raise ValueError(
            f"{key!r}: matrices of the shapes {list(A.shape)} and {list(B.shape)} do not fit a weight of the shape"
            f" {list(shape)}"
        )
    alpha, magnitude = parts.get("alpha"), parts.get("lora_magnitude_vector")
    is_dora = magnitude is not None or config is not None and config.get("use_dora")
    if is_dora and (magnitude is None or magnitude[1].numel() != shape[0]):
        raise ValueError(f"{key!r}: its layer is without {shape[0]} magnitudes")
    if alpha is not None and config is not None:
        raise ValueError(f"{alpha[0]!r}: its layer has another alpha in the metadata")
    scale = 1.0 if alpha is None else alpha[1].item() / rank
    return LayerUpdate(
        A.float().reshape(rank, *shape[1:]),
        B.float().reshape(shape[0], rank, *[1] * len(shape[2:])),
        scale if config is None else scale_of(config, names, rank),
        None if magnitude is None else magnitude[1].float(),
    )
