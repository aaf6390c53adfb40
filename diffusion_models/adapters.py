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
"""The LoRA of a model: adding one, loading one to train it further, saving it as diffusers does."""

import os
from contextlib import contextmanager

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft

from .loading import loading


LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(model, *, rank, alpha, layers, use_dora=False):
    """Give the network a new LoRA, trainable in float32.

    Args:
        model: `DiffusionModel`.
        rank, alpha: of the LoRA; its update is scaled by alpha / rank.
        layers: names of layers of the network.
        use_dora: train a DoRA (huggingface.co/papers/2402.09353).

    Raises:
        ValueError: if the network has none of a layer.
    """
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name, _ in model.network.named_modules()):
            raise ValueError(f"the {model.trained} has no layer {layer!r}")
    model.network.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(layers), use_dora=use_dora
        )
    )
    cast_training_params(model.network, dtype=torch.float32)


def lora_file(source, cache_dir=None):
    """`LORA_FILE` if a folder or Hub repository holds it, else `None`, for adapters under other names.

    Our folders hold others in best/ and ema/ too, between which diffusers could not choose.
    """
    if os.path.exists(source):
        return LORA_FILE if os.path.isfile(os.path.join(source, LORA_FILE)) else None
    try:
        hf_hub_download(source, LORA_FILE, cache_dir=cache_dir)
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:  # the Hub cannot be reached, which loading the adapter will report
        pass
    return LORA_FILE


def load_lora(model, source, cache_dir=None):
    """Give the network the LoRA of a folder, file or Hub repository, to be trained further in float32.

    Raises:
        ValueError: if it cannot be loaded, or has layers of other components, which could be neither trained nor saved.
    """
    pipeline, network = model.pipeline, model.network
    with loading(source):
        options = {"weight_name": lora_file(source, cache_dir), "cache_dir": cache_dir}
        # With its configuration, the layers of SDXL are recognised by the names of other trainers, too.
        layers, _ = pipeline.lora_state_dict(source, unet_config=network.config, **options)
        others = sorted(key for key in layers if not key.startswith(f"{model.trained}."))
        if others:
            raise ValueError(f"it holds more than layers of the {model.trained}, such as {others[0]!r}")
        pipeline.load_lora_weights(source, adapter_name="default", **options)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)
        set_lora(model, layers)  # again: it has been rounded to the network's precision


def set_lora(model, layers):
    """Give the LoRA the weights of a state dict as diffusers saves it, in float32 whatever the network is in.

    Raises:
        ValueError: if the LoRA lacks one of the layers, or has it in another size.
    """
    cast_training_params(model.network, dtype=torch.float32)
    layers = {key.removeprefix(f"{model.trained}."): value for key, value in layers.items()}
    layers = convert_unet_state_dict_to_peft(layers)
    try:
        result = set_peft_model_state_dict(model.network, layers, adapter_name="default")
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if result.unexpected_keys:
        raise ValueError(f"the {model.trained} has no layer {result.unexpected_keys[0]!r}")


def save_lora(model, directory):
    """Write the LoRA into a folder, as `LORA_FILE`, with its configuration in the metadata."""
    network = model.network
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    model.pipeline.save_lora_weights(
        directory, **{f"{model.trained}_lora_layers": layers}, **_collate_lora_metadata({model.trained: network})
    )


def restore_lora(model, directory):
    """Give the LoRA the weights that `save_lora` wrote into a folder.

    Raises:
        ValueError: if they are not of this LoRA.
    """
    layers, _ = model.pipeline.lora_state_dict(directory, weight_name=LORA_FILE)
    set_lora(model, layers)


@contextmanager
def lora_disabled(model):
    """Within it, the network is the base model's, without a second one in memory."""
    model.network.disable_adapters()
    try:
        yield
    finally:
        model.network.enable_adapters()
