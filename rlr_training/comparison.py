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
"""Adapters against their base model: loading them, and what is measured of their images."""

import os
from itertools import product

import torch
from diffusion_models.adapters import load_adapter
from reward_models.features import diversity, drift, frechet_distance, mean_over_frames, video_figures
from reward_models.images import read_image
from tqdm.auto import tqdm

from .errors import naming
from .evaluation import encode


IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_real(directory, features):
    """The embeddings (N, D) of the images of a folder.

    Raises:
        ValueError: if there are fewer than two.
    """
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    paths = [os.path.join(directory, name) for name in names if os.path.splitext(name)[1].lower() in IMAGE_FILES]
    if len(paths) < 2:
        raise ValueError(f"--real_images {directory!r} holds fewer than two images")
    return torch.cat([features(read_image(path)) for path in tqdm(paths, desc="real images")])


def load_adapters(pipeline, sources, cache_dir):
    """Load adapters into a pipeline; returns the name of each, the end of its path, made unique.

    Raises:
        ValueError: if one cannot be loaded.
    """
    names = []
    for source in sources:
        name = os.path.basename(os.path.normpath(source)).removesuffix(".safetensors").replace(".", "-")
        # peft keeps adapters in a module under their names, which must not be those of its members, such as "train".
        while name in (*names, "base") or hasattr(torch.nn.ModuleDict(), name):
            name += "-again"
        with naming("--adapters"):
            load_adapter(pipeline, source, name, cache_dir)
        names.append(name)
    return names


def encode_for(args, model, names, prompts, device):
    """The prompts as each adapter sees them, which may have layers in text encoders.

    Args:
        names: from `load_adapters`.

    Returns:
        {(name, scale): `PromptEmbeds`} of 1 and each of --lora_scales; of the base model the name is `None`, the scale 1.
    """
    of_base, embeds = None, {}
    for name, scale in [(None, 1.0), *product(names, dict.fromkeys((1.0, *args.lora_scales)))]:
        switch_to(model.pipeline, name, scale)
        reads = any(component.startswith("text_encoder") for component in components_of(model.pipeline, name))
        embeds[name, scale] = encode(args, model, prompts, device) if of_base is None or reads else of_base
        of_base = of_base or embeds[name, scale]
    of_base.free_encoders()
    return embeds


def components_of(pipeline, name):
    """The components of a pipeline in which an adapter has layers."""
    return [component for component, names in pipeline.get_list_adapters().items() if name in names]


def switch_to(pipeline, name, scale):
    """Have a pipeline draw with one of its adapters, at a scale, or as it is without any."""
    if not components_of(pipeline, name):  # the base model, or layers of text encoders alone, which have been freed
        pipeline.disable_lora()
        return
    pipeline.enable_lora()
    pipeline.set_adapters([name], [scale])


def measure(images, prompts, rewards, features, base, real, device):
    """The figures of the images (N, 3, H, W), or videos (N, F, 3, H, W), of one model.

    Args:
        rewards: `WeightedSum`; the weights are ignored.
        features: from `reward_models.features.load_features`.
        base: the details of the base model, or `None` for itself.
        real: (M, D), embeddings of real images, or `None`.
        device: of the rewards.

    Returns:
        (summary, details): numbers for results.json, and {"scores": {reward: (N,)}, "embeds": (N, D)}.
    """
    by_frame = features(images)
    embeds = mean_over_frames(by_frame)
    scores = {name: values.cpu() for name, values in rewards(images, prompts, device=device).members.items()}
    base_scores, base_embeds = (scores, embeds) if base is None else (base["scores"], base["embeds"])
    summary = {"rewards": {}}
    for name, values in scores.items():
        gain = values - base_scores[name]
        summary["rewards"][name] = {
            "mean": values.mean().item(),
            "standard_error": values.std().item() / len(values) ** 0.5,
            "gain": gain.mean().item(),
            "gain_standard_error": gain.std().item() / len(gain) ** 0.5,
            "win_rate": ((gain > 0).float() + 0.5 * (gain == 0).float()).mean().item(),
        }
    summary["diversity"] = diversity(embeds, prompts)
    summary["drift"] = drift(base_embeds, embeds).mean().item()
    summary["frechet_to_base"] = frechet_distance(embeds, base_embeds)
    if real is not None:
        summary["frechet_to_real"] = frechet_distance(embeds, real)
    summary |= {name: values.mean().item() for name, values in video_figures(images, by_frame).items()}
    return summary, {"scores": scores, "embeds": embeds}
