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
"""Tiny Wan pipelines of the real classes with random weights, built offline and written once per process."""

from rlr_flow_models import t5_tokenizer, written_once
from transformers import UMT5Config, UMT5EncoderModel

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel


STATISTICS = {"latents_mean": [-0.7, 0.1, 0.9, 0.0], "latents_std": [2.8, 1.4, 0.5, 1.0]}


@written_once
def tiny_wan():
    """Wan 2.1, with the scheduler of its repositories."""
    return WanPipeline(**wan_components(tiny_wan_vae()))


@written_once
def tiny_wan22():
    """Wan 2.2 TI2V 5B: a timestep for each patch, and a VAE with residual blocks that makes patches of pixels."""
    return WanPipeline(**wan_components(tiny_wan22_vae()), expand_timesteps=True)


@written_once
def tiny_wan_a14b():
    """Wan 2.2 T2V A14B: two transformers. Of three steps the first two are of the first."""
    components = wan_components(tiny_wan_vae())
    return WanPipeline(**components, transformer_2=tiny_wan_transformer(), boundary_ratio=0.7)


def wan_components(vae):
    return {
        "transformer": tiny_wan_transformer(),
        "scheduler": UniPCMultistepScheduler(
            **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        ),
        "vae": vae,
        "text_encoder": tiny_umt5(),
        "tokenizer": t5_tokenizer(),
    }


def tiny_wan_transformer(**options):
    return WanTransformer3DModel(
        **{
            **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12},
            **{"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32},
            "rope_max_seq_len": 32,
            **options,
        }
    )


def tiny_wan_vae(**options):
    """Of Wan 2.1, with 4 x 4 pixels and 4 frames a latent."""
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "scale_factor_spatial": 4}
    return AutoencoderKLWan(**{**sizes, "temperal_downsample": [True, True], **STATISTICS, **options})


def tiny_wan22_vae():
    """Of Wan 2.2 TI2V 5B, with 8 x 8 pixels and 4 frames a latent."""
    return tiny_wan_vae(
        **{"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        **{"scale_factor_spatial": 8, "decoder_base_dim": 8},
    )


def tiny_umt5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 98}
    return UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))


WAN_FOLDERS = {"Wan 2.1": tiny_wan, "Wan 2.2 5B": tiny_wan22, "Wan 2.2 A14B": tiny_wan_a14b}
