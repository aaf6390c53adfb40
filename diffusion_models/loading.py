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
"""Reading pipelines and VAEs: what cannot be read is a ValueError of one line that names the file, folder or repository."""

import json
import math
import os
from contextlib import contextmanager
from importlib import import_module
from inspect import Parameter, signature
from typing import get_args

import torch
from packaging.version import parse
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

import diffusers
from diffusers import DiffusionPipeline

from .quantize import BYTES, keep_quantized, quantization_config


# Components that images are drawn without.
NOT_NEEDED = {"feature_extractor": None, "image_encoder": None}
# Entries of a component's configuration that the shapes of its weights do not show. Without them the libraries would take
# defaults, which are those of another model.
ENTRIES = {
    "scheduler": ("beta_start", "beta_end", "beta_schedule", "prediction_type", "shift"),
    "unet": (
        *("act_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_num_groups"),
        *("num_attention_heads", "motion_num_attention_heads"),
    ),
    "motion_adapter": ("motion_num_attention_heads",),
    "transformer": (
        *("attention_head_dim", "num_attention_heads", "n_heads", "sample_size"),
        *("sample_height", "sample_width", "sample_frames", "use_rotary_positional_embeddings"),
    ),
    "vae": ("act_fn", "scaling_factor", "latents_mean", "latents_std"),
    "text_encoder": ("eos_token_id", "hidden_act", "num_attention_heads", "num_hidden_layers"),
}
ENTRIES_OF_T5 = ("feed_forward_proj", "num_heads", "num_layers")
ENTRIES_OF_QWEN = ("hidden_act", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "rope_theta")
# Those of a scheduler of CogVideoX, whose levels end in pure noise.
ENTRIES_OF_ZERO_SNR = ("snr_shift_scale", "rescale_betas_zero_snr", "timestep_spacing", "set_alpha_to_one")
# Those of a scheduler that shifts its levels by the size of the image.
ENTRIES_OF_SHIFTS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
# Versions of diffusers from which on they are surely written. The defaults are right for older files.
SINCE = {"prediction_type": "0.14", "scaling_factor": "0.16", "use_rotary_positional_embeddings": "0.30.1"}


@contextmanager
def loading(source):
    """Within it, what keeps `source` from being loaded is a ValueError of one line."""
    with _naming(f"{source!r} cannot be loaded"):
        yield


@contextmanager
def _naming(what):
    """Within it, every error but a want of memory is a ValueError of one line that begins with `what`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # for a damaged file the libraries raise errors of every type
        reason = " ".join(str(error).split())
        if not isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{what}: {reason}") from error


def read_index(source, **hub):
    """The content of model_index.json.

    Raises:
        ValueError, OSError: if there is no such file, or it names no pipeline.
    """
    index = DiffusionPipeline.load_config(source, **hub)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError("its model_index.json does not name a pipeline")
    return index


def load_pipeline(family, source, dtype, vae, variant=None, quantize=None, before=None, **hub):
    """The pipeline of a `DiffusionModel` subclass, of a folder or Hub repository, the VAE in float32.

    Args:
        before: as of `load_model`.

    Raises:
        ValueError: naming the component that cannot be loaded, besides whatever the libraries raise.
    """
    pipeline_class = getattr(diffusers, family.pipeline_class)
    parameters = signature(pipeline_class).parameters
    given = {name: value for name, value in {**NOT_NEEDED, **family.components}.items() if name in parameters}
    if vae is not None:
        wanted = parameters["vae"].annotation
        if not isinstance(vae, wanted):
            raise ValueError(f"its VAE is an {wanted.__name__}, which an {type(vae).__name__} cannot replace")
        given["vae"] = vae
    folder = source
    if not os.path.isdir(source):
        folder = pipeline_class.download(source, variant=variant, **given, **hub)
    index, optional = read_index(folder), (*pipeline_class._optional_components, *family.optional)
    needed = [
        name
        for name, parameter in parameters.items()
        if (parameter.default is Parameter.empty or name in pipeline_class._optional_components) and name not in given
    ]
    classes = {name: _class_of(name, index, optional=name in optional) for name in needed}
    if family.trained == "transformer":  # U-Nets are also combined with text encoders of other kinds
        for name, component_class in classes.items():
            if component_class is not None and name.startswith(("transformer", "text_encoder", "tokenizer")):
                with _naming(name):
                    annotation = parameters[name].annotation
                    _check_class(component_class, *(get_args(annotation)[:1] or (annotation,)))  # of "... | None"
    options, trained = {}, [name for name in classes if name.startswith(family.trained)]
    if quantize is not None:
        config = quantization_config(quantize, dtype)
        options = {name: {"quantization_config": config} for name in trained}
    if before is not None:
        bytes_each = dtype.itemsize if quantize is None else BYTES[quantize]
        before(int(bytes_each * sum(_count_weights(os.path.join(folder, name), variant) for name in trained)))
    components = {**_load_components(classes, folder, dtype, variant, options), **given}
    _check_scheduler(components["scheduler"], folder, family.scheduler_entries)
    settings = {name: index[name] for name in parameters if name in index and name not in components}
    return pipeline_class(**components, **settings)


def finish_pipeline(family, pipeline, dtype, scheduler):
    """Check a pipeline that has just been loaded, and make it a frozen one with the scheduler of the chain.

    Raises:
        ValueError: if it is not what the family expects.
    """
    family.check(pipeline)
    pipeline.scheduler = family.make_scheduler(scheduler, pipeline.scheduler.config)
    if family.vae_in_half_precision or not pipeline.vae.config.force_upcast:
        # Not diffusers' own `to`, which warns of modules to be kept in float32, of which there are none.
        torch.nn.Module.to(pipeline.vae, dtype)
    pipeline.set_progress_bar_config(disable=True)
    # The memory format in which convolutions are fastest on a CPU; it is one of images, not of videos.
    for network in (getattr(pipeline, family.trained), pipeline.vae):
        if all(weight.ndim < 5 for weight in network.parameters()):
            network.to(memory_format=torch.channels_last)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    return pipeline


def _class_of(name, index, optional):
    """The class of a component in the content of model_index.json, or `None` for an optional one that is not there."""
    entry = index.get(name)
    if entry in (None, [None, None]) and optional:
        return None
    with _naming(name):
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in ("diffusers", "transformers"):
            raise ValueError(f"model_index.json says {json.dumps(entry)}, not a class of diffusers or transformers")
        return getattr(import_module(entry[0]), entry[1])


def _check_class(component_class, expected):
    """Raise ValueError for a network or tokenizer of another class than the pipeline takes."""
    if not issubclass(expected, (torch.nn.Module, PreTrainedTokenizerBase)):  # any tokenizer
        return
    # A tokenizer may also be of the class that they all inherit from.
    if not issubclass(component_class, expected) and not issubclass(expected, component_class):
        raise ValueError(f"model_index.json says {component_class.__name__}, and {expected.__name__} is needed")


def _load_components(classes, folder, dtype, variant, options):
    """{name: component} of a pipeline's folder, of the classes {name: class, or `None`}; `options` are {name: {...}}.

    They are not left to the pipeline: of weights that lack a tensor, of a tokenizer without a vocabulary and of a
    configuration without an entry the libraries warn at most.

    Raises:
        ValueError: naming the component that cannot be loaded.
    """
    if variant is not None and not any(_has_variant(os.path.join(folder, name), variant) for name in classes):
        raise ValueError(f"it has no files of the variant {variant!r}")
    components = {}
    for name, component_class in classes.items():
        with _naming(name):
            precision = torch.float32 if name == "vae" else dtype
            own = options.get(name, {})
            components[name] = component_class and _load_part(component_class, folder, name, precision, variant, **own)
    return components


def _load_part(component_class, folder, name, dtype, variant, **options):
    """A component of a pipeline's folder, with what its configuration and its vocabulary must hold."""
    path = os.path.join(folder, name)
    if issubclass(component_class, PreTrainedTokenizerBase):
        _check_vocabulary(component_class, path)
        return load_component(component_class, path)
    written = _read_configuration(path, getattr(component_class, "config_name", "config.json"))
    if variant is not None and _has_variant(path, variant):
        options["variant"] = variant
    component = load_component(component_class, path, dtype, **options)
    if "quantization_config" in options:
        keep_quantized(component)
    kind = getattr(component.config, "model_type", "")
    entries = ENTRIES_OF_T5 if kind in ("t5", "umt5") else ENTRIES_OF_QWEN if kind.startswith("qwen") else ()
    _check_entries(component, written, entries or ENTRIES.get(name.rstrip("_23"), ()))
    return component


def _check_scheduler(scheduler, folder, entries):
    """Raise ValueError for a scheduler that was written without an entry of its kind; `entries` are those of flow matching."""
    with _naming("scheduler"):
        written = _read_configuration(os.path.join(folder, "scheduler"), scheduler.config_name)
        if "snr_shift_scale" in scheduler.config:
            entries = ENTRIES_OF_ZERO_SNR
        elif not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            entries = ("flow_shift",) if written.get("use_flow_sigmas") else ()
        elif written.get("use_dynamic_shifting"):
            entries = (*entries, *ENTRIES_OF_SHIFTS)
        for entry in entries:
            if entry not in written:
                raise ValueError(f"its configuration has no {entry!r}")


def _count_weights(folder, variant):
    """The number of weights in a component's safetensors files, of which only the headers are read."""
    infix, count = f".{variant}." if _has_variant(folder, variant) else None, 0
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        is_wanted = name.count(".") == 1 if infix is None else infix in name
        if name.endswith(".safetensors") and is_wanted:
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    return count


def _has_variant(folder, variant):
    """Whether a component's folder has weights of a variant, as only some components may."""
    return os.path.isdir(folder) and any(f".{variant}." in name for name in os.listdir(folder))


def _check_vocabulary(tokenizer_class, folder):
    """Raise ValueError for the folder of a tokenizer without a vocabulary: it would know only special tokens."""
    names = set(tokenizer_class.vocab_files_names.values())
    present = {name for name in names if os.path.isfile(os.path.join(folder, name))}
    whole = tokenizer_class.vocab_files_names.get("tokenizer_file")
    if whole not in present and present != names - {whole}:
        raise ValueError(f"its vocabulary is missing, one of the files {', '.join(sorted(names))}")


def _read_configuration(folder, name):
    """The content of a component's configuration file; diffusers would look for other content on the Hub."""
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        written = json.load(file)
    if not isinstance(written, dict):
        raise ValueError(f"its {name} is not a JSON object")
    return written


def _check_entries(component, written, entries):
    """Raise ValueError for a configuration that was written without one of some entries, as far as the component has them."""
    version = parse(str(written.get("_diffusers_version", "0")))
    config = component.config if isinstance(component.config, dict) else component.config.to_dict()
    written, config = _flat(written), _flat(config)
    for entry in entries:
        is_newer = version < parse(SINCE.get(entry, "0"))
        if entry not in written and not is_newer and config.get(entry) is not None:
            raise ValueError(f"its configuration has no {entry!r}")


def _flat(config):
    """A configuration, or that of the text model in it, with the entries of its rotary embedding beside the others."""
    config = config.get("text_config") or config
    return {**config, **(config.get("rope_parameters") or {})}


def load_component(component_class, source, dtype=None, **options):
    """A scheduler, tokenizer or network of a folder or Hub repository; of a network the weights must be complete.

    Args:
        component_class: of diffusers or transformers.
        dtype: of a network.
        options: of its `from_pretrained`.

    Raises:
        ValueError: naming a weight that is missing or has no place, besides whatever the libraries raise.
    """
    if not issubclass(component_class, torch.nn.Module):
        return component_class.from_pretrained(source, **options)
    try:
        network, info = component_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or issubclass(component_class, diffusers.ModelMixin):
            raise
        # transformers logs which, and its error does not say more.
        raise ValueError("its config.json asks for weights of other shapes than those of its files") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ValueError(
            f"its weights lack {len(missing)} tensors of {component_class.__name__}, such as {missing[0]!r}"
        )
    # Text encoders may come from a whole CLIP, with more than the text model.
    if unexpected and issubclass(component_class, diffusers.ModelMixin):
        raise ValueError(f"its config.json has no place for {len(unexpected)} tensors, such as {unexpected[0]!r}")
    return network


def load_vae(source, class_name, dtype, cache_dir=None):
    """An autoencoder of a class of diffusers.

    Raises:
        ValueError: if it cannot be loaded, or is of another class, whose weights diffusers would skip.
    """
    vae_class = getattr(diffusers, class_name)
    with loading(source):
        written = vae_class.load_config(source, cache_dir=cache_dir)
        if written.get("_class_name") != class_name:
            raise ValueError(f"its config.json says {written.get('_class_name')}, and {class_name} is needed")
        vae = load_component(vae_class, source, cache_dir=cache_dir, dtype=dtype)
        _check_entries(vae, written, ENTRIES["vae"])
        return vae
