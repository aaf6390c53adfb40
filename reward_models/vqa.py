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
"""VQAScore: the probability that a vision-language model answers "Yes" to a question about an image.

huggingface.co/papers/2404.01291
"""

import inspect

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from .loading import load_pretrained, one_line_errors
from .vision_language import OneByOne, check_special_tokens, reading_of


MODEL_ID = "Qwen/Qwen2.5-VL-3B-Instruct"
QUESTION = 'Does this image show "{prompt}"? Please answer yes or no.'
ANSWER = "Yes"


class VQAScore(OneByOne):
    """R = P(answer | image, question), the probability of the answer's first token among all tokens.

    Args:
        network: of transformers, for image-text-to-text.
        tokenizer: with a chat template.
        reading: from `vision_language.reading_of`.
        question: in which {prompt} stands for the prompt.
        answer: such as "Yes".
    """

    def __init__(self, network, tokenizer, reading, question, answer):
        super().__init__()
        self.network, self.tokenizer, self.reading, self.question = network, tokenizer, reading, question
        self.answer_id = tokenizer(answer, add_special_tokens=False).input_ids[0]
        self.image_id = network.config.image_token_id
        self.takes_types = "mm_token_type_ids" in inspect.signature(network.forward).parameters

    def score(self, image, prompt):
        """The probability, in float32 or wider, of an image (3, H, W) in [0, 1]."""
        wide = torch.promote_types(self.network.dtype, torch.float32)
        inputs = self.reading(image[None].to(wide))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.network.dtype)
        inputs["input_ids"] = self.tokens(prompt, self.image_tokens(inputs)).to(image.device)[None]
        if self.takes_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_id).int()
        logits = self.network(**inputs, logits_to_keep=1, use_cache=False).logits[0, -1]
        return logits.to(wide).softmax(-1)[self.answer_id]

    @torch.no_grad()
    def image_tokens(self, inputs):
        """How many tokens the image takes."""
        if "image_grid_thw" in inputs:
            return inputs["image_grid_thw"].prod().item() // self.reading.merge**2
        if not hasattr(self, "tokens_of_crop"):
            self.tokens_of_crop = sum(map(len, self.network.get_image_features(**inputs).pooler_output))
        return self.tokens_of_crop

    def tokens(self, prompt, image_tokens):
        """Tokens (L,) of the question about an image of so many tokens.

        Raises:
            ValueError: if the prompt contains a special token, or the chat template has no place for an image.
        """
        check_special_tokens("vqa", prompt, self.tokenizer.all_special_tokens)
        content = [{"type": "image"}, {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(text, add_special_tokens=not begins).input_ids
        if self.image_id not in ids:
            raise ValueError("its chat template has no place for an image")
        place = ids.index(self.image_id)
        return torch.tensor([*ids[:place], *[self.image_id] * image_tokens, *ids[place + 1 :]])


def load(path, revision, device, dtype, model=None, question=QUESTION, answer=ANSWER):
    """Load from the Hub, or from a folder of a transformers model for image-text-to-text.

    Supported are models that read patches, as Qwen2.5-VL, or a square of a fixed size, as LLaVA 1.5.
    """
    if path is not None and model is not None:
        raise ValueError(f"its folder {path!r} and its option model {model!r}: give one of them")
    source = path or model or MODEL_ID
    kind = {"revision": revision} if path is None else {}
    with one_line_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **kind)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **kind)
    if tokenizer.chat_template is None:
        raise ValueError(f"{source!r}: its tokenizer has no chat template, in which a question would be asked")
    if not tokenizer(answer, add_special_tokens=False).input_ids:
        raise ValueError("its option answer is empty")
    reading = reading_of(processor)
    network = load_pretrained(AutoModelForImageTextToText, source, dtype=dtype, **kind)
    reward = VQAScore(network, tokenizer, reading, question, answer).to(device)
    with one_line_errors(source):
        reward.tokens("", 1)  # its template may have no place for an image
    return reward
