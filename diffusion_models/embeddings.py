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
"""The embeddings of prompts, each computed once."""

import torch

from diffusers.training_utils import offload_models


class PromptEmbeds:
    """The conditions of prompts, kept on the CPU, where the text encoders rest between new prompts.

    Every prompt is encoded by itself: in a batch its last digits would depend on the other prompts.

    Args:
        model: `DiffusionModel`, whose text encoders are moved to the CPU.
        device: of the results.
        max_prompts: how many prompts are kept, the latest. One of SD 1.4 takes 118 KB in half precision, one of SDXL 318
            KB. If a run has more prompts, the encoders are moved for every batch.
    """

    def __init__(self, model, device, max_prompts=4096):
        self.model = model
        for encoder in model.text_encoders:
            encoder.cpu()
        self.device = device
        self.max_prompts = max_prompts
        self.kept = {}

    @torch.no_grad()
    def __call__(self, prompts):
        """B prompts -> conditions {name: (B, ...)}."""
        self._keep([prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept])
        found = [self.kept[prompt] for prompt in prompts]
        embeds = {name: torch.cat([one[name] for one in found]).to(self.device) for name in found[0]}
        for prompt in list(self.kept)[: -self.max_prompts]:
            del self.kept[prompt]
        return embeds

    def _keep(self, new):
        if not new:
            return
        with offload_models(*self.model.text_encoders, device=self.device):
            for prompt in new:
                embeds = self.model.embed(prompt, self.device)
                self.kept[prompt] = {name: value.cpu() for name, value in embeds.items()}

    @torch.no_grad()
    def negative(self, negative_prompt):
        """Conditions {name: (1, ...)} of a negative prompt, or of none, which for some pipelines is not the empty one."""
        if negative_prompt is None:
            with offload_models(*self.model.text_encoders, device=self.device):
                nothing = self.model.embed_nothing(self.device)
            if nothing is not None:
                return nothing
        return self([negative_prompt or ""])
