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

import logging
import os
import tempfile
from contextlib import contextmanager

import torch
from rlr_utils import joined
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers.training_utils import free_memory


logger = logging.getLogger(__name__)


class PromptEmbeds:
    """The conditions of prompts, kept on the CPU, where the text encoders rest between new prompts.

    Every prompt is encoded by itself: in a batch its last digits would depend on the other prompts. Encoders for which the
    device has no room work on the CPU.

    Args:
        model: `DiffusionModel`, whose text encoders are moved to the CPU.
        device: of the results.
        max_bytes: of the embeddings kept in memory, the latest. A prompt of SD 1.4 takes 118 KB in half precision, one of
            SDXL 318 KB, one of SD3 2.7 MB and one of FLUX.1 or Wan 4.2 MB.
    """

    def __init__(self, model, device, max_bytes=4 * 2**30):
        self.model = model
        for encoder in model.text_encoders:
            encoder.cpu()
        self.device = self.encoding_device = torch.device(device)
        self.max_bytes, self.bytes = max_bytes, 0
        self.kept = {}  # {prompt: its conditions, or the file that holds them}
        self.negatives = {}  # {negative prompt or None: its conditions}; the training and the drawn images share one
        self.folder = None

    @torch.no_grad()
    def __call__(self, prompts):
        """B prompts -> conditions {name: (B, ...)}, see `rlr_utils.joined` for prompts of differing length.

        Raises:
            ValueError: for a prompt that `encode_all` has not encoded, if it was called.
        """
        self._encode([prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept])
        found = [self._read(self.kept[prompt]) for prompt in prompts]
        while self.bytes > self.max_bytes and len(self.kept) > 1:
            self.bytes -= _size(self.kept.pop(next(iter(self.kept))))
        return {name: value.to(self.device) for name, value in joined(found).items()}

    @torch.no_grad()
    def negative(self, prompt):
        """Conditions {name: (1, ...)} of a negative prompt, or of none; `None` for a model without guidance."""
        if prompt not in self.negatives:
            with self._encoders_on_device():
                embeds = self._encoded(self.model.embed_negative, prompt)
            self.negatives[prompt] = embeds and {name: value.to(self.device) for name, value in embeds.items()}
        return self.negatives[prompt]

    @torch.no_grad()
    def encode_all(self, prompts, show_progress=True):
        """Encode prompts now, those beyond `max_bytes` into files; no others after them."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]
        self.folder = tempfile.TemporaryDirectory(prefix="prompt-embeds-")
        with self._encoders_on_device():
            for number, prompt in enumerate(tqdm(new, desc="prompts", disable=not show_progress or len(new) < 10)):
                embeds = self._embed(prompt)
                if self.bytes + _size(embeds) > self.max_bytes:
                    path = os.path.join(self.folder.name, f"{number}.safetensors")
                    save_file(embeds, path)
                    self.kept[prompt] = path
                else:
                    self._keep(prompt, embeds)

    def free_encoders(self):
        """Free the text encoders of the model, when all prompts are encoded."""
        self.model.free_text_encoders()
        free_memory()

    def _encode(self, new):
        if not new:
            return
        if self.folder is not None:
            raise ValueError(f"the prompt {new[0]!r} was not encoded with the others")
        with self._encoders_on_device():
            for prompt in new:
                self._keep(prompt, self._embed(prompt))

    def _embed(self, prompt):
        embeds = self._encoded(self.model.embed, [prompt])
        return {name: value.cpu().contiguous() for name, value in embeds.items()}

    def _encoded(self, embed, prompts):
        """embed(prompts, device), on the CPU if the device has too little memory."""
        try:
            return embed(prompts, self.encoding_device)
        except torch.OutOfMemoryError:
            if self.encoding_device == torch.device("cpu"):
                raise
        self._encode_on_cpu()
        return embed(prompts, self.encoding_device)

    @contextmanager
    def _encoders_on_device(self):
        """Within it, the text encoders are on the device, if it has room for them."""
        try:
            for encoder in self.model.text_encoders:
                encoder.to(self.encoding_device)
        except torch.OutOfMemoryError:
            self._encode_on_cpu()
        try:
            yield
        finally:
            for encoder in self.model.text_encoders:
                encoder.cpu()

    def _encode_on_cpu(self):
        """Have the encoders work on the CPU from now on."""
        logger.warning("the text encoders do not fit on the device and encode prompts on the CPU, which takes longer")
        self.encoding_device = torch.device("cpu")
        for encoder in self.model.text_encoders:
            encoder.cpu()
        free_memory()

    def _keep(self, prompt, embeds):
        self.kept[prompt] = embeds
        self.bytes += _size(embeds)

    def _read(self, entry):
        return load_file(entry) if isinstance(entry, str) else entry


def _size(embeds):
    """Bytes of conditions {name: tensor}."""
    return sum(value.nbytes for value in embeds.values())
