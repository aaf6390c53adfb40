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
"""FLUX.1 dev, whose guidance is distilled into the network, and schnell, which has none."""

import torch

from .flow import FlowModel, packed, unpacked


class Flux(FlowModel):
    """`FluxPipeline`; its conditions are "prompt_embeds" (B, L, D) of T5 and the pooled "pooled_prompt_embeds" (B, D')."""

    pipeline_class = "FluxPipeline"
    name = "flux"
    scheduler_entries = ("use_dynamic_shifting",)
    takes_guidance = True
    takes_solvers = False
    lora_layers = (
        "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,"
        "ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"
    )

    @classmethod
    def text_widths(cls, pipeline):
        config = pipeline.transformer.config
        return [
            ("prompts", pipeline.text_encoder_2.config.d_model, config.joint_attention_dim),
            ("pooled prompts", pipeline.text_encoder.config.hidden_size, config.pooled_projection_dim),
        ]

    @property
    def is_guided(self):
        """Whether the network takes a guidance scale, as FLUX.1 dev does."""
        return self.pipeline.transformer.config.guidance_embeds

    @property
    def num_inference_steps(self):
        return 28 if self.is_guided else 4

    @property
    def guidance_scale(self):
        return 3.5 if self.is_guided else 0.0

    @property
    def prompt_reader(self):
        return self.pipeline.tokenizer_2, self.max_sequence_length

    def embed(self, prompts, device=None):
        embeds, pooled, _ = self.pipeline.encode_prompt(
            *(prompts, None), device or self.network.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def embed_negative(self, prompt=None, device=None):
        if prompt is not None:
            raise ValueError(f"FLUX.1 has no classifier-free guidance: a negative prompt, {prompt!r}, changes nothing")
        return None

    def static(self, size, guidance_scale=1.0):
        height, width = (side // 2 for side in self.latents_shape(1, size)[-2:])
        places = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
        guidance = {"guidance": torch.tensor([float(guidance_scale)])} if self.is_guided else {}
        return {"img_ids": places, **guidance}

    def call(self, network, x, timestep, conditions, static):
        embeds, guidance = conditions["prompt_embeds"], static.get("guidance")
        prediction = network(
            hidden_states=packed(x.to(embeds.dtype)),
            timestep=timestep.expand(len(x)).to(embeds.dtype) / 1000,
            guidance=None if guidance is None else guidance.expand(len(x)),
            pooled_projections=conditions["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=static["img_ids"].to(embeds.dtype),
            return_dict=False,
        )[0]
        return unpacked(prediction, *x.shape[-2:])
