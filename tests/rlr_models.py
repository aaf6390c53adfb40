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
"""A small local model of every family, and what the tests of diffusion_models share."""

import functools
import json
import os
import tempfile
from types import SimpleNamespace

import torch
from diffusion_models import make_scheduler
from peft import LoraConfig
from rlr_testing import TINY_SD, tiny_pipeline, train
from rlr_training.processes import generators_of
from rlr_utils import rollout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel


PROMPTS = ["a red seven", "a blue two", "a green zero"]
SEEN = []


def red(images, prompts):
    """A smooth reward: how much redder than blue. It keeps the images and prompts in `SEEN`."""
    SEEN.append((images.detach().clone(), prompts))
    return 4 * (images[:, 0] - images[:, 2]).mean((1, 2))


RED = "rlr_models:red"


def redder(videos, prompts):
    """A smooth reward of whole videos: how much redder the last frame is than the first. It keeps them in `SEEN`, too."""
    SEEN.append((videos.detach().clone(), prompts))
    return (videos[:, -1, 0] - videos[:, 0, 0]).mean((1, 2))


redder.differentiable = redder.takes_videos = True
REDDER = "rlr_models:redder"


@functools.cache
def tiny_sdxl():
    """The folder of an SDXL pipeline of the real classes with random weights, which is written once per process.

    It has encoders of two widths, a text_time embedding, and the scheduler's configuration of SDXL base.
    """
    folder = os.path.join(temporary_folder().name, "tiny-sdxl")
    tiny = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = _sdxl_unet(cross_attention_dim=tiny.text_encoder.config.hidden_size + 32)
        config = {**tiny.text_encoder.config.to_dict(), "hidden_size": 32, "intermediate_size": 64}
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_dict({**config, "projection_dim": 24}))
    assert type(tiny.text_encoder) is CLIPTextModel and tiny.vae.config.force_upcast
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    StableDiffusionXLPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tiny.tokenizer,
        tokenizer_2=tiny.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)
    # The configuration of SDXL base holds more than its class knows, for the schedulers that are made from it.
    edit_json(
        os.path.join(folder, "scheduler", "scheduler_config.json"),
        {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True},
    )
    return folder


@functools.cache
def temporary_folder():
    """A folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rlr-models-")


def _sdxl_unet(cross_attention_dim):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=cross_attention_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )


# {class of the pipeline: its folder() here}
FOLDERS = {"StableDiffusionPipeline": lambda: TINY_SD, "StableDiffusionXLPipeline": tiny_sdxl}


def plain_pipeline(folder, scheduler="ddim", dtype=torch.float32, **components):
    """A pipeline as a user of diffusers has it, with a scheduler of `diffusion_models.SCHEDULERS`."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **components)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def chain_of(model, num_steps=3, prompts=PROMPTS, negative_prompt=None, size=(32, 32), **options):
    """The chain of a `DiffusionModel` under some prompts, as the training script makes it."""
    chain = model.make_chain(model.network, num_steps, size, **options)
    return chain.conditioned_on(model.embed(prompts), model.embed_negative(negative_prompt))


def edit_json(path, changes):
    """Change entries of a JSON file; those of `None` are removed."""
    with open(path, encoding="utf-8") as file:
        content = {**json.load(file), **changes}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({key: value for key, value in content.items() if value is not None}, file)


def cache_repository(folder, repository, cache, ending=""):
    """Put the files of a folder with an ending into a cache of the Hub, as those of a repository."""
    place = os.path.join(cache, f"models--{repository.replace('/', '--')}")
    os.makedirs(os.path.join(place, "refs"))
    with open(os.path.join(place, "refs", "main"), "w", encoding="utf-8") as file:
        file.write("0" * 40)
    for root, _, names in os.walk(folder):
        target = os.path.join(place, "snapshots", "0" * 40, os.path.relpath(root, folder))
        os.makedirs(target)
        for name in names:
            if name.endswith(ending):
                os.symlink(os.path.abspath(os.path.join(root, name)), os.path.join(target, name))


def add_random_lora(network, seed=0):
    """A LoRA whose B is not zero, so that no gradient is zero."""
    torch.manual_seed(seed)
    network.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))


def seeded(seeds):
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def train_on(folder, output_dir, *flags):
    """The metrics of a run of two images a step on a model of this file, for the reward `red`."""
    options = ["--pretrained_model_name_or_path", folder, "--reward", RED, "--decode_batch_size", "2"]
    return train(output_dir, *options, *flags)


def training_generators(step):
    """Those of the two images of a step of `train_on`."""
    one_rank = SimpleNamespace(num_processes=1, process_index=0)
    return generators_of(SimpleNamespace(train_batch_size=2, seed=0), one_rank, step, 0)


def assert_first_images_are_the_pipelines(
    folder, output_dir, scheduler, *, guidance_scale, eta=1.0, negative=None, size=(32, 32), flags=()
):
    """The images of a run's first step are those that a user draws from the same generators; returns their prompts."""
    given = ["--scheduler", scheduler, "--guidance_scale", str(guidance_scale), "--eta", str(eta)]
    given += ["--height", str(size[0]), "--width", str(size[1]), "--max_train_steps", "1", *flags]
    given += [] if negative is None else ["--negative_prompt", negative]
    SEEN.clear()
    train_on(folder, output_dir, *given)
    seen, prompts = SEEN[-1]
    images = plain_pipeline(folder, scheduler)(
        list(prompts),
        height=size[0],
        width=size[1],
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        eta=eta,
        generator=training_generators(1),
        output_type="pt",
    ).images
    torch.testing.assert_close(seen, images, rtol=1e-4, atol=1e-4)
    return prompts


def assert_a_rollout_does_not_wait(model, conditions, negative, size, **options):
    """On the meta device: after the noise of all steps, and tables of positions at the first, nothing goes to the device.

    Args:
        conditions, negative: of a batch, and of the negative prompt or `None`.
        options: of `make_chain`.
    """
    conditions, negative = (
        {name: value.to("meta") for name, value in (one or {}).items()} for one in (conditions, negative)
    )
    batch_size = len(next(iter(conditions.values())))
    model.network.to("meta")
    chain = model.make_chain(model.network, 3, size, device="meta", **options).conditioned_on(
        conditions, negative or None
    )
    x_T, before = torch.zeros(model.latents_shape(batch_size, size), device="meta"), []
    hook = model.network.register_forward_pre_hook(lambda *_: before.append(len(copies.operations)))
    with DeviceCopies() as copies:
        rollout(chain, x_T, seeded(range(batch_size)))
    hook.remove()
    assert before[0] > 0 and before[1:] == [len(copies.operations)] * 2


class DeviceCopies(TorchDispatchMode):
    """Keeps every operation that takes a tensor from the CPU to the meta device: on a GPU the CPU would wait."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim > 0}
        if "cpu" in devices and any(t.is_meta for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.operations.append(func)
        return out
