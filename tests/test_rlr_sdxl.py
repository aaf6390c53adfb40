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
"""SDXL: a tiny pipeline of the real classes with random weights, saved once and loaded as the script loads it."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import evaluate_rlr_sd
import pytest
import torch
import train_rlr_sd
from accelerate.state import AcceleratorState
from peft.utils import get_peft_model_state_dict
from rlr_testing import DIGITS, LORA, TINY_CLIP, TINY_SD, gradients, metrics_of, same_adapter, tiny_pipeline
from rlr_utils import (
    ChainOfThought,
    StableDiffusionChain,
    backward_sweep,
    decode_latents,
    full_bp,
    levels_of_steps,
    load_levels,
    make_scheduler,
    rollout,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_rlr_chain import Carried, add_lora, replay
from train_rlr_sd import generators_of, load_adapter
from train_rlr_sdxl import command_of, load_xl_pipeline, main, parse_args
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers


PROMPTS = ["a red seven", "a blue two", "a green zero"]
LEVELS = {"prompt": "a red seven", "coarse": "a green seven", "mid": "a red one", "fine": "a blue two"}
SEEN = []


def red(images, prompts):
    """A smooth reward: how much redder than blue; what it has seen is kept."""
    SEEN.append(images.detach().clone())
    return 4 * (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Its folder. Encoders of two widths, a text_time embedding, and the scheduler's configuration of SDXL base."""
    folder = tmp_path_factory.mktemp("sdxl") / "tiny-sdxl"
    torch.manual_seed(0)
    tiny = tiny_pipeline()
    config = {**tiny.text_encoder.config.to_dict(), "hidden_size": 32, "intermediate_size": 64, "projection_dim": 24}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=tiny.text_encoder.config.hidden_size + 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    StableDiffusionXLPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
        tokenizer=tiny.tokenizer,
        tokenizer_2=tiny.tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
    # SDXL base's says more than its class knows, and other schedulers are made of it.
    path = folder / "scheduler" / "scheduler_config.json"
    more = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert type(tiny.text_encoder) is CLIPTextModel and tiny.vae.config.force_upcast
    return str(folder)


def flags_of(model, output_dir, *flags):
    return [
        *("--pretrained_model_name_or_path", model, "--prompts", DIGITS, "--reward", "test_rlr_sdxl:red"),
        *("--num_inference_steps", "3", "--train_batch_size", "2", "--decode_batch_size", "2", "--seed", "0"),
        *("--max_train_steps", "2", "--num_eval_images", "0", "--report_to", "none", "--output_dir", str(output_dir)),
        *flags,
    ]


def train(model, output_dir, *flags):
    main(parse_args(flags_of(model, output_dir, *flags)))
    return metrics_of(output_dir)


def plain_pipeline(model, scheduler="ddim"):
    """As a user has it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(step):
    """Those of the two pictures of a step."""
    args = SimpleNamespace(train_batch_size=2, seed=0)
    return generators_of(args, SimpleNamespace(num_processes=1, process_index=0), step, 0)


def make_chain(pipeline, num_steps, prompts=PROMPTS, guidance_scale=5.0):
    pipeline.scheduler.set_timesteps(num_steps)
    embeds = pipeline.encode_prompt(prompts, do_classifier_free_guidance=guidance_scale > 1)
    time_ids = torch.tensor([[32, 32, 0, 0, 32, 32]], dtype=embeds[0].dtype)
    return StableDiffusionChain(
        pipeline.unet, pipeline.scheduler, *embeds, time_ids=time_ids, guidance_scale=guidance_scale
    )


@pytest.mark.parametrize(
    "scheduler, guidance_scale, negative, size, zeros",
    [
        ("ddim", 5.0, None, (32, 32), True),
        ("ddim", 5.0, None, (32, 32), False),
        ("ddim", 4.0, "a blue one", (48, 32), True),
        ("ddim", 4.0, "", (32, 32), True),
        ("ddim", 1.0, None, (32, 48), True),
        ("ddpm", 3.0, None, (32, 32), True),
        ("euler_ancestral", 3.0, "a blue one", (32, 32), True),
    ],
)
def test_the_first_pictures_of_a_run_are_the_pipelines_own(
    tmp_path, model, scheduler, guidance_scale, negative, size, zeros
):
    """Of the training script itself, before its first step, from the same generators."""
    if not zeros:
        pipeline = plain_pipeline(model)
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        model = str(tmp_path / "model")
        pipeline.save_pretrained(model)
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    flags = ["--scheduler", scheduler, "--guidance_scale", str(guidance_scale), "--max_train_steps", "1"]
    flags += ["--height", str(size[0]), "--width", str(size[1]), "--prompts", str(tmp_path / "prompts.txt")]
    flags += [] if negative is None else ["--negative_prompt", negative]
    SEEN.clear()
    train(model, tmp_path / "out", *flags)
    images = plain_pipeline(model, scheduler)(
        ["a red seven"] * 2,
        height=size[0],
        width=size[1],
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        eta=1.0,
        generator=generators(1),
        output_type="pt",
    ).images
    torch.testing.assert_close(SEEN[-1], images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_chain_of_thought_in_training_is_that_of_the_pipeline(tmp_path, model, guidance_scale):
    """Four steps of three levels, in the script, and in the pipeline through the callback."""
    (tmp_path / "levels.jsonl").write_text(json.dumps(LEVELS))
    load_levels.cache_clear()
    SEEN.clear()
    flags = ["--guidance_scale", str(guidance_scale), "--num_inference_steps", "4", "--max_train_steps", "1"]
    flags += ["--num_eval_images", "2"]
    train(model, tmp_path / "out", *flags, "--prompts", str(tmp_path / "levels.jsonl"))
    pipeline = plain_pipeline(model)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "eta": 1.0, "output_type": "pt"}
    levels = [[LEVELS[level]] * 2 for level in ("coarse", "mid", "fine")]
    thought = ChainOfThought(pipeline, *levels, num_inference_steps=4)
    assert thought.levels == levels_of_steps(4) == [0, 0, 1, 2]
    images = pipeline(
        thought.first, generator=generators(1), callback_on_step_end=thought, **thought.inputs, **options
    ).images
    # After them the base and the tuned model's of the comparison have been scored.
    torch.testing.assert_close(SEEN[-3], images, rtol=1e-4, atol=1e-4)
    plain = pipeline(levels[0], generator=generators(1), **options).images
    assert (plain - images).abs().max() > 1e-3
    # The pooled embeddings, too, are those of the level.
    thought.names[:] = thought.names[:1]
    without = pipeline(
        thought.first, generator=generators(1), callback_on_step_end=thought, **thought.inputs, **options
    ).images
    assert (without - images).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_sweep_is_exact_on_sdxl_in_float64(model, guidance_scale):
    """Full backpropagation, of an adapter whose B is not zero, against one graph of the whole chain, to 1e-9."""
    pipeline = plain_pipeline(model).to(torch.float64)
    add_lora(pipeline.unet)
    pipeline.unet.double()
    chain = make_chain(pipeline, 3, guidance_scale=guidance_scale)
    trajectory = rollout(chain, torch.randn(3, 4, 8, 8, dtype=torch.float64))
    weight = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    backward_sweep(chain, trajectory, full_bp(3).mixing, reward_grad=weight)
    swept = gradients(pipeline.unet)
    (-(weight * replay(chain, trajectory)).sum() / 3).backward()
    expected = gradients(pipeline.unet)
    torch.testing.assert_close(swept, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_chain_of_one_picture_is_its_row_of_the_batch(model, guidance_scale):
    chain, x = make_chain(plain_pipeline(model), 3, guidance_scale=guidance_scale), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        repeated = chain.repeat(1, 4).mean(2, x[1:2].expand(4, -1, -1, -1))
        torch.testing.assert_close(repeated, chain.mean(2, x)[1:2].expand(4, -1, -1, -1), rtol=1e-4, atol=1e-5)
        assert (chain.repeat(0, 1).mean(2, x[1:2]) - repeated[:1]).abs().max() > 1e-3


def test_nothing_in_rollout_and_sweep_waits_for_the_device(model):
    pipeline = plain_pipeline(model)
    add_lora(pipeline.unet)
    pipeline.unet.to("meta")
    pipeline.scheduler.set_timesteps(3)
    embeds, pooled = torch.zeros(2, 3, 16, 96, device="meta"), torch.zeros(2, 3, 24, device="meta")
    chain = StableDiffusionChain(
        *(pipeline.unet, pipeline.scheduler, embeds[0], embeds[1], pooled[0], pooled[1]),
        time_ids=torch.zeros(1, 6, device="meta"),
    )
    x_T, before = torch.zeros(3, 4, 8, 8, device="meta"), []
    with Carried() as carried:
        pipeline.unet.register_forward_pre_hook(lambda unet, inputs: before.append(len(carried.operations)))
        trajectory = rollout(chain, x_T, [torch.Generator().manual_seed(i) for i in range(3)])
    assert before[0] > 0 and before == [len(carried.operations)] * 3
    with Carried() as carried:
        backward_sweep(chain, trajectory, [0.5] * 4, reward_grad=x_T, advantages=torch.zeros(3, device="meta"))
    assert not carried.operations


def test_latents_are_decoded_as_the_pipeline_decodes_them(model):
    """With a mean and deviation of their own, as some VAEs have them, and with the factor alone."""
    pipeline = plain_pipeline(model)
    latents = torch.randn(2, 4, 8, 8)
    for mean, std in ((None, None), ([0.5, -1.0, 0.2, 0.0], [2.0, 0.5, 1.0, 3.0]), ([1.0] * 4, None)):
        pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
        # No step at all: what the pipeline does with the latents that it ends in.
        images = pipeline(
            "a red seven",
            latents=latents[:1] / pipeline.scheduler.init_noise_sigma,
            num_inference_steps=1,
            guidance_scale=1.0,
            callback_on_step_end=lambda *_: {"latents": latents},
            output_type="pt",
        ).images
        torch.testing.assert_close(decode_latents(pipeline.vae, latents).detach(), images, rtol=1e-5, atol=1e-5)


def test_training_raises_the_reward_and_a_plain_pipeline_has_the_adapter(tmp_path, model, capsys):
    """The pictures of a run's last step are those of a plain pipeline with the adapter of the step before."""
    flags = ["--rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2", "--max_train_steps", "8"]
    flags += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "7"]
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    SEEN.clear()
    train(model, tmp_path / "out", *flags, "--num_eval_images", "8", "--prompts", str(tmp_path / "prompts.txt"))
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["gain"]["mean"] > 3 * results["gain"]["standard_error"] > 0
    keys = load_file(tmp_path / "out" / LORA).keys()
    assert keys and all(key.startswith("unet.") and "lora" in key for key in keys)
    with safe_open(tmp_path / "out" / LORA, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == 4 and metadata["unet.lora_alpha"] == 8

    def pictures(pipeline):
        options = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 1.0, "output_type": "pt"}
        return pipeline(["a red seven"] * 2, generator=generators(8), **options).images

    pipeline = plain_pipeline(model)
    before = pictures(pipeline)
    pipeline.load_lora_weights(tmp_path / "out" / "checkpoint-7")
    tuned = pictures(pipeline)
    # Two micro-batches, then base and tuned model's eight pictures of the comparison, two at a time.
    torch.testing.assert_close(SEEN[-10], tuned, rtol=1e-4, atol=1e-4)
    assert (before - tuned).abs().max() > 0.01


def test_the_card_is_enough_to_use_the_adapter(tmp_path, model):
    pipeline = plain_pipeline(model)
    pipeline.vae.save_pretrained(tmp_path / "vae")
    flags = ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae"), "--height", "48"]
    train(model, tmp_path / "out", *flags)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- stable-diffusion-xl\n" in card and "accelerate launch --num_processes 1 train_rlr_sdxl.py" in card
    scope = {}
    exec(re.search(r"```py\n(.*?)```", card, re.DOTALL)[1], scope)
    assert scope["image"].size == (32, 48) and type(scope["pipeline"]) is StableDiffusionXLPipeline
    assert any("lora_B" in name for name, _ in scope["pipeline"].unet.named_parameters())
    assert scope["pipeline"].vae.config["_name_or_path"] == str(tmp_path / "vae")
    args = parse_args(flags_of(model, "out", *flags))
    words = command_of(args, 1, "train_rlr_sdxl.py", parse_args([])).split()
    assert vars(parse_args(words[words.index("train_rlr_sdxl.py") + 1 :])) == vars(args)
    args = parse_args([])
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert args.output_dir == "rlr-sdxl-lora"


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2", "--kl_weight", "0.1"],
        ["--gradient_estimator", "draft_lv", "--negative_prompt", "a blue one"],
        ["--gradient_estimator", "rlr_paper", "--baseline", "predicted_x0", "--gradient_checkpointing"],
        ["--reward", "jpeg_compressibility", "--branches", "2", "--guidance_scale", "1"],
        ["--heldout_reward", "jpeg_compressibility", "--heldout_steps", "1", "--num_heldout_images", "4"]
        + ["--feature_model", TINY_CLIP, "--ema_decay", "0.5", "--early_stop_patience", "5"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_every_estimator_trains(tmp_path, model, flags):
    metrics = train(model, tmp_path, *flags)
    assert all(line["grad_norm"] > 0 for line in metrics)
    weights = load_file(tmp_path / LORA)
    assert any(w.abs().max() > 0 for key, w in weights.items() if "lora.up" in key or "lora_B" in key)
    assert ("drift" in metrics[0]) == ("--heldout_reward" in flags)
    assert os.path.exists(tmp_path / "ema" / LORA) == ("--ema_decay" in flags)


def test_checkpoints_are_kept_to_their_limit_and_resumed_exactly(tmp_path, model):
    flags = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "2", "--learning_rate", "1e-3"]
    straight = train(model, tmp_path / "straight", *flags, "--max_train_steps", "6")
    assert {name for name in os.listdir(tmp_path / "straight") if "-" in name} == {"checkpoint-4", "checkpoint-6"}
    train(model, tmp_path / "resumed", *flags, "--max_train_steps", "5")
    flags += ["--max_train_steps", "6", "--resume_from_checkpoint", "latest"]
    resumed = train(model, tmp_path / "resumed", *flags)
    for key in ("step", "reward_mean", "grad_norm", "gamma_mean"):
        assert [line[key] for line in resumed] == [line[key] for line in straight]
    assert same_adapter(tmp_path / "straight", tmp_path / "resumed")


def test_in_half_precision_the_vae_stays_in_float32_where_it_must(tmp_path, model):
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    own = ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae")]
    for flags, expected in (([], torch.float32), (own, torch.bfloat16)):
        pipeline = load_xl_pipeline(parse_args(flags_of(model, "out", *flags)), torch.bfloat16)
        assert pipeline.vae.dtype == expected
        modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        assert not any(p.requires_grad for module in modules for p in module.parameters())
        assert {m.dtype for m in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)} == {torch.bfloat16}
    AcceleratorState._reset_state()
    metrics = train(model, tmp_path / "out", "--mixed_precision", "bf16", "--num_eval_images", "2")
    AcceleratorState._reset_state()
    assert all(0 < line["grad_norm"] < float("inf") for line in metrics)
    weights = load_file(tmp_path / "out" / LORA)
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in weights.values())


def test_a_model_of_the_other_family_names_the_other_script(tmp_path, model):
    with pytest.raises(SystemExit) as stop:
        train(TINY_SD, tmp_path / "out")
    assert stop.value.code.startswith("train_rlr_sdxl.py: error: ") and "\n" not in stop.value.code
    assert stop.value.code.endswith("is a Stable Diffusion model: use train_rlr_sd.py")
    with pytest.raises(SystemExit) as stop:
        train_rlr_sd.main(train_rlr_sd.parse_args(flags_of(model, tmp_path / "out")))
    assert stop.value.code.startswith("train_rlr_sd.py: error: ") and "\n" not in stop.value.code
    assert stop.value.code.endswith("is an SDXL model: use train_rlr_sdxl.py")
    shutil.copytree(model, tmp_path / "refiner")
    index = tmp_path / "refiner" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder": [None, None]}))
    with pytest.raises(SystemExit, match="refiner' has not both text encoders: use a base model of SDXL"):
        train(str(tmp_path / "refiner"), tmp_path / "out")
    with pytest.raises(SystemExit, match="--pretrained_vae_model_name_or_path '/nowhere' cannot be loaded"):
        train(model, tmp_path / "out", "--pretrained_vae_model_name_or_path", "/nowhere")
    AutoencoderKL(latent_channels=16, norm_num_groups=8, block_out_channels=(8,)).save_pretrained(tmp_path / "wide")
    with pytest.raises(SystemExit, match="wide' has latents of 16 channels, the U-Net of 4"):
        train(model, tmp_path / "out", "--pretrained_vae_model_name_or_path", str(tmp_path / "wide"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_under_the_names_of_other_trainers_is_gone_on_from_in_full_precision(tmp_path, model):
    """Those of Stability's code, whose blocks are told apart by the U-Net's configuration alone."""
    train(model, tmp_path / "ours", "--learning_rate", "1e-2")
    ours, theirs = load_file(tmp_path / "ours" / LORA), {}
    blocks = {"down_blocks.1.attentions.0": "input_blocks_3_1", "mid_block.attentions.0": "middle_block_1"}
    blocks.update({f"up_blocks.0.attentions.{i}": f"output_blocks_{i}_1" for i in range(2)})
    for key, value in ours.items():
        name, _, end = key.removeprefix("unet.").rpartition(".lora.")
        for block, other in blocks.items():
            name = name.replace(block, other)
        name = "lora_unet_" + name.replace(".", "_")
        theirs[f"{name}.lora_{end}"] = value
        theirs[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(theirs, tmp_path / "theirs.safetensors")
    args = parse_args(flags_of(model, "out", "--adapter_path", str(tmp_path / "theirs.safetensors")))
    pipeline = load_xl_pipeline(args, torch.bfloat16)
    load_adapter(args, pipeline)
    found = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    assert {f"unet.{key}" for key in found} == set(ours)
    assert all(torch.equal(value, ours[f"unet.{key}"]) for key, value in found.items())


def test_adapters_are_evaluated_and_gone_on_from(tmp_path, model):
    train(model, tmp_path / "first", "--learning_rate", "1e-2")
    flags = ["--adapter_path", str(tmp_path / "first"), "--learning_rate", "1e-30"]
    train(model, tmp_path / "same", *flags)
    assert same_adapter(tmp_path / "first", tmp_path / "same")
    flags = ["--pretrained_model_name_or_path", model, "--adapters", str(tmp_path / "first"), "--prompts", DIGITS]
    flags += ["--reward", "jpeg_compressibility", "--feature_model", TINY_CLIP, "--num_inference_steps", "3"]
    flags += ["--num_prompts", "1", "--images_per_prompt", "2", "--output_dir", str(tmp_path / "evaluation")]
    models = evaluate_rlr_sd.main(evaluate_rlr_sd.parse_args(flags))["models"]
    assert models["first"]["drift"] > models["base"]["drift"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(SystemExit, match="--pretrained_model_name_or_path '/nowhere' cannot be loaded"):
        flags += ["--pretrained_model_name_or_path", "/nowhere", "--overwrite_output_dir"]
        evaluate_rlr_sd.main(evaluate_rlr_sd.parse_args(flags))
