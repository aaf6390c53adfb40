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
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import REWARDS, WeightedSum, load_reward, load_rewards, parse_reward, parse_reward_paths
from reward_models.__main__ import main, parse_args
from reward_models.clip import preprocess_clip, preprocess_letterbox
from rlr_hub import LoopbackHub
from rlr_testing import PARITY, ROOT, TINY_AESTHETIC, TINY_CLIP, tiny_pipeline
from safetensors.torch import load_file, save_file
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
    CLIPModel,
)


def images_in(directory, pattern, dtype):
    pictures = [Image.open(os.path.join(directory, pattern.format(i))).convert("RGB") for i in range(2)]
    return [torch.from_numpy(np.asarray(p)).permute(2, 0, 1)[None].to(dtype) / 255 for p in pictures]


@pytest.mark.parametrize("name", ["aesthetic", "clip_score", "hpsv2", "hpsv2.1", "pickscore", "imagereward"])
def test_parity_with_the_original(name, tmp_path):
    """Score and gradient of the original implementation on the same weights, in float64."""
    directory = os.path.join(PARITY, name.removesuffix(".1"))
    if not os.path.isdir(directory):
        pytest.skip(f"no parity fixtures of {name}")
    if name == "hpsv2.1":  # the same architecture and formula in a file of another name
        directory = shutil.copytree(directory, tmp_path / "hpsv2.1")
        os.rename(directory / "HPS_v2_compressed.pt", directory / "HPS_v2.1_compressed.pt")
        directory = str(directory)
    with open(os.path.join(directory, "expected.json")) as file:
        expected = json.load(file)
    reward = load_reward(name, path=directory, dtype=torch.float64)
    images = torch.cat(images_in(directory, "image_{}.png", torch.float64)).requires_grad_()
    scores = reward(images, expected["prompts"])
    target = torch.tensor(expected["score"], dtype=torch.float64)
    assert (scores - target).abs().max() <= 1e-6 * target.abs().max()
    (grad,) = torch.autograd.grad(scores.sum(), images)
    target = torch.from_numpy(np.load(os.path.join(directory, "expected_grad.npz"))["grad"]).double()
    assert (grad - target).abs().max() <= 1e-5 * target.abs().max()
    for i, image in enumerate(images_in(directory, "image_big_{}.png", torch.float64)):
        score = reward(image, expected["prompts"][i : i + 1])
        assert abs(score.item() - expected["score_big"][i]) <= expected["tolerance"]["score_big_abs"]


# transformers' names of a CLIP -> open_clip's, the inverse of what hpsv2.py does, in this order.
OPEN_CLIP_NAMES = (
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    ("self_attn", "attn"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def save_hpsv2(folder, name):
    """The bundled CLIP as an open_clip checkpoint."""
    state, joined = {}, {}
    for key, value in CLIPModel.from_pretrained(TINY_CLIP).state_dict().items():
        for old, new in OPEN_CLIP_NAMES:
            key = key.replace(old, new)
        if key in ("visual.proj", "text_projection"):
            value = value.T
        part = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", key)
        if part:
            joined.setdefault(f"{part[1]}in_proj_{part[3]}", {})[part[2]] = value
        else:
            state[key] = value
    state.update({key: torch.cat([parts[x] for x in "qkv"]) for key, parts in joined.items()})
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 4}
    text = {"context_length": 16, "vocab_size": 566, "width": 64, "heads": 4, "layers": 2}
    model = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(TINY_CLIP, file), folder)
    torch.save({"epoch": 1, "state_dict": state}, folder / name)


def save_imagereward(folder):
    """A small random ImageReward in the files of the original, and its two towers."""
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = {**sizes, "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"##{letter}" for letter in vocabulary[5:]]
    bert["vocab_size"] = len(vocabulary)
    vision = BlipVisionModel(
        BlipVisionConfig(**vit, intermediate_size=128, layer_norm_eps=1e-6, initializer_range=0.2)
    )
    config = BlipTextConfig(**bert, encoder_hidden_size=32, is_decoder=True, bos_token_id=None, initializer_range=0.2)
    text = BlipTextModel(config, add_pooling_layer=False)
    head = {}
    for layer, (rows, columns) in zip((0, 2, 4, 6, 7), ((1024, 24), (128, 1024), (64, 128), (16, 64), (1, 16))):
        head[f"mlp.layers.{layer}.weight"] = torch.randn(rows, columns) / columns**0.5
        head[f"mlp.layers.{layer}.bias"] = torch.randn(rows) / 10
    state = {f"blip.text_encoder.{key}": value for key, value in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    names = (
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
    )
    for key, value in vision.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        state[f"blip.visual_encoder.{key}"] = value
    torch.save({**state, **head, "blip.text_proj.weight": torch.zeros(4, 24)}, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**bert, "encoder_width": 768}))
    (folder / "vit_config.json").write_text(json.dumps(vit))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return vision.eval(), text.eval(), [head[key] for key in head]


@pytest.fixture(scope="module")
def tiny_paths(tmp_path_factory):
    """A folder of every reward that has files, in the layout of the original."""
    paths = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP, "pickscore": TINY_CLIP}
    folders = {name: tmp_path_factory.mktemp(name) for name in ("hpsv2", "hpsv2.1", "imagereward")}
    save_hpsv2(folders["hpsv2"], "HPS_v2_compressed.pt")
    save_hpsv2(folders["hpsv2.1"], "HPS_v2.1_compressed.pt")
    save_imagereward(folders["imagereward"])
    return {**paths, **{name: str(folder) for name, folder in folders.items()}}


@pytest.mark.parametrize("name", REWARDS)
def test_the_contract(name, tiny_paths):
    reward = load_reward(name, path=tiny_paths.get(name))
    images = torch.rand(3, 3, 32, 32).requires_grad_(reward.differentiable)
    scores = reward(images, ["a red seven", "a blue two", "a cyan nine"])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    assert scores.requires_grad == reward.differentiable
    if reward.differentiable:
        assert not any(p.requires_grad for p in reward.parameters()) and not reward.training
        (grad,) = torch.autograd.grad(scores.sum(), images)
        assert grad.abs().amax((1, 2, 3)).min() > 0
    one_by_one = torch.cat(
        [reward(images[i : i + 1], [p]) for i, p in enumerate(["a red seven", "a blue two", "a cyan nine"])]
    )
    torch.testing.assert_close(one_by_one, scores, rtol=1e-4, atol=1e-5)


def test_clip_score_pairs_image_and_prompt():
    prompts = ["a red seven", "a blue two"]
    images = tiny_pipeline()(
        prompts,
        num_inference_steps=20,
        eta=1.0,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    reward = load_reward("clip_score", path=TINY_CLIP)
    right, wrong = reward(images, prompts), reward(images, prompts[::-1])
    assert (right > wrong + 0.1).all()


def test_images_of_other_sizes_are_resized_and_cropped_as_clip_does():
    """Against the PIL preprocessor of transformers, which the reward replaces by tensor operations."""
    processor = CLIPImageProcessorPil.from_pretrained(TINY_CLIP)
    pixels = (torch.rand(3, 9, 7).repeat_interleave(8, 1).repeat_interleave(11, 2) * 255).byte()
    expected = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    result = preprocess_clip(pixels[None].float() / 255, 32)
    assert result.shape == (1, 3, 32, 32)
    assert (result - expected).abs().mean() < 0.01


def test_half_precision_keeps_the_head_and_the_score_in_float32():
    reward = load_reward("aesthetic", path=TINY_AESTHETIC, dtype=torch.bfloat16)
    images = torch.rand(2, 3, 32, 32)
    scores = reward(images, ["", ""])
    assert reward.clip.dtype == torch.bfloat16 and scores.dtype == torch.float32
    full = load_reward("aesthetic", path=TINY_AESTHETIC)(images, ["", ""])
    assert (scores - full).abs().max() < 0.5


def test_jpeg_size_is_the_files_size():
    images = torch.rand(1, 3, 48, 32)
    buffer = io.BytesIO()
    Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    size = len(buffer.getvalue()) / 1000
    assert load_reward("jpeg_incompressibility")(images, [""]).item() == pytest.approx(size)
    assert load_reward("jpeg_compressibility")(images, [""]).item() == pytest.approx(-size)


def test_a_weighted_sum_keeps_its_parts_apart():
    rewards = load_rewards(
        parse_reward("aesthetic:2,clip_score,jpeg_compressibility:0.5"),
        {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP, "pickscore": "nowhere"},
    )
    assert not rewards.differentiable and rewards.has_gradient
    images, prompts = torch.rand(2, 3, 32, 32), ["a red seven", "a blue two"]
    scores = rewards(images, prompts)
    paths = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP}
    single = {name: load_reward(name, path=paths.get(name))(images, prompts) for name in scores.members}
    torch.testing.assert_close(scores.differentiable, 2 * single["aesthetic"] + single["clip_score"])
    torch.testing.assert_close(scores.black_box, 0.5 * single["jpeg_compressibility"])
    torch.testing.assert_close(scores.members["jpeg_compressibility"], single["jpeg_compressibility"])


@pytest.mark.parametrize("result", [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0])])
def test_scores_that_are_no_numbers_are_refused(result):
    reward = lambda images, prompts: result  # noqa: E731
    reward.differentiable = False
    with pytest.raises(ValueError, match="reward 'mine' returned (nan for prompt 'b'|inf for prompt 'a')"):
        WeightedSum({"mine": (1.0, reward)})(torch.rand(2, 3, 8, 8), ["a", "b"])


@pytest.mark.parametrize("constant", [lambda images: torch.ones(1), lambda images: torch.ones(1, requires_grad=True)])
def test_a_score_that_does_not_depend_on_the_picture_has_no_gradient(constant):
    """As of a reward that finds nothing to judge in some pictures: it is tried on others."""
    bright = lambda images, prompts: images.mean((1, 2, 3)) if images.mean() > 0.5 else constant(images)  # noqa: E731
    bright.differentiable = True
    images = torch.stack([torch.full((3, 8, 8), 0.75), torch.full((3, 8, 8), 0.25)])
    scores = WeightedSum({"mine": (2.0, bright)}, batch_size=1)(images, ["a", "b"], with_gradient=True)
    torch.testing.assert_close(scores.total, torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(scores.gradient.flatten(1).sum(1), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("result", [torch.ones(3), torch.ones(2, 1), torch.tensor(1.0), [1.0, 2.0]])
def test_scores_of_another_shape_are_refused(result):
    reward = lambda images, prompts: result  # noqa: E731
    reward.differentiable = False
    with pytest.raises(ValueError, match=r"reward 'mine' returned a .* instead of .*\(2,\)"):
        WeightedSum({"mine": (1.0, reward)})(torch.rand(2, 3, 8, 8), ["a", "b"])


def test_parsing_sums_and_paths():
    assert parse_reward("aesthetic") == {"aesthetic": (1.0, None, "aesthetic")}
    terms = parse_reward("aesthetic:1, hpsv2.1@refs/pr/1:-.5,a.b:c,d/e.py:f:2,pickscore@v1")
    assert {name: (term.weight, term.revision) for name, term in terms.items()} == {
        "aesthetic": (1.0, None),
        "hpsv2.1": (-0.5, "refs/pr/1"),
        "a.b:c": (1.0, None),
        "d/e.py:f": (2.0, None),
        "pickscore": (1.0, "v1"),
    }
    paths = parse_reward_paths(["aesthetic=a", "hpsv2=c", "aesthetic=b=d"])
    assert paths == {"aesthetic": "b=d", "hpsv2": "c"}


@pytest.mark.parametrize(
    "entry",
    [
        *("beauty", "beauty:2", "aesthetic:high", "aesthetic:nan", "aesthetic:", "", "aesthetic:1:2", "aesthetic@:1"),
        *("my_module:f:high", "my_module:f:", "my_module:"),
    ],
)
def test_bad_entries_are_quoted_whole(entry):
    with pytest.raises(ValueError) as error:
        parse_reward(f"jpeg_compressibility:1,{entry}")
    assert repr(entry) in str(error.value)


def test_a_repeated_reward_and_a_bad_path_entry_are_refused():
    with pytest.raises(ValueError, match="'aesthetic:2' repeats"):
        parse_reward("aesthetic:1,aesthetic:2")
    for entry in ("aesthetic", "=dir", "aesthetic=", "beauty=dir"):
        with pytest.raises(ValueError, match=f"'{entry}'"):
            parse_reward_paths([entry])


def test_unknown_rewards_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown reward 'beauty', known are: aesthetic, clip_score"):
        load_reward("beauty")
    with pytest.raises(ValueError, match="'aesthetic=/no/such/folder': no such folder"):
        load_reward("aesthetic", path="/no/such/folder")
    with pytest.raises(ValueError, match="'jpeg_compressibility=.*': this reward has no files"):
        load_reward("jpeg_compressibility", path=str(tmp_path))
    with pytest.raises(ValueError, match="holds no aesthetic_head.safetensors nor aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))


def test_a_clip_without_its_tokenizer_or_cut_short_is_refused(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY_CLIP, folder)
    (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    with pytest.raises(ValueError, match="holds no tokenizer.json nor vocab.json"):
        load_reward("clip_score", path=str(folder))
    (folder / "elsewhere.json").rename(folder / "tokenizer.json")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="reward 'clip_score' cannot be loaded"):
        load_reward("clip_score", path=str(folder))


def head_folder(tmp_path):
    shutil.copytree(TINY_CLIP, tmp_path / "clip")
    return load_file(os.path.join(TINY_AESTHETIC, "aesthetic_head.safetensors"))


def test_a_head_may_be_a_pth_file(tmp_path):
    torch.save(head_folder(tmp_path), tmp_path / "aesthetic_head.pth")
    images = torch.rand(2, 3, 32, 32)
    score = load_reward("aesthetic", path=str(tmp_path))(images, ["", ""])
    torch.testing.assert_close(score, load_reward("aesthetic", path=TINY_AESTHETIC)(images, ["", ""]))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    head_folder(tmp_path)
    torch.save({"layers.0.weight": Bomb()}, tmp_path / "aesthetic_head.pth")
    with pytest.raises(ValueError, match="aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))
    (tmp_path / "aesthetic_head.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_head_that_does_not_fit_is_described(tmp_path):
    state = head_folder(tmp_path)
    state["layers.7.weight"] = torch.zeros(1, 8)
    state["layers.9.bias"] = state.pop("layers.0.bias")
    save_file(state, tmp_path / "aesthetic_head.safetensors")
    with pytest.raises(ValueError, match=r"missing \['layers.0.bias'\].*\['layers.9.bias'\].*\['layers.7.weight'\]"):
        load_reward("aesthetic", path=str(tmp_path))
    (tmp_path / "aesthetic_head.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match="aesthetic_head.safetensors"):
        load_reward("aesthetic", path=str(tmp_path))


def test_hpsv2_is_the_cosine_of_a_clip_in_other_words(tiny_paths):
    images, prompts = torch.rand(2, 3, 32, 32).double(), ["a red seven", "a blue two"]
    cosine = load_reward("clip_score", path=TINY_CLIP, dtype=torch.float64)(images, prompts)
    for name in ("hpsv2", "hpsv2.1"):
        reward = load_reward(name, path=tiny_paths[name], dtype=torch.float64)
        torch.testing.assert_close(reward(images, prompts), cosine, rtol=1e-12, atol=0)
        letterboxed = torch.nn.functional.pad(images[..., 8:24, :], (0, 0, 8, 8))
        padded = load_reward("clip_score", path=TINY_CLIP, dtype=torch.float64)(letterboxed, prompts)
        torch.testing.assert_close(reward(images[..., 8:24, :], prompts), padded, rtol=1e-12, atol=0)
    # PickScore's scale is the checkpoint's.
    scale = load_file(os.path.join(TINY_CLIP, "model.safetensors"))["logit_scale"].double().exp()
    pickscore = load_reward("pickscore", path=TINY_CLIP, dtype=torch.float64)
    torch.testing.assert_close(pickscore(images, prompts), scale * cosine, rtol=1e-12, atol=0)


def test_imagereward_is_its_towers_put_together(tmp_path):
    vision, text, head = save_imagereward(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    reward = load_reward("imagereward", path=str(tmp_path))
    states = vision(preprocess_clip(images, 32)).last_hidden_state
    expected = []
    for state, prompt in zip(states, ["a fox", "badger"]):
        ids = reward.tokenizer(prompt, return_tensors="pt").input_ids  # alone, so that nothing is padded
        h = text(input_ids=ids, encoder_hidden_states=state[None]).last_hidden_state[0, 0]
        for weight, bias in zip(head[::2], head[1::2]):
            h = weight @ h + bias
        expected.append((h - 0.16717362830052426) / 1.0333394966054072)
    torch.testing.assert_close(reward(images, ["A fox", "badger"]), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_the_letterbox_keeps_the_whole_picture_on_black():
    image = torch.ones(1, 3, 16, 64)
    pixels = preprocess_letterbox(image, 32)
    white, black = (
        preprocess_letterbox(torch.ones(1, 3, 32, 32), 32),
        preprocess_letterbox(torch.zeros(1, 3, 32, 32), 32),
    )
    torch.testing.assert_close(pixels[..., 12:20, :], white[..., 12:20, :])
    torch.testing.assert_close(pixels[..., :12, :], black[..., :12, :])
    torch.testing.assert_close(pixels[..., 20:, :], black[..., 20:, :])
    assert preprocess_letterbox(torch.rand(1, 3, 1000, 1), 32).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_leave_heads_and_scores_in_float32(dtype, tiny_paths):
    images, prompts = torch.rand(2, 3, 40, 32), ["a red seven", "a blue two"]
    for name, path in tiny_paths.items():
        reward, full = (load_reward(name, path=path, dtype=d) for d in (dtype, torch.float32))
        scores = reward(images, prompts)
        assert scores.dtype == torch.float32
        assert dtype in {p.dtype for p in reward.parameters()}
        assert all(p.dtype == torch.float32 for key, p in reward.named_parameters() if key.startswith("head."))
        scale = getattr(reward, "scale", 1.0)
        assert (scores - full(images, prompts)).abs().max() < 4 * torch.finfo(dtype).eps * max(scale, 1)


def test_a_prompt_is_encoded_once():
    reward = load_reward("clip_score", path=TINY_CLIP)
    images = torch.rand(3, 3, 32, 32)
    reward(images, ["a red seven", "a blue two", "a red seven"])
    reward(images[:2], ["a blue two", "a red seven"])
    assert reward.text_embeds.cache_info().misses == 2
    # By itself, so that its embedding does not depend on what it was first seen with.
    assert torch.equal(
        reward.text_embeds("a blue two", images.device), reward._text_embeds("a blue two", images.device)
    )


def test_micro_batches_give_the_same_scores_and_gradient():
    paths = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP}
    terms = parse_reward("aesthetic:2,clip_score:-3,jpeg_compressibility:.1")
    images, prompts = torch.rand(5, 3, 32, 32).double().requires_grad_(), ["a red one", "a blue two"] * 2 + ["a six"]
    whole, parts = (
        load_rewards(terms, paths, dtype=torch.float64, batch_size=size)(images, prompts, with_gradient=True)
        for size in (None, 2)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)
    members = {name: load_reward(name, path=paths[name], dtype=torch.float64) for name in paths}
    total = 2 * members["aesthetic"](images, prompts) - 3 * members["clip_score"](images, prompts)
    torch.testing.assert_close(whole.gradient, torch.autograd.grad(total.sum(), images)[0], rtol=1e-10, atol=1e-12)
    assert load_rewards(terms, paths)(images.float(), prompts).gradient is None


@pytest.mark.parametrize("name", REWARDS)
def test_what_no_reward_can_score_is_refused(name, tiny_paths):
    reward = load_reward(name, path=tiny_paths.get(name))
    image = torch.rand(1, 3, 32, 32)
    for bad in (image * 2 - 1, image + 0.5, image * float("nan")):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], these have values from"):
            reward(bad, ["a"])
    with pytest.raises(ValueError, match="1 images with 2 prompts"):
        reward(image, ["a", "b"])
    with pytest.raises(ValueError, match=r"\(3, 32, 32\) are not \(B, 3, H, W\)"):
        reward(image[0], ["a"])


CUSTOM = """
import torch

def red(images, prompts):
    return images[:, 0].mean((1, 2))

def array(images, prompts):
    return torch.tensor(images.numpy().mean((1, 2, 3)))

def rounded(images, prompts):
    return images.round().mean((1, 2, 3))

def detached(images, prompts):
    return red(images, prompts).detach()
detached.differentiable = True

def declared(images, prompts):
    return red(images, prompts)
declared.differentiable = False

def writes(images, prompts):
    return images.mul_(0).sum((1, 2, 3))
writes.differentiable = False

class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

def without_backward(images, prompts):
    return NoBackward.apply(images).mean((1, 2, 3))

def mean(images, prompts):
    return images.mean()

def fails(images, prompts):
    return {}["key"]

def large(images, prompts):
    if images.requires_grad:
        raise torch.OutOfMemoryError("none left")
    return red(images, prompts)

def larger(images, prompts):
    raise torch.OutOfMemoryError("none left")

class Brightness(torch.nn.Linear):
    def forward(self, images, prompts):
        return super().forward(images.mean((2, 3)))[:, 0]

brightness = Brightness(3, 1)
number = 3
"""


def custom(tmp_path, name, **kwargs):
    (tmp_path / "my_rewards.py").write_text(CUSTOM)
    rewards = load_rewards(parse_reward(f"{tmp_path}/my_rewards.py:{name}"), {}, size=(16, 16), **kwargs)
    return rewards.members[f"{tmp_path}/my_rewards.py:{name}"[: -2 if name.endswith(":2") else None]]


@pytest.mark.parametrize(
    ("name", "differentiable"),
    [
        ("red", True),
        ("array", False),
        ("rounded", False),
        ("declared", False),
        ("brightness", True),
        ("red:2", True),
        ("without_backward", False),
    ],
)
def test_a_custom_reward_is_imported_and_its_gradient_found_out(name, differentiable, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        weight, reward = custom(tmp_path, name)
    assert weight == (2 if name == "red:2" else 1)
    assert reward.differentiable is differentiable
    assert ("tried on two random images" in caplog.text) == (name != "declared")
    images = torch.rand(2, 3, 16, 16)
    scores = WeightedSum({"mine": (weight, reward)})(images, ["", ""], with_gradient=differentiable)
    assert (scores.gradient is not None) == differentiable
    if name == "red":
        torch.testing.assert_close(scores.total, images[:, 0].mean((1, 2)))
    assert not any(p.requires_grad for p in reward.parameters())


@pytest.mark.parametrize("name", ["large", "larger"])
def test_a_reward_that_runs_out_of_memory_is_taken_for_no_black_box(name, tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        custom(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mean", r"is no reward: it returned a tensor of shape \(\) instead of \(2,\)"),
        ("fails", r"fails on two random images: KeyError: 'key' \(my_rewards.py, line 3\d\)"),
        ("detached", "says it is differentiable, but its scores have no gradient"),
        ("number", "has no callable 'number'"),
        ("missing:2", "has no callable 'missing'"),
        ("Brightness", "fails on two random images: TypeError"),
    ],
)
def test_what_is_no_reward_is_refused_before_training(name, problem, tmp_path):
    with pytest.raises(ValueError, match=problem) as error:
        custom(tmp_path, name)
    assert repr(f"{tmp_path}/my_rewards.py:{name}") in str(error.value)


def test_custom_modules_and_files_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import not_there\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_module.py").write_text(CUSTOM)
    assert load_rewards(parse_reward("by_module:red"), {}, size=(16, 16)).differentiable
    for entry, problem in (
        ("os:system", "fails on two random images: TypeError"),
        ("os:getcwd", "fails on two random images: TypeError"),
        ("no_such_module:f:2", r"there is no module 'no_such_module' \(a file is named no_such_module.py:f\)"),
        (f"{tmp_path}/no.py:f", "there is no file"),
        ("leaves:f", "cannot be imported: SystemExit: 0"),
        ("broken:f", r"No module named 'not_there' \(broken.py, line 1\)"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            load_rewards(parse_reward(entry), {}, size=(16, 16))
        assert repr(entry) in str(error.value)


def test_a_reward_that_writes_into_its_pictures_or_fails_harms_no_other(tmp_path):
    _, writes = custom(tmp_path, "writes")
    images = torch.rand(2, 3, 16, 16)
    kept = images.clone()
    WeightedSum({"writes": (1.0, writes), "jpeg": (1.0, load_reward("jpeg_compressibility"))})(images, ["", ""])
    assert torch.equal(images, kept)
    (tmp_path / "later.py").write_text(
        "calls = []\n\ndef f(images, prompts):\n    calls.append(1)\n    assert len(calls) < 3, 'no more'\n"
        "    return images.mean((1, 2, 3))\n"
    )
    rewards = load_rewards(parse_reward(f"{tmp_path}/later.py:f"), {}, size=(16, 16))
    with pytest.raises(ValueError, match=r"reward '.*later.py:f' fails: AssertionError: no more \(later.py, line 5\)"):
        rewards(images, ["", ""])


def test_a_clip_that_does_not_fit_is_described(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY_CLIP, folder)
    state = load_file(folder / "model.safetensors")
    state["vision_model.extra.weight"] = state.pop("visual_projection.weight")
    state["text_projection.weight"] = torch.zeros(3, 4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("clip_score", "pickscore"):
        with pytest.raises(
            ValueError,
            match=r"missing \['visual_projection.weight'\], unexpected \['vision_model.extra.weight'\], other shape"
            r" \['text_projection.weight'\]",
        ):
            load_reward(name, path=str(folder))


def test_checkpoints_of_other_layouts_are_described(tmp_path, tiny_paths):
    for name, file in (("hpsv2", "HPS_v2_compressed.pt"), ("imagereward", "ImageReward.pt")):
        folder = tmp_path / name
        shutil.copytree(tiny_paths[name], folder)
        checkpoint = torch.load(folder / file, weights_only=True)
        state = checkpoint.get("state_dict", checkpoint)
        gone = next(key for key in state if key.endswith("weight"))
        state["something.else"] = state.pop(gone)
        torch.save(checkpoint, folder / file)
        with pytest.raises(
            ValueError, match=f"reward '{name}' cannot be loaded: .*{file}' does not fit: .*something.else"
        ):
            load_reward(name, path=str(folder))
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"reward '{name}' cannot be loaded: .*{file}'"):
            load_reward(name, path=str(folder))
    torch.save({}, tmp_path / "hpsv2" / "HPS_v2_compressed.pt")
    with pytest.raises(ValueError, match=r"missing \['state_dict'\]"):
        load_reward("hpsv2", path=str(tmp_path / "hpsv2"))


@pytest.mark.parametrize(
    ("name", "file"),
    [("hpsv2", "HPS_v2_compressed.pt"), ("imagereward", "ImageReward.pt"), ("clip_score", "pytorch_model.bin")],
)
def test_no_checkpoint_runs_code(name, file, tmp_path, tiny_paths):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / name
    shutil.copytree(tiny_paths[name], folder)
    if name == "clip_score":
        (folder / "model.safetensors").unlink()
    torch.save({"state_dict": Bomb(), "weight": Bomb()}, folder / file)
    with pytest.raises(ValueError, match="it would run code") as error:
        load_reward(name, path=str(folder))
    assert str(folder) in str(error.value)
    assert not (tmp_path / "ran").exists()


HUB_SESSION = """
import huggingface_hub.constants
from reward_models import load_reward

def attempt(name, revision=None):
    try:
        load_reward(name, revision=revision)
        print(f"{name}@{revision} loaded")
    except ValueError as error:
        print(error)

for name, revision in [
    ("clip_score", None), ("clip_score", "v7"), ("aesthetic", "v7"), ("aesthetic", "v8"),
    ("pickscore", None), ("imagereward", None), ("hpsv2", None),
]:
    attempt(name, revision)
huggingface_hub.constants.HF_HUB_OFFLINE = True
attempt("clip_score")
attempt("hpsv2.1")
"""


def test_the_hub_and_what_it_refuses(tmp_path):
    """The real client against a server on this machine."""
    clip = {file: open(os.path.join(TINY_CLIP, file), "rb").read() for file in os.listdir(TINY_CLIP)}
    head = io.BytesIO()
    torch.save(load_file(os.path.join(TINY_AESTHETIC, "aesthetic_head.safetensors")), head)
    files = {
        ("openai/clip-vit-large-patch14", "main"): clip,
        ("openai/clip-vit-large-patch14", "v7"): clip,
        ("trl-lib/ddpo-aesthetic-predictor", "v7"): {"aesthetic-model.pth": head.getvalue()},
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "main"): clip,
        ("xswu/HPSv2", "main"): {"README.md": b""},
    }
    refused = {"yuvalkirstain/PickScore_v1": (403, "GatedRepo"), "THUDM/ImageReward": (401, "RepoNotFound")}
    with LoopbackHub(files, refused) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": ROOT}
        command = [sys.executable, "-c", HUB_SESSION]
        session = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = session.stdout.splitlines()
    expected = (
        r"clip_score@None loaded",
        r"clip_score@v7 loaded",
        r"aesthetic@v7 loaded",
        r"reward 'aesthetic@v8' cannot be loaded: 'trl-lib/.*': the repository has no such revision",
        r"reward 'pickscore' .* 'yuvalkirstain/PickScore_v1': the repository is gated: accept its terms .*",
        r"reward 'imagereward' .* 'THUDM/ImageReward': there is no such repository, or it is private: .*",
        r"reward 'hpsv2' .* 'xswu/HPSv2': the repository has no such file",
        r"clip_score@None loaded",  # from the cache
        r"reward 'hpsv2.1' .* 'xswu/HPSv2': the Hub cannot be reached and the files are not in the cache: .*",
    )
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line)


def pictures(tmp_path):
    for i, size in enumerate(((40, 32), (32, 32))):
        Image.fromarray((np.random.default_rng(i).random((*size, 3)) * 255).astype(np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    return [str(tmp_path / f"{i}.png") for i in range(2)]


def test_the_command_line_scores_pictures(tmp_path, capsys):
    flags = ["--reward", "clip_score:2,aesthetic", "--reward_path", f"clip_score={TINY_CLIP}"]
    flags += ["--reward_path", f"aesthetic={TINY_AESTHETIC}"]
    images = pictures(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red seven\na blue two\n")
    main(parse_args([*flags, *images, "--prompts", str(tmp_path / "prompts.txt"), "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["a red seven", "a blue two"] and rows[1]["image"] == images[1]
    for row in rows:
        pixels = torch.from_numpy(np.array(Image.open(row["image"]))).permute(2, 0, 1)[None] / 255
        score = load_reward("clip_score", path=TINY_CLIP)(pixels, [row["prompt"]]).item()
        assert row["scores"]["clip_score"] == pytest.approx(score, rel=1e-5)
        assert row["total"] == pytest.approx(2 * score + row["scores"]["aesthetic"], rel=1e-5)
    main(parse_args([*flags, *images, "--prompt", "a red seven"]))
    header, first, *_, mean, deviation = capsys.readouterr().out.splitlines()
    assert header.split() == ["clip_score", "aesthetic", "total"]
    assert first.split()[:2] == [images[0], f"{rows[0]['scores']['clip_score']:.4f}"]
    assert mean.startswith("mean") and deviation.startswith("standard deviation")


def test_the_command_line_explains_itself(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(name in text and known.meaning in text for name, known in REWARDS.items())
    images = pictures(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\n")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    whole = open(images[0], "rb").read()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    main(parse_args(["--reward", "jpeg_compressibility", *images]))  # which reads no prompt
    for flags, problem in (
        (["--reward", "clip_score", *images], "'clip_score' may read the prompt: give --prompt or --prompts"),
        (["--reward", "clip_score", *images, "--prompts", str(tmp_path / "prompts.txt")], "1 lines for 2 images"),
        (["--reward", "jpeg_compressibility", images[0], "no.png"], "'no.png' cannot be opened as a picture"),
        (["--reward", "beauty", *images], "unknown reward 'beauty'"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "deep.png")], "deep.png' has more than 8 bits a channel"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "half.png")], "half.png' cannot be read: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(parse_args(flags))
        assert problem in stop.value.code and "\n" not in stop.value.code
