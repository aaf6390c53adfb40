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
"""How much of the text that a prompt quotes stands in the image, as rapidocr reads it."""

import functools
import re
import unicodedata

import torch

from .base import check_batch


# What stands between the same marks, or between those of a pair. An apostrophe within a word is none.
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|‘([^’]+)’|(?<!\w)\'([^\']+)\'(?!\w)')


@functools.cache
def reader():
    """The engine, whose models come with the package."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError("the reward 'ocr' needs rapidocr: pip install rapidocr onnxruntime") from error
    return RapidOCR(params={"Global.log_level": "error"})


def quoted(prompt):
    """The quoted texts of a prompt, with a space between them.

    Raises:
        ValueError: if there are none.
    """
    texts = ["".join(groups) for groups in QUOTED.findall(prompt)]
    if not plain(" ".join(texts)):
        raise ValueError(
            f"the reward 'ocr' reads the text that the prompt quotes, and {prompt[:80]!r} quotes none: write \"...\""
        )
    return " ".join(texts)


def plain(text):
    """Letters and digits of a text, in lower case: spaces, marks and case are not read reliably."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def edit_distance(one, other):
    """The least number of insertions, deletions and replacements of letters that make one text of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != wanted))
    return row[-1]


def ocr(images, prompts):
    """R = 1 - min(1, d / n): d edits make the quoted text, of n letters and digits, of the text in the image.

    Spaces, punctuation and case do not count. Lines are read from top to bottom.

    Images are (B, 3, H, W) in [0, 1] and scores are (B,). There is no gradient.

    Raises:
        ValueError: if a prompt quotes no text, or rapidocr is not installed.
    """
    check_batch(images, prompts)
    wanted = [plain(quoted(prompt)) for prompt in prompts]
    # As OpenCV reads images: blue first.
    pixels = (images.detach().float() * 255).round().to(torch.uint8).flip(1).permute(0, 2, 3, 1).cpu().numpy()
    found = [plain("".join(reader()(image).txts or ())) for image in pixels]
    scores = [1 - min(1, edit_distance(one, other) / len(other)) for one, other in zip(found, wanted)]
    return torch.tensor(scores, dtype=torch.float32, device=images.device)


def check_prompts(prompts):
    reader()
    for prompt in prompts:
        quoted(prompt)


ocr.differentiable = False
ocr.check_prompts = check_prompts
