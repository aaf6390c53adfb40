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
"""The diffusive chain of thought of RLR (huggingface.co/papers/2502.00639): a coarse, a middle and a fine prompt, one after
the other along one chain."""

import torch

from . import as_model
from .levels import BOUNDARIES, levels_of_steps


class ChainOfThought:
    """A `callback_on_step_end` for a pipeline of diffusers, which is called with the prompts of the first step:

        thought = ChainOfThought(pipeline, coarse, mid, fine, num_inference_steps=50)
        pipeline(prompt=thought.first, num_inference_steps=50, callback_on_step_end=thought, **thought.inputs)

    Args:
        pipeline: of a family of `diffusion_models`, its text encoders on the device that the pipeline runs on.
        coarse, mid, fine: B prompts each.
        num_inference_steps: as for the pipeline.
        boundaries: where the levels change, as shares of the chain.

    Attributes:
        first: the prompts of the first step: the coarse ones, unless the first boundary is 0.
        inputs: further arguments of the pipeline's call.

    Raises:
        ValueError: as `levels_of_steps` does, and for a pipeline that lets no callback change all that it takes of a prompt.
    """

    def __init__(self, pipeline, coarse, mid, fine, num_inference_steps, boundaries=BOUNDARIES):
        device = pipeline.text_encoder.device
        self.embeds = [as_model(pipeline).embed(level, device) for level in (coarse, mid, fine)]
        fixed = self.embeds[0].keys() - set(pipeline._callback_tensor_inputs)
        if fixed:
            raise ValueError(f"a {type(pipeline).__name__} lets no callback change {', '.join(sorted(fixed))}")
        self.levels = levels_of_steps(num_inference_steps, boundaries)
        self.first = (coarse, mid, fine)[self.levels[0]]
        self.names = list(self.embeds[0])
        self.inputs = {"callback_on_step_end_tensor_inputs": self.names}

    def __call__(self, pipeline, step_index, timestep, kwargs):
        """The embeddings of the next step's level, for diffusers to go on with after the step `step_index`."""
        if step_index + 1 == len(self.levels):
            return {}
        level = self.embeds[self.levels[step_index + 1]]
        found = {name: level[name].to(kwargs[name]) for name in self.names}
        # Under guidance most pipelines hold negative and positive prompts in one batch.
        return {name: torch.cat([kwargs[name][: -len(embeds)], embeds]) for name, embeds in found.items()}
