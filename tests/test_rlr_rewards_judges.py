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
"""HPSv3 and the aesthetic predictor v2.5, beside their parts called by hand; OCR, on images with text."""

import math
import os
import shutil

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from reward_models import load_reward, load_rewards, parse_reward
from reward_models.ocr import edit_distance, plain, quoted
from rlr_testing import train
from rlr_tiny_rewards import INSTRUCTION, REQUEST, save_aesthetic_v2_5, save_hpsv3
from transformers import Qwen2VLImageProcessorPil, SiglipImageProcessorPil


PROMPTS = ["a red seven", "two blue birds {fly}"]


def eight_bit_images(*sizes):
    """Images (1, 3, H, W) in [0, 1] of such (H, W), with values of 8 bits."""
    images = [torch.nn.functional.interpolate(torch.rand(1, 3, 6, 5), size, mode="bicubic") for size in sizes]
    return [(image.clamp(0, 1) * 255).round() / 255 for image in images]


def to_pil(image):
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


# HPSv3


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory):
    """(folder, network, layers of the head, tokenizer)."""
    folder = tmp_path_factory.mktemp("hpsv3")
    return str(folder), *save_hpsv3(folder)


def hpsv3_by_hand(parts, image, prompt):
    """The score of an image of a size that the original leaves, and of any that it resizes, by its image processor."""
    _, network, layers, tokenizer = parts
    pixels = 256 * 8**2
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": pixels, "longest_edge": pixels})
    inputs = processor(images=to_pil(image), return_tensors="pt")
    tokens = math.prod(inputs["image_grid_thw"][0].tolist()) // 4
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * tokens
        + f"<|vision_end|>{INSTRUCTION.format(text_prompt=prompt)}{REQUEST}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    h = network.model(input_ids=ids, position_ids=positions, **inputs).last_hidden_state[0]
    h = h[ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    h = layers[2](layers[1](layers[0](h).relu()).relu())
    return h[0, 0]


def test_hpsv3_equals_its_parts_called_by_hand(hpsv3):
    """Where nothing is resized, and where the original rounds to 8 bits."""
    reward = load_reward("hpsv3", path=hpsv3[0], dtype=torch.float32)
    fitting, *others = eight_bit_images((128, 128), (60, 100), (300, 200))
    expected = [hpsv3_by_hand(hpsv3, fitting[0], prompt) for prompt in PROMPTS]
    torch.testing.assert_close(
        reward(fitting.expand(2, -1, -1, -1), PROMPTS), torch.stack(expected), rtol=1e-4, atol=1e-5
    )
    assert expected[0] != expected[1]
    for image in others:
        expected = hpsv3_by_hand(hpsv3, image[0], PROMPTS[1])
        torch.testing.assert_close(reward(image, PROMPTS[1:])[0], expected, rtol=2e-2, atol=2e-2)


def test_the_gradient_of_hpsv3_is_that_of_finite_differences(hpsv3):
    reward = load_reward("hpsv3", path=hpsv3[0], dtype=torch.float64)
    images = torch.rand(2, 3, 50, 60, dtype=torch.float64) * 0.8 + 0.1
    direction = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(reward(images.requires_grad_(), PROMPTS).sum(), images)
    with torch.no_grad():
        up, down = (reward(images + sign * 1e-3 * direction, PROMPTS).sum() for sign in (1, -1))
    slope = (gradient * direction).sum()
    assert slope.item() == pytest.approx(((up - down) / 2e-3).item(), rel=1e-2) and slope != 0


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("data_collator_qwen.py", None, "its text data_collator_qwen.py is not on the Hub: pip install --no-deps hpsv3"),
        ("data_collator_qwen.py", "INSTRUCTION = 'x'", "has no entry 'prompt_with_special_token'"),
        ("data_collator_qwen.py", "INSTRUCTION = prompt_with_special_token = 'x'", "has no entry 'prompt_with"),
        ("data_collator_qwen.py", "INSTRUCTION = 'x'\nprompt_with_special_token = 'x'", "has no texts with {text_prompt}"),
        ("HPSv3.safetensors", None, "holds no HPSv3.safetensors"),
        ("HPSv3.safetensors", "", "HPSv3.safetensors': "),
        ("base/config.json", None, "base' holds no config.json"),
        ("base/tokenizer.json", None, "base' holds no tokenizer.json or vocab.json"),
    ],
)  # fmt: skip
def test_folders_of_hpsv3_that_do_not_fit_are_refused(hpsv3, tmp_path, file, content, problem):
    folder = shutil.copytree(hpsv3[0], tmp_path / "hpsv3")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"^reward 'hpsv3' cannot be loaded: .*{problem}") as error:
        load_reward("hpsv3", path=str(folder))
    assert "\n" not in str(error.value)


def test_prompts_that_a_reward_cannot_score_are_refused_before_any_image(hpsv3):
    rewards = load_rewards(parse_reward("hpsv3"), {"hpsv3": hpsv3[0]}, size=(32, 32))
    rewards.check_prompts(PROMPTS)
    with pytest.raises(ValueError, match=r"the prompt 'a <\|Reward\|>' contains the special token"):
        rewards.check_prompts([*PROMPTS, "a <|Reward|>"])


# Aesthetic predictor v2.5


def test_aesthetic_v2_5_equals_its_parts_called_by_hand(tmp_path):
    model, layers = save_aesthetic_v2_5(tmp_path)
    reward = load_reward("aesthetic_v2.5", path=str(tmp_path))
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    for size, tolerance in (((32, 32), 1e-5), ((50, 90), 1e-2)):  # the original rounds what it resizes to 8 bits
        (image,) = eight_bit_images(size)
        pixels = processor(images=to_pil(image[0]), return_tensors="pt")["pixel_values"]
        h = model.vision_model(pixel_values=torch.as_tensor(np.asarray(pixels))).pooler_output
        h = h / h.norm()
        for layer in layers:
            h = layer(h)
        torch.testing.assert_close(reward(image, [""]), h[0], rtol=tolerance, atol=tolerance)


def test_aesthetic_v2_5_needs_the_file_of_its_head(tmp_path):
    with pytest.raises(
        ValueError, match="aesthetic_predictor_v2_5.pth is not on the Hub: download it from github.com"
    ):
        load_reward("aesthetic_v2.5")
    with pytest.raises(ValueError, match="holds no aesthetic_predictor_v2_5.pth"):
        load_reward("aesthetic_v2.5", path=str(tmp_path))


# OCR


def written(*lines, size=256):
    """An image (1, 3, H, W) with lines of text."""
    image = Image.new("RGB", (size, size), "white")
    font = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "fonts", "ttf", "DejaVuSans-Bold.ttf")
    for i, line in enumerate(lines):
        position = size // 10, size // 4 + i * size // 5
        ImageDraw.Draw(image).text(position, line, font=ImageFont.truetype(font, size // 8), fill=(160, 0, 60))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def test_text_is_read_and_compared_with_what_the_prompt_quotes():
    pytest.importorskip("rapidocr")
    images = torch.cat([written("OPEN", "24 HOURS"), written("OPEN"), written("CLOSED"), written()])
    scores = load_reward("ocr")(images, ['a sign that says "Open" and "24 hours!"'] * 4)
    assert scores.tolist() == pytest.approx([1, 4 / 11, 1 / 11, 0], abs=1e-6)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "Stop here"', "Stop here"),
        ("a sign “Stop” and «ici»", "Stop ici"),
        ("a sign ‘Stop’ that isn't 'red hot'", "Stop red hot"),
        ("the baker's sign 'Bread'", "Bread"),
    ],
)
def test_quoted_texts(prompt, text):
    assert quoted(prompt) == text


def test_case_marks_and_spaces_do_not_count():
    assert plain("Straße №5, “Ｏpen” – 24h!") == "strasseno5open24h"
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3


@pytest.mark.parametrize("where", ["--prompts", "--validation_prompts"])
def test_a_run_on_prompts_without_a_text_is_refused_before_it_starts(tmp_path, where):
    pytest.importorskip("rapidocr")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign "STOP"\n' + ("a fox\n" if where == "--prompts" else ""))
    flags = ["--prompts", str(prompts), "--reward", "ocr"]
    with pytest.raises(SystemExit, match="reads the text that the prompt quotes, and 'a fox' quotes none"):
        train(
            tmp_path / "out", *flags, *(["--validation_prompts", "a fox"] if where == "--validation_prompts" else [])
        )
    assert not (tmp_path / "out").exists()


def test_a_custom_reward_may_refuse_prompts(tmp_path):
    (tmp_path / "picky.py").write_text(
        "def picky(images, prompts):\n    return images.mean((1, 2, 3))\n\ndef check(prompts):\n"
        "    if 'a fox' in prompts:\n        raise ValueError('no foxes')\n\npicky.check_prompts = check\n"
    )
    rewards = load_rewards(parse_reward(f"{tmp_path}/picky.py:picky"), {}, size=(32, 32))
    rewards.check_prompts(["a dog"])
    with pytest.raises(ValueError, match="picky' refuses the prompts: ValueError: no foxes"):
        rewards.check_prompts(["a dog", "a fox"])
