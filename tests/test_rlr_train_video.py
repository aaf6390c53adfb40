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
"""train_rlr_video.py on tiny random models of every family."""

import json
import re
import shutil

import evaluate_rlr
import pytest
import torch
import train_rlr_video
from diffusion_models import load_model
from diffusion_models.lora_files import SECOND_FILE
from huggingface_hub import ModelCard
from PIL import Image
from rlr_models import RED, REDDER, SEEN, seeded
from rlr_processes import run_two_ranks
from rlr_testing import LORA, TINY_CLIP, TINY_SD, forget_accelerator, metrics_of, same_adapter
from rlr_training.evaluation import EVALUATION_SEED
from rlr_video_models import tiny_wan, tiny_wan22, tiny_wan_a14b
from rlr_video_models_other import plain_video_pipeline, tiny_animatediff, tiny_cogvideox, tiny_ltx
from safetensors import safe_open
from safetensors.torch import load_file


BASE = [
    *("--reward", REDDER, "--height", "32", "--width", "32", "--num_inference_steps", "2", "--num_frames", "9"),
    *("--train_batch_size", "2", "--gradient_accumulation_steps", "1", "--decode_batch_size", "2"),
    *("--max_train_steps", "2", "--seed", "0", "--num_eval_images", "0", "--report_to", "none"),
    *("--learning_rate", "1e-2"),
]
FOUR = ["--num_inference_steps", "4"]
# {class of the pipeline: (its folder() here, frames of the videos)}
FAMILIES = {
    "WanPipeline": (tiny_wan, 9),
    "LTXPipeline": (tiny_ltx, 9),
    "CogVideoXPipeline": (tiny_cogvideox, 9),
    "AnimateDiffPipeline": (tiny_animatediff, 4),
}


def train_video(folder, output_dir, *flags):
    """The metrics of a run on a model of `rlr_video_models`."""
    forget_accelerator()
    where = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(output_dir)]
    train_rlr_video.main(train_rlr_video.parse_args([*BASE, *where, *flags]))
    return metrics_of(output_dir)


@pytest.fixture
def prompts(tmp_path):
    """The flag of a file of prompts that differ in length."""
    (tmp_path / "prompts.txt").write_text("a red seven\na blue two on a green field")
    return ["--prompts", str(tmp_path / "prompts.txt")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_ends_in_an_adapter_for_the_plain_pipeline(tmp_path, prompts, name, monkeypatch):
    make_folder, num_frames = FAMILIES[name]
    folder, out = make_folder(), tmp_path / "out"
    flags = [*prompts, "--num_frames", str(num_frames), "--num_eval_images", "2", "--checkpointing_steps", "1"]
    flags += ["--heldout_reward", REDDER, "--heldout_steps", "1", "--num_heldout_images", "4"]
    flags += ["--feature_model", TINY_CLIP, "--validation_prompts", "a thin one", "--num_validation_images", "1"]
    metrics = train_video(folder, out, *flags)
    assert metrics[1]["heldout_mean"] != metrics[0]["heldout_mean"]
    assert metrics[1]["flicker"] > 0 and 0 < metrics[1]["subject_consistency"] <= 1 and metrics[1]["motion"] > 0
    with safe_open(out / LORA, "pt") as file:
        assert all(key.startswith(("transformer.", "unet.")) and "lora" in key for key in file.keys())
    # The tuned videos of the comparison are those of a plain pipeline with the adapter.
    videos, drawn_for = SEEN[-1]
    model = load_model(folder)
    pipeline = plain_video_pipeline(folder, model)
    pipeline.load_lora_weights(out, weight_name=LORA)
    arguments = model.pipeline_arguments(
        *((32, 32, num_frames), 2, model.guidance_scale), **model.drawing_options({"eta": 1.0})
    )
    fixed = seeded([EVALUATION_SEED, EVALUATION_SEED + 1])
    expected = pipeline(prompt=list(drawn_for), generator=fixed, output_type="pt", **arguments).frames
    torch.testing.assert_close(videos, expected, rtol=0, atol=2e-5)
    # What people look at moves.
    (validation,) = (out / "validation" / "step-000002").iterdir()
    for path in (validation, out / "before_after.gif"):
        with Image.open(path) as image:
            assert image.n_frames == num_frames
    # The card's example runs, beside the folder of the model and that of the adapter.
    (tmp_path / folder.split("/")[-1]).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(out / "README.md")
    assert "text-to-video" in card.data.tags and "before_after.gif" in card.text
    exec(re.search(r"```py\n(.*?)```", card.text, re.DOTALL)[1], {})
    with Image.open(tmp_path / "video.gif") as image:
        assert image.size == (32, 32) and image.n_frames == num_frames
    # A resumed run is the run that was not interrupted.
    shutil.copytree(out, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-2")
    resumed = train_video(folder, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert same_adapter(out, tmp_path / "resumed") and resumed[-1]["reward_mean"] == metrics[-1]["reward_mean"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward", RED, "--score_frames", "chunk"],
        ["--reward", RED, "--score_frames", "3", "--frame_reduction", "min"],
        ["--reward", f"motion,{RED}:0.1,jpeg_compressibility:0.1"],
        ["--gradient_estimator", "ddpo", "--reward", RED, "--score_frames", "chunk"],
        ["--gradient_estimator", "truncated_bp", "--mixed_precision", "bf16", "--fps", "7"],
    ],
    ids=" ".join,
)
def test_every_way_to_train(tmp_path, prompts, flags):
    metrics = train_video(tiny_wan(), tmp_path / "out", *prompts, *flags)
    assert all(line["grad_norm"] > 0 for line in metrics)


def test_a_black_box_has_noise_at_the_last_step_of_cogvideox(tmp_path, prompts):
    flags = ["--reward", "jpeg_compressibility", "--gradient_estimator", "ddpo"]
    assert train_video(tiny_cogvideox(), tmp_path / "out", *prompts, *flags)[-1]["grad_norm"] > 0


@pytest.mark.parametrize("make_folder", [tiny_wan22, tiny_wan_a14b], ids=lambda make: make.__name__)
def test_the_kinds_of_wan(tmp_path, prompts, make_folder):
    size = ["--height", "64", "--width", "64", "--num_frames", "5"]
    assert train_video(make_folder(), tmp_path / "out", *prompts, *size)[-1]["grad_norm"] > 0
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert ("load_into_transformer_2=True" in card) == (make_folder is tiny_wan_a14b)


@pytest.mark.parametrize("estimator", ["rlr", "alignprop", "ddpo"])
def test_one_of_two_transformers_is_trained(tmp_path, prompts, estimator):
    """Alone, saved and loaded again, with a model card that says so, and continued to the bit."""
    flags = ["--height", "16", "--width", "16", "--num_frames", "5", *FOUR, *prompts]
    flags += ["--train_experts", "low_noise", "--gradient_estimator", estimator, "--checkpointing_steps", "1"]
    out = tmp_path / "out"
    metrics = train_video(tiny_wan_a14b(), out, *flags)
    assert all(line["grad_norm"] > 0 for line in metrics)
    names = {path.name for path in out.iterdir()}
    assert SECOND_FILE in names and LORA not in names
    loading = [line for line in ModelCard.load(out / "README.md").text.split("\n") if "load_lora_weights" in line]
    assert len(loading) == 1 and f"weight_name={SECOND_FILE!r}, load_into_transformer_2=True" in loading[0]
    shutil.copytree(out, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-2")
    train_video(tiny_wan_a14b(), tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    found, expected = (load_file(folder / SECOND_FILE) for folder in (tmp_path / "resumed", out))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    (tmp_path / "resumed" / "checkpoint-2" / SECOND_FILE).unlink()
    with pytest.raises(SystemExit, match=f"checkpoint-2': {SECOND_FILE} is missing; move it away to continue from"):
        train_video(tiny_wan_a14b(), tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    further = train_video(tiny_wan_a14b(), tmp_path / "further", *flags, "--adapter_path", str(out))
    assert further[0]["reward_mean"] != metrics[0]["reward_mean"]


def test_two_ranks_take_the_steps_of_one(tmp_path, prompts):
    """And draw its videos of fixed seeds: three are shared out as two and two."""
    where = ["--pretrained_model_name_or_path", str(tiny_wan()), *prompts, "--gradient_estimator", "full_bp"]
    where += [
        "--heldout_reward",
        RED,
        "--num_heldout_images",
        "4",
        "--heldout_steps",
        "1",
        "--feature_model",
        TINY_CLIP,
    ]
    where += ["--validation_prompts", "a red seven", "--num_validation_images", "3", "--num_eval_images", "3"]
    where += ["--decode_batch_size", "1"]
    run_two_ranks(tmp_path / "two", *BASE, *where, "--train_batch_size", "1", script="train_rlr_video")
    train_video(tiny_wan(), tmp_path / "one", *where)
    names = ("reward_mean", "heldout_mean", "heldout_std", "heldout_trained_mean", "diversity", "flicker", "motion")
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")):
        for name in (*names, "subject_consistency", "drift"):
            assert one[name] == pytest.approx(two[name], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert two["num_images"] == 3 and two["heldout"]["gain"]["mean"] == pytest.approx(
        one["heldout"]["gain"]["mean"], abs=1e-5
    )
    for model in ("base", "tuned"):
        assert two[model]["mean"] == pytest.approx(one[model]["mean"], abs=1e-5)
        assert two[model]["std"] == pytest.approx(one[model]["std"], abs=1e-5)
    files = [sorted(path.name for path in (tmp_path / name).rglob("validation/*/*")) for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 3
    assert (tmp_path / "two" / "best").exists() == (tmp_path / "one" / "best").exists()


def test_the_evaluation_shows_videos_and_how_they_move(tmp_path, prompts):
    train_video(tiny_wan(), tmp_path / "lora", *prompts)
    flags = ["--pretrained_model_name_or_path", str(tiny_wan()), "--adapters", str(tmp_path / "lora"), "--reward", RED]
    flags += [*prompts, "--feature_model", TINY_CLIP, "--images_per_prompt", "2", "--num_prompts", "1"]
    flags += ["--resolution", "32", "--num_frames", "9", "--num_inference_steps", "2"]
    results = evaluate_rlr.main(evaluate_rlr.parse_args([*flags, "--output_dir", str(tmp_path / "evaluation")]))
    figures = results["models"]["lora"]
    assert figures["drift"] > 0 and {"flicker", "motion", "subject_consistency"} <= figures.keys()
    report = (tmp_path / "evaluation" / "report.html").read_text()
    assert "data:image/gif;base64," in report and "Flicker is" in report and "over 2 videos" in report
    with Image.open(tmp_path / "evaluation" / "grid.gif") as image:
        assert image.n_frames == 9


# What is refused


@pytest.mark.parametrize(
    ("make_folder", "flags", "message"),
    [
        (lambda: TINY_SD, [], "a StableDiffusionPipeline is not supported here, but by another script"),
        (tiny_wan, ["--num_frames", "8"], "videos of 8 frames: not one and a multiple of 4"),
        (tiny_wan, ["--score_frames", "chunk"], "--score_frames chunk is for rewards that are means over frames"),
        (
            tiny_wan,
            ["--score_frames", "chunk", "--reward", RED, "--reward_floor", f"{RED}:1"],
            "the penalty of a mean is not the mean of penalties",
        ),
        (tiny_wan, ["--score_frames", "10"], "--score_frames 10 is more than the 9 frames of a video"),
        (tiny_wan, ["--score_frames", "some"], "--score_frames 'some' is not a whole number"),
        (tiny_ltx, ["--score_frames", "chunk", "--reward", RED], "needs a decoder that can be stopped"),
        (tiny_cogvideox, ["--noise", "flow_sde"], "--noise flow_sde is for other models"),
        (tiny_cogvideox, ["--sigmas", "linspace"], "--sigmas linspace is for other models"),
        (tiny_ltx, ["--guidance_scale_2", "3"], "--guidance_scale_2 3.0 is for other models"),
        (tiny_wan, ["--guidance_scale_2", "3"], "guidance_scale_2 is for models with a transformer_2"),
        (tiny_wan, ["--train_experts", "low_noise"], "--train_experts low_noise: the model has one network"),
        (
            *(tiny_wan_a14b, ["--train_experts", "high_noise", "--gradient_estimator", "alignprop", *FOUR]),
            "--train_experts: alignprop can end after 1 of the last steps, and only those from the 2th last on",
        ),
        (
            *(tiny_wan_a14b, ["--train_experts", "low_noise", "--gradient_estimator", "rlr_paper", *FOUR]),
            "--train_experts: rlr_paper draws its steps from all 4, and only",
        ),
        (
            *(tiny_wan_a14b, ["--train_experts", "low_noise", "--num_inference_steps", "1"]),
            "--train_experts: none of the 1 steps is of the network that is trained",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path, capsys, prompts, make_folder, flags, message
):
    with pytest.raises(SystemExit) as stop:
        train_video(make_folder(), tmp_path / "out", *prompts, *flags)
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert (
        message in printed and printed.startswith("train_rlr_video.py: error: ") and printed.strip().count("\n") == 0
    )
    assert not (tmp_path / "out").exists()


def test_an_evaluation_refuses_flags_of_videos_for_images(tmp_path):
    command = ["--pretrained_model_name_or_path", TINY_SD, "--adapters", "none", "--feature_model", TINY_CLIP]
    command += ["--prompts", "simple_animals", "--num_frames", "9", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--num_frames 9 is for other models, not for a StableDiffusionPipeline"):
        evaluate_rlr.main(evaluate_rlr.parse_args(command))
