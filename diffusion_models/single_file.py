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
"""Reading a single file with a whole model in the original layout, as other programs write it.

What such a file does not hold, the configuration, diffusers takes from the Hub or its cache: that of the model whose layers
it has. The prediction type is part of that. So only files are read for whose layers there is one prediction type.
"""

import os

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

import diffusers
from diffusers.loaders.single_file_utils import (
    fetch_diffusers_config,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)

from .loading import NOT_NEEDED


ENDINGS = (".safetensors", ".ckpt")


def is_single_file(source):
    """Whether the source of a model is one file."""
    return str(source).endswith(ENDINGS)


def download_configuration(source, cache_dir=None):
    """The folder of the configuration of a single file.

    Raises:
        ValueError: if the file holds no model, or one whose configuration cannot be found or told from its layers.
    """
    if not os.path.isfile(source):
        raise ValueError("there is no such file")
    checkpoint = _read(source)
    if "model.diffusion_model.input_blocks.0.0.weight" not in checkpoint:
        raise ValueError("it does not hold a whole Stable Diffusion in the original layout")
    if _may_predict_v(source, checkpoint):
        raise ValueError(
            "it may predict noise or v, which diffusers cannot tell: convert it to a folder with the right scheduler, by"
            " from_single_file and save_pretrained of diffusers"
        )
    repository = fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    try:
        return snapshot_download(repository, cache_dir=cache_dir, allow_patterns=["*.json", "*/*.json", "*/*.txt"])
    except OSError as error:
        raise ValueError(
            f"its configuration, of {repository!r}, is not in the cache and the Hub cannot be reached: load it once with a"
            " connection, or convert the file to a folder with diffusers' from_single_file and save_pretrained"
        ) from error


def _read(source):
    """{key: tensor} of a file, read without running code that may be in it."""
    try:
        return load_single_file_checkpoint(source)
    except OSError as error:
        if not source.endswith(".ckpt"):
            raise
        raise ValueError("it is damaged, or holds code, which is not run: use a .safetensors file") from error


def _may_predict_v(source, checkpoint):
    """Whether the layers are of Stable Diffusion 2, which comes as both, or the file says that it predicts v."""
    says = "epsilon"
    if source.endswith(".safetensors"):
        with safe_open(source, framework="pt") as file:
            says = (file.metadata() or {}).get("modelspec.prediction_type", "epsilon")
    return infer_diffusers_model_type(checkpoint) == "v2" or "v_pred" in checkpoint or says != "epsilon"


def load_single_file(family, source, folder, dtype, vae):
    """The pipeline of a `DiffusionModel` subclass, of a single file, the VAE in float32.

    Args:
        folder: from `download_configuration`.

    Raises:
        ValueError: if the file lacks weights, besides whatever diffusers raises.
    """
    try:
        if vae is None:
            vae = diffusers.AutoencoderKL.from_single_file(source, config=folder, subfolder="vae", dtype=torch.float32)
        given = {**NOT_NEEDED, **family.components, "vae": vae}
        pipeline = getattr(diffusers, family.pipeline_class).from_single_file(
            source, config=folder, dtype=dtype, **given
        )
    except NotImplementedError as error:  # of torch, for weights without values
        raise ValueError("it lacks weights of the U-Net or of the VAE") from error
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for name, network in networks.items():
        for weight, values in network.named_parameters():
            if values.is_meta:
                raise ValueError(f"it lacks weights, such as {weight!r} of the {name}")
    return pipeline
