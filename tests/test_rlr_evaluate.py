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
"""evaluate_rlr.py: what it measures, what it writes, and what it refuses."""

import base64
import copy
import csv
import io
import json
import os
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusion_models.adapters import add_lora, load_adapter, save_lora
from evaluate_rlr import main, parse_args
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from reward_models import load_reward
from reward_models.features import frechet_distance, load_features
from rlr_loras import in_kohya, matrices_of
from rlr_reports import Page, pixels_of
from rlr_testing import DIGITS, LORA, ROOT, TINY_AESTHETIC, TINY_CLIP, TINY_SD, tiny_model, tiny_pipeline
from rlr_training.plots import caption, plot_before_after, plot_grid, plot_scales
from rlr_training.report import print_table, write_csv
from safetensors.torch import load_file, save_file

from diffusers import DDIMScheduler


FLAGS = [
    *("--pretrained_model_name_or_path", TINY_SD, "--feature_model", TINY_CLIP, "--prompts", DIGITS),
    *("--reward", "aesthetic,clip_score", "--reward_path", f"aesthetic={TINY_AESTHETIC}"),
    *("--reward_path", f"clip_score={TINY_CLIP}", "--num_inference_steps", "3", "--num_prompts", "3"),
    *("--images_per_prompt", "2", "--batch_size", "4", "--decode_batch_size", "6"),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folders of two adapters: one changes the images much, one hardly."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=4, layers=["to_k", "to_q", "to_v", "to_out.0"])
    for name, strength in (("strong", 0.1), ("weak", 1e-2)):
        for key, parameter in model.network.named_parameters():
            if "lora_B" in key:
                parameter.data = torch.randn(parameter.shape) * strength
        save_lora(model, folder / name)
    return [str(folder / "strong"), str(folder / "weak")]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, adapters):
    """An evaluation of both adapters: its arguments, results and folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "real").mkdir()
    for i in range(3):
        Image.new("RGB", (20 + i, 30), (60 * i, 0, 90)).save(folder / "real" / f"{i}.png")
    flags = ["--lora_scales", "0,1", "--real_images", str(folder / "real"), "--output_dir", str(folder / "out")]
    args = parse_args([*FLAGS, "--adapters", *adapters, *flags])
    return SimpleNamespace(args=args, results=main(args), folder=folder / "out")


def draw(pipeline, prompts):
    """The images that the pipeline of diffusers draws from the seeds of an evaluation."""
    generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(len(prompts))]
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 1.0, "height": 32, "width": 32}
    return pipeline(prompts, generator=generators, output_type="pt", **options).images


def test_figures_are_those_of_the_images_of_a_plain_pipeline(evaluation, adapters):
    models, scales = evaluation.results["models"], evaluation.results["lora_scales"]
    assert list(models) == ["base", "strong", "weak"] and list(scales) == ["strong", "weak"]
    prompts = ["a green zero"] * 2 + ["a green one"] * 2 + ["a green two"] * 2
    pipeline, reward = tiny_pipeline(), load_reward("aesthetic", path=TINY_AESTHETIC)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    base = reward(draw(pipeline, prompts), prompts)
    assert models["base"]["rewards"]["aesthetic"]["mean"] == pytest.approx(base.mean().item(), rel=1e-4)
    error = base.std().item() / 6**0.5
    assert models["base"]["rewards"]["aesthetic"]["standard_error"] == pytest.approx(error, rel=1e-3)
    pipeline.load_lora_weights(adapters[0])
    tuned = draw(pipeline, prompts)
    gain = reward(tuned, prompts) - base
    figures = models["strong"]["rewards"]["aesthetic"]
    assert figures["gain"] == pytest.approx(gain.mean().item(), rel=1e-3)
    assert figures["gain_standard_error"] == pytest.approx(gain.std().item() / 6**0.5, rel=1e-3)
    assert figures["win_rate"] == pytest.approx((gain > 0).float().mean().item()) and 0 < figures["win_rate"] < 1
    # The base model does not drift from itself, and an adapter of scale zero is the base model.
    assert models["base"]["drift"] == pytest.approx(0, abs=1e-6)
    assert models["strong"]["drift"] > 10 * models["weak"]["drift"] > 0
    assert scales["strong"]["0"]["drift"] == pytest.approx(0, abs=1e-6)
    assert scales["strong"]["1"]["rewards"]["aesthetic"]["mean"] == pytest.approx(figures["mean"], rel=1e-5)
    features = load_features(TINY_CLIP)
    colors = [torch.tensor([60.0 * i, 0.0, 90.0]).view(1, 3, 1, 1).expand(-1, -1, 30, 20 + i) / 255 for i in range(3)]
    distance = frechet_distance(features(tuned), torch.cat([features(image) for image in colors]))
    assert models["strong"]["frechet_to_real"] == pytest.approx(float(distance), rel=1e-3)


def test_layers_of_an_adapter_in_the_text_encoder_take_part(tmp_path):
    """At each scale; alone, and beside one without such layers, which sees the prompts of the base model."""
    encoder = tiny_pipeline().text_encoder
    names = {
        "text_model.encoder.layers.0.self_attn.q_proj": (4, 40.0),
        "text_model.encoder.layers.1.mlp.fc1": (2, 40.0),
    }
    names = {
        name if hasattr(encoder, "text_model") else name.removeprefix("text_model."): rank
        for name, rank in names.items()
    }
    spell = lambda name: f"text_model.{name.removeprefix('text_model.')}"  # noqa: E731
    torch.manual_seed(0)
    paths = [str(tmp_path / "text.safetensors"), str(tmp_path / "unet.safetensors")]
    save_file(in_kohya(matrices_of(encoder, names), spell, "lora_te_"), paths[0])
    save_file(in_kohya(matrices_of(tiny_pipeline().unet)), paths[1])
    flags = ["--num_prompts", "1", "--lora_scales", "0.5", "--output_dir", str(tmp_path / "out")]
    results = main(parse_args([*FLAGS, "--adapters", *paths, *flags]))
    reward, prompts = load_reward("aesthetic", path=TINY_AESTHETIC), ["a green zero"] * 2

    def expected(adapter, scale):
        pipeline = tiny_pipeline()
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        if adapter is not None:
            load_adapter(pipeline, adapter, "own")
            pipeline.set_adapters(["own"], [scale])
        return pytest.approx(reward(draw(pipeline, prompts), prompts).mean().item(), rel=1e-4)

    def found(figures):
        return figures["rewards"]["aesthetic"]["mean"]

    assert found(results["models"]["base"]) == expected(None, 1.0) != expected(paths[0], 1.0)
    for path, name in zip(paths, ("text", "unet")):
        assert found(results["models"][name]) == expected(path, 1.0)
        assert found(results["lora_scales"][name]["0.5"]) == expected(path, 0.5)


def test_results_are_written_as_json_and_csv_and_printed(evaluation, capsys):
    models = evaluation.results["models"]
    written = json.loads((evaluation.folder / "results.json").read_text())
    assert written == json.loads(json.dumps(evaluation.results))
    assert written["settings"] == vars(evaluation.args) and written["num_images"] == 6
    with open(evaluation.folder / "results.csv", encoding="utf-8", newline="") as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert list(table) == list(models)
    assert float(table["strong"]["aesthetic_win_rate"]) == models["strong"]["rewards"]["aesthetic"]["win_rate"]
    assert float(table["weak"]["frechet_to_real"]) == models["weak"]["frechet_to_real"]
    print_table(evaluation.results)
    header, base, strong, weak = capsys.readouterr().out.splitlines()
    assert "clip_score | gain | win rate" in header and "frechet to real" in header
    # The base model does not win against itself.
    assert table["base"]["aesthetic_win_rate"] == "" and "%" not in base
    assert strong.startswith("strong") and strong.count("%") == weak.count("%") == 2
    figures = models["strong"]["rewards"]["aesthetic"]
    number = r"([+-]?[\d.]+)"
    printed = re.match(rf"strong +{number} \+- {number} \| {number} \+- {number} \| {number} %", strong).groups()
    expected = [figures[name] for name in ("mean", "standard_error", "gain", "gain_standard_error")]
    assert list(map(float, printed)) == pytest.approx([*expected, 100 * figures["win_rate"]], rel=1e-2)


def test_the_table_to_be_filled_in_has_the_columns_of_an_evaluation(tmp_path, evaluation):
    results = copy.deepcopy(evaluation.results)
    for summary in results["models"].values():
        del summary["frechet_to_real"]
    write_csv(results, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        columns = file.readline()
    with open(os.path.join(ROOT, "docs", "sd14_results.csv"), encoding="utf-8") as file:
        expected = file.readline()
    # The two rewards here stand for the four there.
    for one, several in (("aesthetic", ("pickscore", "hpsv2", "aesthetic")), ("clip_score", ("imagereward",))):
        own = ",".join(name.replace("score", one, 1) for name in ("score", "score_standard_error", "score_win_rate"))
        columns = columns.replace(own, ",".join(own.replace(one, name) for name in several), 1)
    assert columns.strip() == expected.strip()


def test_the_report_is_one_file_with_all_images(evaluation):
    text = (evaluation.folder / "report.html").read_text(encoding="utf-8")
    report = Page(text)
    assert [row[0] for row in report.rows] == ["model", "base", "strong", "weak"]
    assert {len(row) for row in report.rows} == {1 + 2 + 4} and "num_inference_steps: 3" in text
    assert "eta: 1.0" in text and "Rewards are means over 6 images" in text
    assert "negative_prompt" not in text and "overwrite_output_dir" not in text  # which are not set
    images = [
        re.fullmatch("data:image/png;base64,(.+)", address)[1]
        for address in report.links + [image["src"] for image in report.images]
    ]
    assert len(images) == 3
    for data, name in zip(images, ("grid.png", "gains.png", "scales.png")):
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == Image.open(evaluation.folder / name).size
        assert torch.tensor(image.convert("L").getextrema()).diff() > 100  # something is drawn


def test_a_browser_shows_the_report(tmp_path, evaluation):
    pixels = pixels_of(evaluation.folder / "report.html", tmp_path, 1000)
    # The digits are drawn in colors on black; a page without its images has neither.
    assert (pixels.max(2) < 30).mean() > 0.02
    assert (np.ptp(pixels, axis=2) > 100).mean() > 0.005


def test_dollar_signs_in_prompts_are_drawn_as_they_are(tmp_path):
    """Between two of them matplotlib would set a formula, or fail to."""
    prompts, images = ["one of $5 # or $6", "a $x_{1$"], torch.rand(2, 3, 8, 8)
    plot_grid({"base": images, "tuned": images}, prompts, tmp_path / "grid.png")
    both = {"base": images, "tuned": images}
    plot_before_after(both, {name: torch.zeros(2) for name in both}, prompts, tmp_path / "before_after.png")
    assert (tmp_path / "grid.png").exists() and (tmp_path / "before_after.png").exists()


LONG_PROMPTS = [
    "a fox that sits in the snow, highly detailed, cinematic light, " * 40,
    "x" * 1000,
    "一只坐在雪地里的红狐狸，高度细节，电影光，八千像素，艺术站趋势，非常漂亮",
    "雪の中のきつね 🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊🦊",
    "الثعلب الأحمر في الثلج مع ضوء جميل جدا والسماء الزرقاء",
]


def test_long_prompts_are_shortened_to_three_lines_beside_an_image():
    assert caption("a red fox") == "a red fox" and caption("$5 or $6") == r"\$5 or \$6"
    assert caption("a\tred\n fox") == "a red fox"
    lines = caption(LONG_PROMPTS[0]).splitlines()
    assert lines == ["a fox that sits in", "the snow, highly", "detailed, ..."]
    assert len(caption("x" * 1000).splitlines()) == 3


@pytest.mark.parametrize("prompt", LONG_PROMPTS, ids=["words", "a word", "Chinese", "emoji", "Arabic"])
def test_a_caption_is_no_wider_than_its_image(prompt):
    """Of 1.5 inches, in every script; what the font lacks is drawn as boxes, without warnings."""
    figure, images = Figure(dpi=100), torch.rand(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = figure.text(0, 0, caption(prompt), fontsize=8)
        assert 0.5 < text.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / 100 < 1.5
    both = {"base": images, "tuned": images}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_before_after(both, {name: torch.zeros(1) for name in both}, [prompt], io.BytesIO())
        plot_grid(both, [prompt], io.BytesIO())


@pytest.mark.parametrize("size", [(8, 16), (16, 8)], ids=["wide", "tall"])
def test_images_that_are_not_square_fill_their_row(tmp_path, size):
    """Drawn in red on white."""
    images = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(4, 3, *size)
    both = {"base": images, "tuned": images}
    plot_before_after(both, {name: torch.zeros(4) for name in both}, ["a red one"] * 4, tmp_path / "both.png")
    plot_grid(both, ["a red one"] * 4, tmp_path / "grid.png")
    for name in ("both.png", "grid.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        red = (pixels[..., 0] > 200) & (pixels[..., 1] < 50)
        assert red.any(0).mean() > 0.65 and red.any(1).mean() > 0.4


def test_errors_of_the_scale_plot_are_those_of_the_paired_gains():
    """A plot does not change with the standard error of the mean."""

    def plotted(**changes):
        figures = {"mean": 5.0, "standard_error": 1.0, "gain": 0.5, "gain_standard_error": 0.1, **changes}
        models = {"base": {"rewards": {"aesthetic": figures}}}
        scales = {"tuned": {scale: {"rewards": {"aesthetic": figures}, "drift": float(scale)} for scale in ("0", "1")}}
        file = io.BytesIO()
        plot_scales({"models": models, "lora_scales": scales}, file)
        return file.getvalue()

    assert plotted() == plotted(standard_error=2.0, mean=7.0)
    assert plotted() != plotted(gain_standard_error=0.2) and plotted() != plotted(gain=0.6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--adapters", "/nowhere"], "--adapters '/nowhere' cannot be loaded"),
        (
            ["--adapters", "x", "--lora_scales", "0,much"],
            "--lora_scales '0,much' must be numbers, separated by commas",
        ),
        (["--adapters", "x", "--lora_scales", "0,nan"], "--lora_scales '0,nan' must be numbers"),
        (["--adapters", "x", "--images_per_prompt", "1"], "--images_per_prompt 1 must be at least 2"),
        (["--adapters", "x", "--dcot_boundaries", ".7", ".3"], "--dcot_boundaries: the boundaries [0.7, 0.3] are not"),
        (["--adapters", "x", "--real_images", "/nowhere"], "--real_images '/nowhere' holds fewer than two images"),
        (["--adapters", "x", "--reward", "beauty"], "unknown reward 'beauty'"),
        (["--adapters", "x", "--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--adapters", "x", "--eta", "2"], "--eta 2 must be in [0, 1]"),
        (["--adapters", "x", "--eta", ".5", "--scheduler", "ddpm"], "--eta 0.5 is for --scheduler ddim, and ddpm has"),
        (["--adapters", "x", "--reward_path", "/nowhere"], "'/nowhere' is not of the form NAME=DIR"),
        (["--adapters", "x", "--prompts", "prompts.csv"], "prompts 'prompts.csv': no such file"),
        ([], "required: --adapters"),
    ],
    ids=lambda value: " ".join(value) or "no adapters" if isinstance(value, list) else "",
)
def test_bad_input_is_named_in_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(parse_args([*FLAGS, *flags, "--output_dir", str(tmp_path / "out")]))
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.removesuffix("\n")
    assert error.startswith("evaluate_rlr.py: error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_fit_the_model_is_refused_before_images_are_drawn(tmp_path, adapters):
    """With a layer more, which diffusers skips with a warning."""
    layers = load_file(os.path.join(adapters[0], LORA))
    save_file({**layers, "unet.other.lora.down.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    flags = ["--adapters", str(tmp_path / "other.safetensors"), "--output_dir", str(tmp_path / "out")]
    message = (
        "other.safetensors' cannot be loaded: 'unet.other.lora.down.weight': the base model has no such .* layer$"
    )
    with pytest.raises(SystemExit, match=message):
        main(parse_args([*FLAGS, *flags]))
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_overwritten_only_on_request_and_an_adapter_may_have_any_name(
    tmp_path, evaluation, adapters, capsys
):
    """Also the name of a member of the module in which peft keeps adapters."""
    shutil.copytree(evaluation.folder, tmp_path / "out")
    shutil.copytree(adapters[1], tmp_path / "train")
    flags = [*FLAGS, "--adapters", str(tmp_path / "train"), "--output_dir", str(tmp_path / "out")]
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="out' holds another evaluation: use another, or --overwrite_output_dir"):
        main(parse_args(flags))
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    results = main(parse_args([*flags, "--overwrite_output_dir", "--num_prompts", "1"]))
    assert list(results["models"]) == ["base", "train-again"]
    assert re.search("^base .*\ntrain-again .*%", capsys.readouterr().out, re.MULTILINE)
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["models"]) == ["base", "train-again"]


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_loaded(tmp_path):
    flags = ["--pretrained_model_name_or_path", "/nowhere", "--adapters", "x", "--output_dir", DIGITS]
    with pytest.raises(SystemExit, match="^evaluate_rlr.py: error: --output_dir .*: '.*digits.txt' is a file$"):
        main(parse_args([*FLAGS, *flags]))


def test_long_prompts_give_one_warning(tmp_path, adapters, caplog):
    (tmp_path / "prompts.txt").write_text("very " * 480 + "red\na red one\n")
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--adapters", adapters[1], "--reward", "aesthetic"]
    main(parse_args([*FLAGS, *flags, "--output_dir", str(tmp_path / "out"), "--images_per_prompt", "2"]))
    warnings = [record.getMessage() for record in caplog.records if "does not see" in record.getMessage()]
    assert len(warnings) == 1 and len(warnings[0]) < 400 and "1 of 2 prompts are longer" in warnings[0]


def test_out_of_memory_is_reported_in_one_line(tmp_path, adapters):
    """By a reward that has memory enough only for the images that it is tried on."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef large(images, prompts):\n"
        "    if len(images) > 2:\n        raise torch.OutOfMemoryError('none left')\n    return images.mean((1, 2, 3))\n"
    )
    flags = ["--adapters", adapters[1], "--reward", f"{tmp_path}/mine.py:large", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"^evaluate_rlr.py: error: out of memory: use a .*--batch_size.*none left\)$"
    ):
        main(parse_args([*FLAGS, *flags]))
