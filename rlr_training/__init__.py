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
"""The life of a training run: plain functions that the scripts call, one part of it a file."""

import logging
import re


# Messages of other libraries at every run that say nothing to its user: {logger: how they begin}. They are left out from
# here, since some come when the library is imported.
LEFT_OUT = {
    # Without a package that only layers of 4 bits on the CPU need.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # About image processors, which are loaded with a pipeline and not used.
    "transformers.utils.import_utils": r"`\w+` requires torchvision",
    # The end of every long prompt; `prompts.warn_of_long_prompts` has one line for all of them.
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
    **{
        f"diffusers.pipelines.{name}.pipeline_{name}": "The following part of your input was truncated"
        for name in ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
    },
}
for _name, _start in LEFT_OUT.items():
    logging.getLogger(_name).addFilter(lambda record, start=_start: re.match(start, record.getMessage()) is None)


def __getattr__(name):
    # Not imported above, so that the parsers of the scripts do not wait for torch.
    if name == "GradientClipping":
        from .optimizer import GradientClipping

        return GradientClipping
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
