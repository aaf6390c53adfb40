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
"""Diffusion models that can be tuned: what differs between diffusers' pipelines, one family a file.

    model = load_model("CompVis/stable-diffusion-v1-4")     # a DiffusionModel, found out from the model itself
    chain = model.make_chain(model.network, num_steps=50, size=(512, 512))
    chain = chain.conditioned_on(model.embed(prompts), model.embed([""]))

A new family is a subclass of `unet.UNetModel` or `flow.FlowModel` in a file of its own, and a line below. See
docs/models.md.
"""

from importlib import import_module

from .schedulers import SCHEDULERS, make_scheduler


__all__ = [
    "FAMILIES",
    "FLOW_FAMILIES",
    "SCHEDULERS",
    "UNET_FAMILIES",
    "VIDEO_FAMILIES",
    "as_model",
    "load_model",
    "make_scheduler",
]

# {class of the pipeline: "module:class" here}
UNET_FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
}
FLOW_FAMILIES = {
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "Flux2KleinPipeline": "flux2_klein:Flux2Klein",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "z_image:ZImage",
}
VIDEO_FAMILIES = {
    "WanPipeline": "wan:Wan",
    "LTXPipeline": "ltx:LTX",
    "CogVideoXPipeline": "cogvideox:CogVideoX",
    "AnimateDiffPipeline": "animatediff:AnimateDiff",
}
FAMILIES = {**UNET_FAMILIES, **FLOW_FAMILIES, **VIDEO_FAMILIES}


def family_of(pipeline_class, families=FAMILIES):
    """The `DiffusionModel` subclass for a pipeline class's name.

    Raises:
        ValueError: if there is none.
    """
    if pipeline_class not in families:
        elsewhere = ", but by another script" if pipeline_class in FAMILIES else ""
        raise ValueError(f"a {pipeline_class} is not supported here{elsewhere}, only {', '.join(families)}")
    module, name = families[pipeline_class].split(":")
    return getattr(import_module(f".{module}", __name__), name)


def as_model(pipeline):
    """The `DiffusionModel` of a pipeline that is loaded already.

    Raises:
        ValueError: if its family is not supported, or its components are not what the family expects.
    """
    family = family_of(type(pipeline).__name__)
    family.check(pipeline)
    return family(pipeline)


def load_model(
    source,
    *,
    dtype=None,
    scheduler=None,
    vae=None,
    quantize=None,
    revision=None,
    variant=None,
    cache_dir=None,
    families=FAMILIES,
    before=None,
):
    """Load a pipeline as a `DiffusionModel`: frozen, its sampler replaced, its family found out from the model.

    Args:
        source: folder or Hub repository of a diffusers pipeline, or a single file of Stable Diffusion 1.x or XL.
        dtype: of the networks; default: torch.float32. A VAE that overflows in half precision stays in float32.
        scheduler: a key of `SCHEDULERS` for a model that was trained on a schedule of betas; default: DDIM.
        vae: a VAE in float32, to use instead of the model's own.
        quantize: a key of `quantize.LIBRARIES`, for the frozen weights of the network that gets the LoRA; not of a file.
        revision, variant, cache_dir: as for `from_pretrained`; a file has neither revision nor variant.
        families: those that may be loaded, such as `FLOW_FAMILIES`.
        before: `before(bytes)` is called with what the weights of the network will take, before they are read; not for a file.

    Raises:
        ValueError: naming the source, if it cannot be loaded or its family is not supported.
    """
    import torch

    from .loading import finish_pipeline, load_pipeline, loading, read_index
    from .single_file import download_configuration, is_single_file, load_single_file

    hub, dtype = {"revision": revision, "cache_dir": cache_dir}, dtype or torch.float32
    with loading(source):
        if is_single_file(source):
            if revision is not None or variant is not None:
                raise ValueError("revision and variant are for folders and repositories, not for a single file")
            if quantize is not None:
                raise ValueError("a single file cannot be quantized: convert it to a folder with save_pretrained")
            folder = download_configuration(source, cache_dir)
            family = family_of(read_index(folder)["_class_name"], families)
            pipeline = load_single_file(family, source, folder, dtype, vae)
        else:
            family = family_of(read_index(source, **hub)["_class_name"], families)
            pipeline = load_pipeline(family, source, dtype, vae, variant, quantize, before, **hub)
        return family(finish_pipeline(family, pipeline, dtype, scheduler))
