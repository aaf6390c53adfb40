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
"""Scoring image files: `python -m reward_models` and `reward_models.images`."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import REWARDS, load_reward
from reward_models.__main__ import main, parse_args
from reward_models.images import read_image, to_rgb
from reward_models.video_files import read_video
from rlr_testing import ROOT, TINY_AESTHETIC, TINY_CLIP


CUSTOM = """
def bright(images, prompts):
    return images.mean((1, 2, 3))

def still(videos, prompts):
    return -videos.diff(dim=1).square().mean((1, 2, 3, 4))
still.takes_videos = True

class Speed:
    takes_videos, fps = True, None

    def __call__(self, videos, prompts):
        return self.fps * videos.mean((1, 2, 3, 4))
"""


@pytest.fixture
def custom_file(tmp_path):
    (tmp_path / "mine.py").write_text(CUSTOM)
    return str(tmp_path / "mine.py")


@pytest.fixture
def image_files(tmp_path):
    paths = []
    for i, size in enumerate(((40, 32), (32, 32))):
        pixels = (np.random.default_rng(i).random((*size, 3)) * 255).astype(np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_images_are_scored_as_json_or_as_a_table(tmp_path, image_files, capsys):
    flags = ["--reward", "clip_score:2,aesthetic", "--reward_path", f"clip_score={TINY_CLIP}"]
    flags += ["--reward_path", f"aesthetic={TINY_AESTHETIC}"]
    (tmp_path / "prompts.txt").write_text("a red seven\na blue two\n")
    main(parse_args([*flags, *image_files, "--prompts", str(tmp_path / "prompts.txt"), "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["a red seven", "a blue two"]
    assert [row["image"] for row in rows] == image_files
    clip_score = load_reward("clip_score", path=TINY_CLIP)
    for row in rows:
        assert row.keys() == {"image", "prompt", "scores", "total"}
        pixels = torch.from_numpy(np.array(Image.open(row["image"]))).permute(2, 0, 1)[None] / 255
        score = clip_score(pixels, [row["prompt"]]).item()
        assert row["scores"]["clip_score"] == pytest.approx(score, rel=1e-5)
        assert row["total"] == pytest.approx(2 * score + row["scores"]["aesthetic"], rel=1e-5)
    main(parse_args([*flags, *image_files, "--prompt", "a red seven"]))
    header, first, *_, mean, deviation = capsys.readouterr().out.splitlines()
    assert header.split() == ["clip_score", "aesthetic", "total"]
    assert first.split()[:2] == [image_files[0], f"{rows[0]['scores']['clip_score']:.4f}"]
    assert mean.startswith("mean") and deviation.startswith("standard deviation")


def test_errors_are_one_line(tmp_path, image_files):
    (tmp_path / "prompts.txt").write_text("one\n")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with open(image_files[0], "rb") as file:
        content = file.read()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not an image")
    main(parse_args(["--reward", "jpeg_compressibility", *image_files]))  # needs no prompt
    for flags, problem in (
        (["--reward", "clip_score", *image_files], "'clip_score' may read the prompt: give --prompt or --prompts"),
        (["--reward", "clip_score", *image_files, "--prompts", str(tmp_path / "prompts.txt")], "1 lines for 2 images"),
        (["--reward", "jpeg_compressibility", image_files[0], "no.png"], "'no.png' cannot be opened as an image"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "text.png")], "text.png' cannot be opened as an image"),
        (["--reward", "beauty", *image_files], "unknown reward 'beauty'"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "deep.png")], "has more than 8 bits per channel (I;16)"),
        (["--reward", "jpeg_compressibility", str(tmp_path / "half.png")], "half.png' cannot be read: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(parse_args(flags))
        message = stop.value.code
        assert message.startswith("python -m reward_models: error: ") and problem in message and "\n" not in message


def test_images_are_read_as_rgb_and_rotated_by_exif(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: display rotated by 90 degrees clockwise
    image.save(tmp_path / "gray.png", exif=exif)
    result = read_image(str(tmp_path / "gray.png"))
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()) / 255
    torch.testing.assert_close(result, expected.expand(1, 3, 3, 2))


def transparent_pixels(hidden, half):
    """RGBA pixels (2, 4, 4): opaque gray on the left; on the right transparent of a hidden value, or half transparent."""
    pixels = np.full((2, 4, 4), 60, dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, 2:, :3], pixels[:, 2:, 3] = hidden, 0
    if half:
        pixels[1, 2:] = [100, 100, 100, 51]
    return pixels


def save_indexed(path, pixels, **options):
    """Save an image of a palette, in which the hidden value is the color 1."""
    image = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8)).convert("P")
    image.putpalette([60] * 3 + [int(pixels[0, 2, 0])] * 3)
    image.save(path, **options)


# How to save transparent pixels: {name: (can be half transparent, function of a path and pixels)}.
TRANSPARENT = {
    "rgba.png": (True, lambda path, pixels: Image.fromarray(pixels).save(path)),
    "la.png": (True, lambda path, pixels: Image.fromarray(pixels).convert("LA").save(path)),
    "rgba.webp": (True, lambda path, pixels: Image.fromarray(pixels).save(path, lossless=True, exact=True)),
    "rgba.tif": (True, lambda path, pixels: Image.fromarray(pixels).save(path)),
    "la.tif": (True, lambda path, pixels: Image.fromarray(pixels).convert("LA").save(path)),
    "rgba.ico": (False, lambda path, pixels: Image.fromarray(pixels).save(path, sizes=[(4, 2)])),
    "rgb.png": (
        False,
        lambda path, pixels: Image.fromarray(pixels[..., :3]).save(path, transparency=hidden_in(pixels)),
    ),
    "l.png": (
        False,
        lambda path, pixels: Image.fromarray(pixels[..., 0]).save(path, transparency=hidden_in(pixels)[0]),
    ),
    "p.png": (False, lambda path, pixels: save_indexed(path, pixels, transparency=1)),
    "p-bytes.png": (False, lambda path, pixels: save_indexed(path, pixels, transparency=b"\xff\x00")),
    "p.gif": (False, lambda path, pixels: save_indexed(path, pixels, transparency=1)),
}


def hidden_in(pixels):
    return tuple(int(value) for value in pixels[0, 2, :3])


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_white_whatever_they_hide(name, tmp_path):
    can_be_half, save = TRANSPARENT[name]
    expected = np.full((2, 4), 255)
    expected[:, :2] = 60
    if can_be_half:
        expected[1, 2:] = 100 * 51 / 255 + 255 * 204 / 255
    for hidden in (0, 255):
        save(tmp_path / name, transparent_pixels(hidden, can_be_half))
        image = read_image(str(tmp_path / name))
        assert image.shape == (1, 3, 2, 4)
        np.testing.assert_allclose(image[0].numpy() * 255, np.broadcast_to(expected, (3, 2, 4)), atol=1.01)
        np.testing.assert_allclose(image[0, :, 0, 2:], 1)


def test_files_that_look_the_same_score_the_same(tmp_path, capsys):
    paths = []
    for name, hidden in (("black.png", 0), ("white.png", 255)):
        paths.append(str(tmp_path / name))
        Image.fromarray(transparent_pixels(hidden, True).repeat(16, 0).repeat(8, 1)).save(paths[-1])
    paths.append(str(tmp_path / "opaque.png"))
    Image.fromarray((read_image(paths[0])[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(paths[-1])
    main(parse_args(["--reward", "aesthetic", "--reward_path", f"aesthetic={TINY_AESTHETIC}", *paths, "--json"]))
    first, *others = [row["total"] for row in json.loads(capsys.readouterr().out)]
    assert others == [first, first]


@pytest.mark.parametrize("mode", ["RGBa", "PA"])
def test_transparent_pixels_of_rare_modes_are_white(mode):
    """No format that Pillow writes holds these."""
    for hidden in (0, 255):
        pixels = np.array(to_rgb(Image.fromarray(transparent_pixels(hidden, False)).convert(mode)))
        assert (pixels[:, 2:] == 255).all() and (pixels[:, :2] < 70).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"])
def test_images_of_other_modes_have_the_same_colors(mode):
    color = (255, 255, 255) if mode == "1" else (90, 90, 90) if mode == "L" else (200, 100, 50)
    image = Image.new("RGB", (8, 8), color).convert(mode, palette=Image.Palette.ADAPTIVE)
    assert image.mode == mode
    np.testing.assert_allclose(np.array(to_rgb(image)), np.broadcast_to(color, (8, 8, 3)), atol=1.01)


@pytest.mark.parametrize("name", ["frames.gif", "frames.webp", "frames.png", "pages.tif"])
def test_the_first_frame_of_several_is_read(name, tmp_path):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    assert Image.open(tmp_path / name).n_frames == 2
    torch.testing.assert_close(
        read_image(str(tmp_path / name)), torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp", "ppm", "avif"])
def test_a_damaged_image_is_named(suffix, tmp_path):
    file = tmp_path / f"image.{suffix}"
    Image.fromarray((np.random.default_rng(0).random((24, 32, 3)) * 255).astype(np.uint8)).save(file)
    content = file.read_bytes()
    for size in range(0, len(content) * 9 // 10, len(content) // 30):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"^'{re.escape(str(file))}' cannot be (opened as an image|read): "):
            read_image(str(file))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(mode, tmp_path):
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.zeros((4, 4), dtype=dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=rf"deep.tif' has more than 8 bits per channel \({mode}\): convert it first"):
        read_image(str(tmp_path / "deep.tif"))


def test_a_custom_reward_is_tried_at_the_size_of_the_images(tmp_path, image_files, capsys):
    (tmp_path / "mine.py").write_text(
        "def f(images, prompts):\n    assert images.shape[2:] == (40, 32)\n    return images.mean((1, 2, 3))\n"
    )
    main(parse_args(["--reward", f"{tmp_path}/mine.py:f", image_files[0], "--prompt", "", "--json"]))
    (row,) = json.loads(capsys.readouterr().out)
    assert row["total"] == pytest.approx(read_image(image_files[0]).mean().item())


def save_frames(folder, shades, sizes=None):
    """Save gray frames as 1.png, 2.png, and so on."""
    folder.mkdir()
    for i, shade in enumerate(shades, 1):
        Image.new("RGB", sizes[i - 1] if sizes else (32, 24), (shade,) * 3).save(folder / f"{i}.png")
    return str(folder)


def test_folders_and_animations_are_read_as_videos(tmp_path):
    shades = list(range(0, 240, 20))
    folder = save_frames(tmp_path / "frames", shades)
    (tmp_path / "frames" / ".hidden").write_text("")
    expected = (torch.tensor(shades) / 255).view(1, 12, 1, 1, 1).expand(-1, -1, 3, 24, 32)
    video, fps = read_video(folder)
    assert torch.equal(video, expected) and fps is None
    images = [Image.open(tmp_path / "frames" / f"{i}.png") for i in range(1, 13)]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=125, **options)
        video, fps = read_video(str(tmp_path / name))
        torch.testing.assert_close(video, expected, rtol=0, atol=1.01 / 255)
        assert fps == pytest.approx(8, rel=0.05)  # GIF counts in hundredths of a second


def test_videos_are_scored_as_images_are(tmp_path, capsys, custom_file):
    first = save_frames(tmp_path / "first", [0, 51, 255])
    second = save_frames(tmp_path / "second", [51, 51, 102, 0], sizes=[(40, 32)] * 4)
    flags = ["--reward", f"{custom_file}:bright,{custom_file}:still:2,{custom_file}:Speed", "--prompt", "", "--videos"]
    main(parse_args([*flags, first, second, "--fps", "8", "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [row.keys() for row in rows] == [{"video", "prompt", "scores", "total"}] * 2
    for row, mean, still in zip(rows, (0.4, 0.2), (-(0.2**2 + 0.8**2) / 2, -(0.2**2 + 0.4**2) / 3)):
        assert list(row["scores"].values()) == pytest.approx([mean, still, 8 * mean])
        assert row["total"] == pytest.approx(mean + 2 * still + 8 * mean)
    main(
        parse_args(
            ["--reward", f"{custom_file}:bright", "--prompt", "", "--videos", first, "--frame_reduction", "min"]
        )
    )
    assert capsys.readouterr().out.split()[-2:] == [first, "0.0000"]


def test_each_video_has_the_frame_rate_of_its_file(tmp_path, capsys, custom_file):
    images, paths = [Image.new("L", (32, 32), 255)] * 2, []
    images[1] = Image.new("L", (32, 32), 254)
    for duration in (50, 100):
        paths.append(str(tmp_path / f"{duration}.gif"))
        images[0].save(paths[-1], save_all=True, append_images=images[1:], duration=duration)
    flags = ["--reward", f"{custom_file}:Speed", "--prompt", "", "--videos", "--json"]
    main(parse_args([*flags, *paths]))
    assert [row["total"] for row in json.loads(capsys.readouterr().out)] == pytest.approx([20, 10], rel=0.01)


def test_video_errors_are_one_line(tmp_path, custom_file):
    mixed = save_frames(tmp_path / "mixed", [0, 0], sizes=[(8, 8), (16, 8)])
    one = save_frames(tmp_path / "one", [0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gif").write_text("not a video")
    (tmp_path / "movie.mp4").write_text("not a video")
    jpeg = ["--reward", "jpeg_compressibility", "--videos"]
    for flags, problem in (
        ([*jpeg, mixed], "2.png' is 16x8 and the first frame 8x8: use one size"),
        ([*jpeg, str(tmp_path / "empty")], "empty' holds no frames: give a folder of image files"),
        ([*jpeg, str(tmp_path / "text.gif")], "text.gif' cannot be opened as an image"),
        ([*jpeg, "no.gif"], "'no.gif' cannot be opened as an image"),
        ([*jpeg, str(tmp_path / "movie.mp4")], "movie.mp4' cannot be read"),
        (["--reward", "motion", "--videos", one], "motion compares consecutive frames, and these videos have one"),
        (["--reward", "motion", f"{one}/1.png"], "reward 'motion' scores whole videos, not images: give it videos"),
        (["--reward", f"{custom_file}:Speed", "--prompt", "", "--videos", one], "needs the frame rate of the videos"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(parse_args(flags))
        message = stop.value.code
        assert message.startswith("python -m reward_models: error: ") and "\n" not in message
        assert problem in message


def test_help_lists_the_rewards_without_heavy_imports():
    """The same process also checks that importing the package imports nothing heavy."""
    code = """if True:
        import runpy, sys
        sys.argv = ["reward_models", "--help"]
        try:
            runpy.run_module("reward_models", run_name="__main__")
        finally:
            heavy = {"transformers", "diffusers", "accelerate", "huggingface_hub", "safetensors", "PIL"}
            print("imported:", *sorted(heavy & sys.modules.keys()))
    """
    environment = {**os.environ, "PYTHONPATH": ROOT}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(name in run.stdout and known.meaning in run.stdout for name, known in REWARDS.items())
    assert run.stdout.splitlines()[-1] == "imported:"
