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
"""Z-Image, base and turbo."""

import torch
from rlr_utils import joined

from .flow import FlowModel


class ZImage(FlowModel):
    """`ZImagePipeline`; its conditions are "prompt_embeds" (B, L, D) and "prompt_embeds_mask" (B, L).

    The network predicts the negative of the flow, and is told 1 - sigma.
    """

    pipeline_class = "ZImagePipeline"
    name = "z-image"
    has_chat = True

    @classmethod
    def latent_channels(cls, pipeline):
        return pipeline.transformer.config.in_channels

    @classmethod
    def text_widths(cls, pipeline):
        return [("prompts", pipeline.text_encoder.config.hidden_size, pipeline.transformer.config.cap_feat_dim)]

    @property
    def default_size(self):
        return 1024, 1024  # the pipeline's own; the configurations do not say it

    def chain_guidance(self, guidance_scale):
        # The pipeline adds g (positive - negative) to the positive prediction, not to the negative one.
        return 1 + guidance_scale

    @staticmethod
    def guide(negative, positive, scale):
        """Classifier-free guidance in the pipeline's own order, for the last digits."""
        return positive + (scale - 1) * (positive - negative)

    def embed(self, prompts, device=None):
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),  # which the pipeline writes into
            device or self.network.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        masks = [torch.ones(1, len(one), dtype=torch.bool, device=one.device) for one in embeds]
        return joined([{"prompt_embeds": one[None], "prompt_embeds_mask": mask} for one, mask in zip(embeds, masks)])

    def call(self, network, x, timestep, conditions, static):
        embeds, lengths = conditions["prompt_embeds"], conditions["prompt_embeds_mask"].sum(1).tolist()
        predictions = network(
            list(x.to(embeds.dtype).unsqueeze(2)),
            ((1000 - timestep) / 1000).expand(len(x)),
            [prompt[:length] for prompt, length in zip(embeds, lengths)],
            return_dict=False,
        )[0]
        return -torch.stack(predictions).squeeze(2)
