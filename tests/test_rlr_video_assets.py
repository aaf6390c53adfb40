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
"""tiny-wan: what its videos show, how they are read, and that it can be made again."""

import json
import os
import shutil
import sys
from pathlib import Path

import make_video_assets
import pytest
import torch
import torch.nn.functional as F
from reward_models.custom import import_callable
from rlr_testing import ASSETS
from safetensors import safe_open
from transformers import AutoTokenizer
from video_models.data import MOTIONS, Captions, DigitVideos, caption, write_prompts
from video_models.flow import embed, load_pipeline, make_tokenizer
from video_models.measuring import difference, draw, share, spread_prompts
from video_models.reader import accuracies, load_reader, read
from video_models.vae import decode, encode

from diffusers import WanPipeline


TINY_WAN, REWARDS = (os.path.join(ASSETS, name) for name in ("tiny-wan", "tiny-wan-rewards"))
READER = os.path.join(REWARDS, "video_reader.py")


@pytest.fixture(scope="module")
def real():
    """300 videos of scans that no training saw."""
    return DigitVideos(held_out=True).batch(300, torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ASSETS)


# The models


def test_videos_show_what_prompts_ask_for(pipeline):
    texts, digits, colors, motions = spread_prompts(30)
    found_digits, found_colors, found_motions = read(draw(pipeline, texts, seed=50), ASSETS)
    assert share(found_digits, digits[:, None]) >= 0.92
    assert share(found_colors, colors[:, None]) >= 0.97
    assert share(found_motions, motions) >= 0.93


def test_the_pipeline_draws_as_it_is_loaded_and_called_by_default():
    """With 512 tokens, in the number of steps that Wan's pipeline has for a default."""
    pipeline = WanPipeline.from_pretrained(TINY_WAN)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    texts, digits, colors, motions = spread_prompts(10)
    generator = torch.Generator().manual_seed(1)
    frames = pipeline(texts, height=32, width=32, num_frames=9, generator=generator).frames
    found_digits, found_colors, found_motions = read(torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float(), ASSETS)
    assert share(found_digits, digits[:, None]) >= 0.8
    assert share(found_colors, colors[:, None]) >= 0.95
    assert share(found_motions, motions) >= 0.8


def test_the_pipeline_draws_images_and_motions_that_prompts_do_not_name(pipeline):
    texts = [caption(digit, 1) for digit in range(10)]
    images = draw(pipeline, texts, seed=52, num_frames=1)
    assert images.shape == (10, 1, 3, 32, 32)
    assert share(read(images, ASSETS)[0], torch.arange(10)[:, None]) >= 0.8
    digits, _, motions = read(draw(pipeline, texts, seed=53), ASSETS)
    assert share(digits, torch.arange(10)[:, None]) >= 0.8
    assert len(set(motions.tolist())) >= 3


def test_seeds_give_different_videos(pipeline):
    """Two real videos of this prompt differ by .15, where two of other colors do by .2."""
    assert difference(draw(pipeline, ["a red seven moving left"] * 6, seed=60)) >= 0.09


def test_the_difference_is_that_of_two_videos_on_average():
    videos = torch.rand(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    pairs = [(videos[i] - videos[j]).square().mean().sqrt().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert difference(videos) == pytest.approx(sum(pairs) / 3, rel=1e-4)


def test_any_prompt_can_be_encoded(pipeline):
    video = draw(pipeline, ["A photo of Paris: 8 (unknown) Wörter!", ""], seed=61, num_inference_steps=1)
    assert video.isfinite().all()


def test_the_autoencoder_loses_little_and_knows_its_latents(pipeline, real):
    vae, videos = pipeline.vae, real.videos[:100]
    with torch.no_grad():
        latents = encode(vae, videos).mean
        decoded = vae.decode(latents).sample.transpose(1, 2)
    assert latents.shape == (100, 16, 3, 4, 4)
    assert F.mse_loss(decoded, 2 * videos - 1) <= 0.01
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    normal = (latents - mean) / std
    assert normal.mean((0, 2, 3, 4)).abs().max() <= 0.2
    assert (normal.std((0, 2, 3, 4)) - 1).abs().max() <= 0.2


def test_the_files_are_small_and_in_float16():
    files = [file for folder in (TINY_WAN, REWARDS) for file in Path(folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if "__pycache__" not in file.parts) <= 8e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}, path


# The rewards


def test_the_reader_reads_real_videos(real):
    assert min(accuracies(real, ASSETS)) >= 0.98
    code = load_reader(ASSETS)[1]
    assert caption(3, 4, 1) == f"a {code['COLORS'][4]} {code['DIGITS'][3]} moving {code['DIRECTIONS'][1]}"
    assert [motion.split()[-1] for motion in MOTIONS] == code["DIRECTIONS"]


@pytest.mark.parametrize("side, num_frames", [(32, 9), (64, 5)])
def test_the_displacement_is_that_of_a_dot(side, num_frames):
    """A dot of one pixel of 32 that moves by a pixel of 32 right and a third of it down in each frame."""
    code, zoom = load_reader(ASSETS)[1], side // 32
    places = torch.arange(num_frames)
    video = torch.zeros(1, num_frames, 3, 32, 32)
    video[0, places, 0, 10 + places, 5 + 2 * places] = 0.7
    video = F.interpolate(video.flatten(0, 1), scale_factor=zoom, mode="nearest").unflatten(0, (1, num_frames))
    expected = torch.tensor([[2.0, 1.0]]) * (num_frames - 1)
    torch.testing.assert_close(code["displacement"](video), expected, rtol=1e-4, atol=1e-4)
    assert code["DIRECTIONS"][code["read_directions"](video)] == "right"
    assert code["DIRECTIONS"][code["read_directions"](video.flip(1).transpose(3, 4))] == "up"
    assert code["DIRECTIONS"][code["read_directions"](video[:, :1].expand(-1, num_frames, -1, -1, -1))] == "still"


@pytest.mark.parametrize(
    "name, other",
    [("DigitAccuracy", "a red {} moving left"), ("DirectionAccuracy", "a red seven moving {}")],
)
def test_the_rewards_say_whether_a_video_shows_what_its_prompt_asks_for(real, name, other):
    reward, _ = import_callable(f"{READER}:{name}", {})
    assert (reward.takes_videos, reward.differentiable) == (True, False)
    right = [caption(*of) for of in zip(real.digits.tolist(), real.colors.tolist(), real.motions.tolist())]
    scores = reward(real.videos, right)
    assert scores.shape == (300,) and scores.mean() >= 0.98
    wrong = [caption((d + 1) % 10, 0, (m + 1) % 5) for d, m in zip(real.digits.tolist(), real.motions.tolist())]
    assert reward(real.videos, wrong).mean() <= 0.02
    larger = F.interpolate(real.videos[:8].flatten(0, 1), scale_factor=2, mode="bilinear").unflatten(0, (8, 9))
    assert reward(larger, [prompt.upper() + "." for prompt in right[:8]]).mean() >= 0.9
    for words in ("", "left right seven eight"):
        with pytest.raises(ValueError, match=r"the prompt .* names [02] of the di[a-z]+ .*: name one"):
            reward(real.videos[:1], [words])


# The tool


def test_videos_move_as_their_captions_say():
    batch = DigitVideos().batch(500, torch.Generator().manual_seed(12))
    captions = Captions()
    texts = [captions.texts[i] for i in captions.index(batch, torch.Generator().manual_seed(13))]
    mass = batch.videos.sum((2, 3, 4))
    assert (mass.amin(1) / mass.amax(1)).min() >= 0.85  # no more than an edge of a digit leaves the frame
    places = torch.arange(32.0)
    across = (batch.videos.sum((2, 3)) * places).sum(2) / mass
    down = (batch.videos.sum((2, 4)) * places).sum(2) / mass
    ways = torch.stack([across[:, 8] - across[:, 0], down[:, 8] - down[:, 0]], 1)
    directions = torch.tensor(list(MOTIONS.values()))[batch.motions]
    along = (ways * directions).sum(1)
    moving = batch.motions != list(MOTIONS).index("standing still")
    assert 5.2 <= along[moving].min() and along[moving].max() <= 12.5
    assert (ways - along[:, None] * directions).abs().max() <= 0.7
    named = [any(motion in text for motion in MOTIONS) for text in texts]
    assert sum(named) / 500 == pytest.approx(0.8, abs=0.06)
    for text, name, *of in zip(texts, named, *(x.tolist() for x in (batch.digits, batch.colors, batch.motions))):
        assert text == (caption(*of) if name else caption(*of[:2]))


def test_the_first_frame_alone_is_that_of_the_video():
    digits = DigitVideos()
    video, image = (digits.batch(4, torch.Generator().manual_seed(14), count).videos for count in (9, 1))
    assert torch.equal(image, video[:, :1])


def test_no_scan_is_in_both_parts():
    train, held_out = DigitVideos().ink, DigitVideos(held_out=True).ink
    assert len(train) + len(held_out) == 1797
    assert torch.cdist(held_out.flatten(1), train.flatten(1)).min() > 0


def test_the_training_decodes_as_the_autoencoder_does_with_a_gradient_beyond_its_range(pipeline, real):
    latents = 2 * encode(pipeline.vae, real.videos[:2]).mean.detach()
    decoded = decode(pipeline.vae, latents)
    expected = pipeline.vae.decode(latents).sample.transpose(1, 2) / 2 + 0.5
    assert decoded.max() > 1.05 or decoded.min() < -0.05
    assert torch.equal(decoded.clamp(0, 1), expected)


def test_the_training_embeds_prompts_as_the_pipeline_does(pipeline):
    texts = ["a red seven moving left", "a cyan two", ""]
    tokens = pipeline.tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=16)[0]
        torch.testing.assert_close(embed(pipeline.text_encoder, tokens, 16), expected)


def test_the_tokenizer_makes_one_token_of_each_word(pipeline):
    loaded = AutoTokenizer.from_pretrained(os.path.join(TINY_WAN, "tokenizer"))
    for tokenizer in (make_tokenizer(), loaded, pipeline.tokenizer):
        ids = tokenizer(Captions().texts).input_ids
        assert [len(of) for of in ids] == [len(text.split()) + 1 for text in Captions().texts]
        assert tokenizer.unk_token_id not in {index for of in ids for index in of}
        assert tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == Captions().texts[0]


def test_the_prompts_are_all_captions_that_name_a_motion(tmp_path):
    write_prompts(tmp_path / "videos.txt")
    prompts = (tmp_path / "videos.txt").read_text()
    assert prompts == (Path(ASSETS) / "videos.txt").read_text()
    assert len(set(prompts.splitlines())) == 300


def test_a_trial_does_not_replace_the_models(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_video_assets.py", "--quick", "--out", "elsewhere"])
    with pytest.raises(SystemExit):
        make_video_assets.main()
    assert "--quick would replace the trained models" in capsys.readouterr().err


def test_all_stages_follow_each_other(tmp_path, monkeypatch):
    out = tmp_path / "assets"
    (out / "tiny-wan-rewards").mkdir(parents=True)
    shutil.copy(READER, out / "tiny-wan-rewards")
    flags = ["--quick", "--out", str(out), "--work_dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["make_video_assets.py", *flags])
    make_video_assets.main()
    for made, committed in ((out / "tiny-wan", TINY_WAN), (out / "tiny-wan-rewards", REWARDS)):
        assert set(os.listdir(made)) - {"__pycache__"} == set(os.listdir(committed)) - {"__pycache__"}
    assert json.loads((out / "tiny-wan" / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    made = draw(load_pipeline(out), ["a red seven"], seed=0, num_inference_steps=1)
    assert made.shape == (1, 9, 3, 32, 32)
