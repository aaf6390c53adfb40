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
"""The LoRA of a model: adding one, loading one in any layout, saving it as diffusers and other programs read it."""

import os
from collections import Counter
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers.training_utils import _collate_lora_metadata, cast_training_params

from .loading import loading
from .lora_files import LORA_FILE, SECOND, SECOND_FILE, TRAINED, find_loras, read_lora
from .lora_layer import LoraLinear, cast_in_forward
from .original_names import original_names


KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"


def add_lora(model, *, rank, alpha, layers):
    """Give each of the networks a new LoRA, trainable in float32.

    Args:
        model: `DiffusionModel`.
        rank, alpha: of the LoRA; its update is scaled by alpha / rank.
        layers: names of layers of the networks.

    Raises:
        ValueError: if a network has none of a layer.
    """
    for component, network in model.networks.items():
        for layer in layers:
            if not any(name == layer or name.endswith(f".{layer}") for name, _ in network.named_modules()):
                raise ValueError(f"the {component} has no layer {layer!r}")
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(layers))
        _add_trained(network, config)


def _add_trained(network, config):
    """Add the adapter that is trained, in float32 and of `LoraLinear`s where its layers are linear."""
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    network.add_adapter(config)
    cast_training_params(network, dtype=torch.float32)
    cast_in_forward(network)


# Loading


def load_lora(model, source, cache_dir=None):
    """Give the networks the LoRA of a folder, file or Hub repository, to be trained further in float32.

    Its ranks and its scale are kept. If the layers have different scales, those go into the matrices, and the scale is 1.

    Raises:
        ValueError: if it cannot be loaded, is a DoRA, or has layers of other components, which could be neither trained nor
            saved.
    """
    with loading(source):
        paths = find_loras(source, model.pipeline, cache_dir)
        if paths.keys() != model.networks.keys():
            raise ValueError(
                f"it is a LoRA of {' and '.join(paths)}, and {' and '.join(model.networks)} would be trained"
            )
        found = {name: _layers_to_train(model, path) for name, path in paths.items()}
        for name, layers in found.items():
            _add_trained(model.networks[name], _config_of(model.networks[name], layers))
            _set_layers(model.networks[name], layers)


def load_adapter(pipeline, source, name, cache_dir=None):
    """Give a pipeline the LoRA or DoRA of a folder, file or Hub repository under a name, in the precision of its components.

    Raises:
        ValueError: if it cannot be loaded.
    """
    with loading(source):
        found = {}
        for component, path in find_loras(source, pipeline, cache_dir).items():
            layers = read_lora(path, pipeline)
            found |= {SECOND: layers["transformer"]} if component == SECOND else layers
        for component, layers in found.items():
            network = getattr(pipeline, component)
            config = _config_of(network, layers)
            if component in (*TRAINED, SECOND):
                network.add_adapter(config, adapter_name=name)
            else:  # the same of the library transformers may need another version of peft than diffusers
                inject_adapter_in_model(config, network, adapter_name=name)
            _set_layers(network, layers, name)


def restore_lora(model, directory):
    """Give the LoRA the weights that `save_lora` wrote into a folder.

    Raises:
        ValueError: if they cannot be read, or are not of this LoRA.
    """
    for component, name in files_of(model).items():
        path = os.path.join(directory, name)
        with loading(path):
            _set_layers(model.networks[component], _layers_to_train(model, path))


def files_of(model):
    """{component that gets a LoRA: the name of the file that holds it}."""
    return {component: SECOND_FILE if component == SECOND else LORA_FILE for component in model.networks}


def _layers_to_train(model, path):
    """{name: `LayerUpdate`} of a file, for a network."""
    components = read_lora(path, model.pipeline)
    others = sorted(components.keys() - {model.trained})
    if others:
        raise ValueError(f"it has layers of the {others[0]}, and only the {model.trained} is trained")
    if any(layer.magnitude is not None for layer in components[model.trained].values()):
        # peft's gradient holds the norm of the weights fixed.
        raise ValueError("it is a DoRA, whose gradient peft approximates: use a LoRA")
    return components[model.trained]


def _config_of(network, layers):
    """The `LoraConfig` of layers {name: `LayerUpdate`}, with their common scale, or 1 if they have none."""
    scales = {layer.scale for layer in layers.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ranks = {name: len(layer.A) for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # peft finds a layer by the end of its name; the ^ makes that the whole name, as diffusers does.
    others = {f"^{name}": own for name, own in ranks.items() if own != rank}
    doras = {layer.magnitude is not None for layer in layers.values()}
    if len(doras) > 1:
        raise ValueError("some of its layers have the magnitudes of a DoRA, and some do not")
    return LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        rank_pattern=others,
        alpha_pattern={name: scale * own for name, own in others.items()},
        target_modules=list(layers),
        exclude_modules=_layers_named_alike(network, layers) or None,
        use_dora=doras.pop(),
    )


def _layers_named_alike(network, layers):
    """Names of modules that end in the name of a layer: peft would adapt those, too. FLUX has several "proj_out"."""
    found = []
    for name, _ in network.named_modules():
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(1, len(parts)))
        if name not in layers and any(end in layers for end in ends):
            found.append(name)
    return found


@torch.no_grad()
def _set_layers(network, layers, adapter="default"):
    """Write layers {name: `LayerUpdate`} into an adapter that is there, whose own scales take effect.

    Raises:
        ValueError: if the adapter has other layers, or has them in other sizes.
    """
    own = _lora_layers(network, adapter)
    for name in sorted(own.keys() ^ layers.keys()):
        raise ValueError(
            f"the adapter has the layer {name!r}" if name in own else f"the adapter has no layer {name!r}"
        )
    for name, layer in layers.items():
        module = own[name]
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if (A.shape, B.shape) != (layer.A.shape, layer.B.shape):
            raise ValueError(f"size mismatch for {name!r}: {list(A.shape)} and {list(layer.A.shape)}")
        A.copy_(layer.A)
        B.copy_(layer.B * (layer.scale / module.scaling[adapter]))
        if layer.magnitude is not None:
            magnitude = module.lora_magnitude_vector[adapter].weight
            magnitude.copy_(layer.magnitude.reshape(magnitude.shape))


def _lora_layers(network, adapter="default"):
    """{name: peft's layer} of an adapter."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


# Saving


def save_lora(model, directory):
    """Write the LoRA into a folder, as `LORA_FILE`, with its configuration in the metadata.

    That of a second transformer is `SECOND_FILE`, for `load_lora_weights(..., load_into_transformer_2=True)`.
    """
    for component, name in files_of(model).items():
        network = model.networks[component]
        layers = get_peft_model_state_dict(network)
        if model.trained == "unet":
            # All layers in the same names: of a mixture diffusers would take those of its first key only.
            layers = {
                key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value
                for key, value in layers.items()
            }
        model.pipeline.save_lora_weights(
            directory,
            weight_name=name,
            **{f"{model.trained}_lora_layers": layers},
            **_collate_lora_metadata({model.trained: network}),
        )


def save_kohya(model, directory):
    """Write the LoRA of a U-Net into a folder that is there, as `KOHYA_FILE`, which ComfyUI and AUTOMATIC1111 load.

    They read the alpha of each layer from a tensor and the kind of the base model from the metadata. Layers of SDXL have
    the original names there, those of Stable Diffusion the names of diffusers.
    """
    network = model.network
    is_xl, is_2 = network.config.addition_embed_type == "text_time", network.config.cross_attention_dim == 1024
    names = original_names(network) if is_xl else {}
    # One alpha for all layers: of several, diffusers takes the most frequent.
    alpha = float(network.peft_config["default"].lora_alpha)
    tensors = {}
    for name, module in _lora_layers(network).items():
        A, B = (matrices["default"].weight.detach().float().cpu() for matrices in (module.lora_A, module.lora_B))
        key = "lora_unet_" + names.get(name, name).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = A.contiguous()
        tensors[f"{key}.lora_up.weight"] = (B * (module.scaling["default"] * len(A) / alpha)).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    version = "sdxl_base_v1-0" if is_xl else "sd_v2" if is_2 else "sd_v1"
    metadata = {"format": "pt", "ss_base_model_version": version, "ss_v2": str(is_2 and not is_xl)}
    save_file(tensors, os.path.join(directory, KOHYA_FILE), metadata=metadata)


@contextmanager
def lora_disabled(model):
    """Within it, the network is the base model's, without a second one in memory."""
    for network in model.networks.values():
        network.disable_adapters()
    try:
        yield
    finally:
        for network in model.networks.values():
            network.enable_adapters()
