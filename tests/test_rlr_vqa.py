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
"""VQAScore on tiny models of the real classes, beside their own processors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import load_reward
from rlr_tiny_rewards import save_llava, save_vqa
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
)


PROMPT = "two blue birds {fly}"
SAVE = {"qwen": save_vqa, "llava": save_llava}
# Sizes that are not resized, (height, width).
FITTING = {"qwen": (40, 48), "llava": (32, 32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder of a tiny model}."""
    found = {}
    for kind, save in SAVE.items():
        found[kind] = str(tmp_path_factory.mktemp(kind))
        save(tmp_path_factory.getbasetemp() / found[kind])
    return found


def reference(kind, folder, image, question):
    """The logits of the next token as the model and its own processor give them, in float32.

    That of Qwen needs torchvision for videos: what it does to images is written out.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    if kind == "qwen":
        inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=to_pil(image), return_tensors="pt")
        tokens = inputs["image_grid_thw"].prod().item() // 4
        inputs |= tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")
        places = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = places.int()
    else:
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = LlavaProcessor(CLIPImageProcessorPil.from_pretrained(folder), tokenizer, **options)
        inputs = processor(images=to_pil(image), text=text, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**inputs).logits[0, -1], tokenizer


def to_pil(image):
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def eight_bit_image(height, width):
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6), (height, width), mode="bicubic").clamp(0, 1)
    return torch.from_numpy(np.array(to_pil(image[0]))).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("kind", SAVE)
def test_the_score_is_that_of_the_models_own_processor(kind, folders):
    """The probability of the answer's first token, to 1e-4; where the image is resized, to the rounding to 8 bits."""
    image = eight_bit_image(*FITTING[kind])
    reward = load_reward("vqa", path=folders[kind], dtype=torch.float32)
    logits, tokenizer = reference(
        kind, folders[kind], image[0], f'Does this image show "{PROMPT}"? Please answer yes or no.'
    )
    expected = logits.softmax(-1)[tokenizer("Yes", add_special_tokens=False).input_ids[0]]
    torch.testing.assert_close(reward(image, [PROMPT])[0], expected, rtol=1e-4, atol=0)
    options = {"question": "Are these {prompt}, a {thing}?", "answer": "No"}
    asked, image = (
        load_reward("vqa", path=folders[kind], dtype=torch.float32, options=options),
        eight_bit_image(50, 61),
    )
    logits, _ = reference(kind, folders[kind], image[0], f"Are these {PROMPT}, a {{thing}}?")
    expected = logits.softmax(-1)[tokenizer("No", add_special_tokens=False).input_ids[0]]
    torch.testing.assert_close(asked(image, [PROMPT])[0], expected, rtol=2e-2, atol=0)
    assert not torch.allclose(reward(image, [PROMPT]), asked(image, [PROMPT]), rtol=1e-2)


@pytest.mark.parametrize("kind", SAVE)
def test_the_gradient_is_that_of_finite_differences(kind, folders):
    reward = load_reward("vqa", path=folders[kind], dtype=torch.float64)
    images = torch.rand(2, 3, 40, 48, dtype=torch.float64) * 0.8 + 0.1
    direction = torch.randn_like(images)
    prompts = [PROMPT, "a fox"]
    (gradient,) = torch.autograd.grad(reward(images.requires_grad_(), prompts).sum(), images)
    with torch.no_grad():
        # Some layers compute in float32 whatever the precision, so that a smaller difference would be rounding.
        up, down = (reward(images + sign * 3e-4 * direction, prompts).sum() for sign in (1, -1))
    slope = (gradient * direction).sum()
    assert slope.item() == pytest.approx(((up - down) / 6e-4).item(), rel=1e-3) and slope != 0


def test_in_half_precision_the_probability_is_in_float32(folders):
    images = torch.rand(2, 3, 40, 48)
    scores = load_reward("vqa", path=folders["qwen"])(images, [PROMPT, "a fox"])
    expected = load_reward("vqa", path=folders["qwen"], options={"dtype": "fp32"})(images, [PROMPT, "a fox"])
    assert scores.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.2, atol=0)
    assert not torch.equal(scores, expected)


def test_a_folder_and_the_name_of_a_model_or_no_answer_are_refused(folders):
    for option, problem in (("model", "give one of them"), ("answer", "its option answer is empty")):
        with pytest.raises(ValueError, match=problem):
            load_reward("vqa", path=folders["qwen"], options={option: "x" if option == "model" else ""})


def test_special_tokens_in_prompts_are_refused(folders):
    reward = load_reward("vqa", path=folders["qwen"])
    with pytest.raises(ValueError, match=r"vqa: the prompt 'a <\|image_pad\|>' contains the special token"):
        reward(torch.rand(1, 3, 40, 48), ["a <|image_pad|>"])


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("chat_template.jinja", None, "its tokenizer has no chat template"),
        ("chat_template.jinja", "no place", "its chat template has no place for an image"),
        ("preprocessor_config.json", {"do_normalize": False}, "Qwen2VLImageProcessorPil cannot be .*: its pixel_values diff"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "its pixel_values is not reproduced"),
        ("config.json", {"model_type": "qwen"}, "cannot be read: "),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(folders, tmp_path, file, change, problem):
    folder = shutil.copytree(folders["qwen"], tmp_path / "vqa")
    content = (folder / file).read_text()
    (folder / file).unlink()
    if isinstance(change, dict):
        content = json.dumps({**json.loads(content), **change})
    if change is not None:
        (folder / file).write_text(content if isinstance(change, dict) else change)
    with pytest.raises(ValueError, match=f"^reward 'vqa' cannot be loaded: .*{problem}") as error:
        load_reward("vqa", path=str(folder))
    assert "\n" not in str(error.value)
