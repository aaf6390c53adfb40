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
"""Stable Diffusion 3 and 3.5, with or without T5."""

from .flow import FlowModel


class StableDiffusion3(FlowModel):
    """`StableDiffusion3Pipeline`; its conditions are "prompt_embeds" (B, L, D) and the pooled "pooled_prompt_embeds" (B, D')."""

    pipeline_class = "StableDiffusion3Pipeline"
    name = "sd3"
    repeated_blocks = ("JointTransformerBlock",)
    optional = ("text_encoder_3", "tokenizer_3")
    num_inference_steps = 28
    guidance_scale = 7.0
    lora_layers = (
        "attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,attn.to_k,attn.to_out.0,attn.to_q,attn.to_v"
    )
    native_sigmas = True
    widest_shift = 1.16
    max_sequence_length = 256

    @classmethod
    def latent_channels(cls, pipeline):
        return pipeline.transformer.config.in_channels

    @classmethod
    def text_widths(cls, pipeline):
        config, clips = pipeline.transformer.config, (pipeline.text_encoder, pipeline.text_encoder_2)
        if None in clips:
            raise ValueError("it does not have both CLIP text encoders")
        widths = [("pooled prompts", sum(clip.config.projection_dim for clip in clips), config.pooled_projection_dim)]
        width = sum(clip.config.hidden_size for clip in clips)
        if width > config.joint_attention_dim:  # the pipeline would cut them off
            raise ValueError(
                f"the transformer takes prompts of width {config.joint_attention_dim}, and the CLIPs give {width}"
            )
        if pipeline.text_encoder_3 is None:
            return widths
        if pipeline.tokenizer_3 is None:
            raise ValueError("it has text_encoder_3 but no tokenizer_3")
        return [*widths, ("prompts of T5", pipeline.text_encoder_3.config.d_model, config.joint_attention_dim)]

    @property
    def prompt_reader(self):
        if "text_encoder_3" in self.missing:
            return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length
        return self.pipeline.tokenizer_3, self.max_sequence_length

    def embed(self, prompts, device=None):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            *(prompts, None, None),
            device=device or self.network.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def call(self, network, x, timestep, conditions, static):
        embeds = conditions["prompt_embeds"]
        return network(
            x.to(embeds.dtype), embeds, conditions["pooled_prompt_embeds"], timestep.expand(len(x)), return_dict=False
        )[0]
