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
"""Reading pipelines and VAEs: what cannot be read is a ValueError of one line that names the folder or repository."""

from contextlib import contextmanager

import torch
from safetensors import SafetensorError

import diffusers
from diffusers import DiffusionPipeline

from .schedulers import make_scheduler


@contextmanager
def loading(source):
    """Within it, what keeps `source` from being loaded is a ValueError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{source!r} cannot be loaded: {error}") from error


def pipeline_class_of(source, **hub):
    """The name of the pipeline class in model_index.json.

    Raises:
        ValueError, OSError: if there is no such file or no such name in it.
    """
    name = DiffusionPipeline.load_config(source, **hub).get("_class_name")
    if name is None:
        raise ValueError("its model_index.json does not name a pipeline")
    return name


def load_pipeline(family, source, dtype, scheduler, vae, **hub):
    """The frozen pipeline of a `DiffusionModel` subclass, see `diffusion_models.load_model`.

    Raises:
        ValueError: if it cannot be loaded, or the model is not what the family expects.
    """
    dtype = torch.float32 if dtype is None else dtype
    components = dict(family.components)
    if vae is not None:
        components["vae"] = vae
    with loading(source):
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
            source, dtype={"default": dtype, "vae": torch.float32}, **components, **hub
        )
        family.check(pipeline)
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
        if not pipeline.vae.config.force_upcast or family.vae_in_half_precision:
            # Not diffusers' own `to`, which warns of modules to be kept in float32, of which there are none.
            torch.nn.Module.to(pipeline.vae, dtype)
    pipeline.set_progress_bar_config(disable=True)
    # The memory format in which convolutions are fastest on a CPU.
    for name in (family.trained, "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    return pipeline


def load_vae(source, class_name, dtype, cache_dir=None):
    """An autoencoder of a class of diffusers.

    Raises:
        ValueError: if it cannot be loaded, or is of another class, whose weights diffusers would skip.
    """
    vae_class = getattr(diffusers, class_name)
    with loading(source):
        found = vae_class.load_config(source, cache_dir=cache_dir).get("_class_name")
        if found != class_name:
            raise ValueError(f"its config.json says {found}, and {class_name} is needed")
        return vae_class.from_pretrained(source, cache_dir=cache_dir, dtype=dtype)
