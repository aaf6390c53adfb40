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
"""The diffusive chain of thought of RLR (huggingface.co/papers/2502.00639): coarse, mid and fine prompts, one after the
other along one chain."""

import torch

from .prompts import embed


BOUNDARIES = (0.33, 0.67)


def levels_of_steps(num_steps, boundaries=BOUNDARIES):
    """The level of each of T steps, the first executed first: 0 (coarse), 1 (mid) or 2 (fine).

    Args:
        boundaries: where the levels change, as shares of the chain.

    Raises:
        ValueError: if they are not two shares in their order.
    """
    if not 0 <= boundaries[0] <= boundaries[1] <= 1:
        raise ValueError(f"the boundaries {list(boundaries)} are not two shares of the chain, in their order")
    return [sum(i >= boundary * num_steps for boundary in boundaries) for i in range(num_steps)]


class ChainOfThought:
    """A `callback_on_step_end` for diffusers' Stable Diffusion and SDXL pipelines, which are called with the first step's
    prompts:

        thought = ChainOfThought(pipeline, coarse, mid, fine, num_inference_steps=50)
        pipeline(thought.first, num_inference_steps=50, callback_on_step_end=thought, **thought.inputs)

    Args:
        pipeline: with `encode_prompt`, its text encoders on the device that the pipeline runs on.
        coarse, mid, fine: B prompts each.
        num_inference_steps: as for the pipeline.
        boundaries: where the levels change, as shares of the chain.

    Attributes:
        first: the prompts of the first step, the coarse ones unless the first boundary is 0.
        inputs: what the pipeline must be called with besides.
    """

    def __init__(self, pipeline, coarse, mid, fine, num_inference_steps, boundaries=BOUNDARIES):
        self.embeds = [embed(pipeline, level, pipeline.text_encoder.device) for level in (coarse, mid, fine)]
        self.levels = levels_of_steps(num_inference_steps, boundaries)
        self.first = (coarse, mid, fine)[self.levels[0]]
        self.names = ["prompt_embeds", "add_text_embeds"][: len(self.embeds[0])]
        self.inputs = {"callback_on_step_end_tensor_inputs": self.names}

    def __call__(self, pipeline, step_index, timestep, kwargs):
        """What the pipeline is to go on with after the step `step_index`: the embeddings of the next step's level."""
        if step_index + 1 == len(self.levels):
            return {}
        found = dict(zip(self.names, self.embeds[self.levels[step_index + 1]]))
        for name, embeds in found.items():
            embeds = embeds.to(kwargs[name])
            if pipeline.do_classifier_free_guidance:
                embeds = torch.cat([kwargs[name].chunk(2)[0], embeds])
            found[name] = embeds
        return found
