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
"""Tiny flow-matching pipelines of the real classes with random weights, built offline and written once per process."""

import functools
import os

import torch
from rlr_models import temporary_folder
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def written_once(make):
    """The folder of the pipeline that `make` returns, which is made from a fixed seed, once for all same arguments."""

    @functools.cache
    @functools.wraps(make)
    def folder(*args, **kwargs):
        name = "-".join([make.__name__, *map(str, [*args, *kwargs.values()])])
        path = os.path.join(temporary_folder().name, name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = make(*args, **kwargs)
            with torch.no_grad():
                for weight in (pipeline.components.get("transformer") or pipeline.unet).parameters():
                    weight.add_(0.05 * torch.randn_like(weight))  # else predictions would be next to nothing
            pipeline.save_pretrained(path)
        return path

    return folder


@written_once
def tiny_sd3(with_t5=True):
    """Stable Diffusion 3. Without T5, diffusers loads it only with `text_encoder_3=None` and `tokenizer_3=None`."""
    return sd3_pipeline(with_t5=with_t5)


@written_once
def tiny_sd35():
    """Stable Diffusion 3.5 Medium: normalized queries and keys, and a block with a second attention."""
    return sd3_pipeline(qk_norm="rms_norm", dual_attention_layers=(0,))


def sd3_pipeline(with_t5=True, **transformer_options):
    tokenizer = clip_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4},
            **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8},
            **{"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 20},
            pos_embed_max_size=12,  # images of at most 48 x 48 pixels
            **transformer_options,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 8)),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


@written_once
def tiny_flux(guidance_embeds=True):
    """FLUX.1-dev, or FLUX.1-schnell without guidance embeddings."""
    tokenizer = clip_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            **{"num_layers": 1, "num_single_layers": 1, **HEADS},
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guidance_embeds else {"shift": 1.0})),
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(),
        tokenizer_2=t5_tokenizer(),
    )


@written_once
def tiny_flux2_klein(is_distilled=False):
    """FLUX.2-klein, whose VAE has running statistics that are not 0 and 1."""
    vae = AutoencoderKLFlux2(
        **{"block_out_channels": (4, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            **{"num_layers": 1, "num_single_layers": 1, **HEADS},
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(qwen3_config(tokenizer, num_hidden_layers=28)),  # it reads layers 9, 18 and 27
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )


@written_once
def tiny_qwen_image():
    """Qwen-Image. A single step gives NaN, because of `shift_terminal`."""
    tokenizer = qwen_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    text |= {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    tokens = {f"{name}_token_id": len(tokenizer) - 1 for name in ("image", "video", "vision_start", "vision_end")}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            **{"in_channels": 16, "out_channels": 4, "num_layers": 1, **HEADS},
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift": 1.0}, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            **{"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]},
            latents_mean=[-0.7, 0.1, 0.9, 0.0],
            latents_std=[2.8, 1.4, 0.5, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        ),
        tokenizer=tokenizer,
    )


@written_once
def tiny_z_image():
    """Z-Image. Its pipeline writes the chat template into the list of prompts that it is given."""
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            **{"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=Qwen3Model(qwen3_config(tokenizer, num_hidden_layers=2)),
        tokenizer=tokenizer,
    )


def tiny_vae():
    return AutoencoderKL(
        **{"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_tokenizer():
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_config(tokenizer, width):
    return CLIPTextConfig(
        **{"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2},
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        projection_dim=12 if width == 16 else 8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(chr(code), -2.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 98}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def qwen_tokenizer():
    tokens = [*LETTERS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[-2:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3_config(tokenizer, num_hidden_layers):
    return Qwen3Config(
        **{
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vocab_size=len(tokenizer),
        num_hidden_layers=num_hidden_layers,
        max_position_embeddings=1024,
    )


# {class of the pipeline: its folder() here}
FLOW_FOLDERS = {
    "StableDiffusion3Pipeline": tiny_sd3,
    "FluxPipeline": tiny_flux,
    "Flux2KleinPipeline": tiny_flux2_klein,
    "QwenImagePipeline": tiny_qwen_image,
    "ZImagePipeline": tiny_z_image,
}


def plain_flow_pipeline(folder, dtype=torch.float32):
    """A pipeline as a user of diffusers has it."""
    parts = DiffusionPipeline.load_config(folder)
    absent = {name: None for name, part in parts.items() if part == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
