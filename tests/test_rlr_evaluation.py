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
"""Images of fixed seeds: held-out rewards, early stopping, validation, the comparison with the base model."""

import io
import json
import re
import shlex
from types import SimpleNamespace

import evaluate_rlr
import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import load_rewards, parse_reward
from rlr_testing import BASE, LORA, TINY_CLIP, same_adapter, tiny_model, tiny_pipeline, train
from rlr_training.before_after import footer_lines, print_comparison
from rlr_training.chains import set_size
from rlr_training.display import shown
from rlr_training.evaluation import HELDOUT_SEED, EarlyStopping, HeldOut, make_draw
from rlr_training.hub import EVALUATION_FLAGS
from rlr_training.plots import plot_before_after
from rlr_training.shares import Share
from train_rlr_sd import parse_args


HELD_OUT = ["--heldout_reward", "clip_score", "--heldout_steps", "1", "--num_heldout_images", "8"]
HELD_OUT += ["--feature_model", TINY_CLIP]


def draw_of(model, *flags):
    """The `draw` of a run on a model."""
    args = parse_args([*BASE, "--decode_batch_size", "1", *flags])
    set_size(args, model)
    return make_draw(args, model)


def images_of(adapter, prompts):
    """What is drawn with the adapter of a folder in a plain pipeline."""
    model = tiny_model()
    model.pipeline.load_lora_weights(adapter, weight_name=LORA)
    return draw_of(model)(prompts, 4)


# Drawing


def test_an_image_depends_on_its_place_and_not_on_the_batches():
    model, prompts = tiny_model(), ["a red one", "a blue two", "a green three"]
    draw = draw_of(model, "--negative_prompt", "a blue one")
    whole = draw(prompts, 3)
    torch.testing.assert_close(draw(prompts, 2), whole, rtol=0, atol=1e-4)
    assert (draw(prompts, 3, first_seed=HELDOUT_SEED) - whole).abs().max() > 0.1
    # As the pipeline itself draws it, clamped to [0, 1].
    pipeline = tiny_pipeline()
    pipeline.scheduler = model.pipeline.scheduler
    expected = pipeline(
        prompts[1],
        negative_prompt="a blue one",
        num_inference_steps=3,
        guidance_scale=5.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(1_000_001),
        output_type="pt",
    ).images
    torch.testing.assert_close(whole[1:2], expected, rtol=0, atol=1e-4)


def test_images_need_not_be_square():
    draw = draw_of(tiny_model(), "--height", "48", "--width", "32")
    assert draw(["a red one"], 1).shape == (1, 3, 48, 32)


# Held-out rewards


def test_a_run_that_only_lowers_the_held_out_reward_stops(tmp_path, caplog):
    """Trained for small files, which no prompt asks for: the agreement with the prompts falls at once."""
    flags = ["--reward", "jpeg_compressibility:-1", "--learning_rate", "0.3", "--max_train_steps", "9"]
    metrics = train(tmp_path, *flags, *HELD_OUT, "--early_stop_patience", "2")
    assert len(metrics) == 2 and not (tmp_path / "best").exists()
    base = float(re.search(r"base model on 8 images: heldout_mean (\S+),", caplog.text)[1])
    reason = f"stopped early after step 2: the held-out reward has been below {shown(base)} of the base model for 2"
    assert f"{reason} scorings; no adapter was better" in caplog.text
    for line in metrics:
        assert 0 < line["diversity"] < 2 and 0 <= line["drift"] < 2 and line["heldout_std"] > 0
        assert line["heldout_trained_mean"] != line["heldout_mean"] < base


def test_the_best_adapter_is_kept_and_ties_go_to_the_later_one(tmp_path, caplog):
    """The held-out reward of a step depends on the checkpoints before it: .5 for base model and first step, then as listed."""
    (tmp_path / "mine.py").write_text(
        "import glob, torch\n\ndef listed(images, prompts):\n"
        f"    saved = len(glob.glob({str(tmp_path / 'out')!r} + '/checkpoint-*'))\n"
        "    return torch.full((len(images),), [0.5, 0.9, 0.7, 0.9, 0.8, 0.7, 0.9, 0.9, 0.9][saved])\n"
    )
    flags = ["--max_train_steps", "9", "--checkpointing_steps", "1", "--early_stop_patience", "2", *HELD_OUT]
    out = tmp_path / "out"
    metrics = train(out, *flags, "--num_heldout_images", "4", "--heldout_reward", f"{tmp_path}/mine.py:listed")
    assert [round(line["heldout_mean"], 4) for line in metrics] == [0.5, 0.9, 0.7, 0.9, 0.8, 0.7]
    reason = "stopped early after step 6: the held-out reward has been below 0.9 of step 4 for 2 scorings"
    assert f"{reason}; that adapter is in best/" in caplog.text
    assert same_adapter(out / "best", out / "checkpoint-4") and not same_adapter(out / "best", out)


@pytest.mark.parametrize("count, picks", [(4, [0]), (8, [0, 2]), (16, [0, 1, 2, 3]), (20, [0, 0, 1, 2, 3])])
def test_held_out_images_are_of_prompts_from_the_whole_list(count, picks):
    prompts, rewards = (
        ["a red one", "a red two", "a blue one", "a blue two"],
        load_rewards(parse_reward("jpeg_compressibility"), {}),
    )
    args = parse_args([*BASE, "--num_heldout_images", str(count)])
    held_out = HeldOut(args, None, rewards, rewards, torch.nn.Identity(), prompts)
    assert held_out.prompts == [prompts[i] for i in picks for _ in range(4)]


@pytest.mark.parametrize(("count", "num_processes"), [(1, 1), (1, 3), (4, 3), (5, 2), (6, 3), (7, 4), (3, 8)])
def test_the_processes_draw_each_image_and_equally_many(count, num_processes):
    items, shares = list(range(count)), []
    for rank in range(num_processes):
        shares.append(Share(SimpleNamespace(num_processes=num_processes, process_index=rank), count))
    parts = [share.of(items) for share in shares]
    assert {len(part) for part in parts} == {-(-count // num_processes)}
    assert [share.first for share in shares] == [part[0] for part in parts]
    for share in shares:
        assert share.in_order([torch.tensor(part) for part in parts]).tolist() == items


def test_early_stopping_counts_scorings_below_the_best():
    stopping = EarlyStopping(2)
    assert stopping.update(5, -1.0) == (True, None) and stopping.update(10, -1.1) == (False, None)
    assert stopping.update(12, -1.0) == (True, None)  # of equals the last
    assert stopping.update(15, -0.5) == (True, None) and stopping.update(20, -0.7) == (False, None)
    resumed = EarlyStopping(2)
    resumed.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    is_best, reason = resumed.update(25, -0.6)
    assert not is_best and "after step 25" in reason and "below -0.5 of step 15 for 2 scorings" in reason
    resumed.start(9.0)  # the base model's score counts on a fresh run only
    assert resumed.best == -0.5
    collapsed = EarlyStopping(2)
    collapsed.start(1.0)
    assert collapsed.update(5, 0.0) == (False, None)
    is_best, reason = collapsed.update(10, 0.0)
    assert not is_best and reason.endswith("below 1 of the base model for 2 scorings; no adapter was better")
    never, fresh = EarlyStopping(None), EarlyStopping(1)
    assert [never.update(step, -step)[1] for step in range(9)] == [None] * 9
    fresh.load_state_dict(json.loads(json.dumps(EarlyStopping(1).state_dict())))
    assert fresh.update(1, -1e9) == (True, None)


# The moving average


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    """A run with a moving average that is far from the adapter, with validation and held-out images at its end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path_factory.mktemp("run") / "averaged"
    flags = ["--ema_decay", "0.5", "--learning_rate", "0.1", "--max_train_steps", "3", "--report_to", "tensorboard"]
    flags += [
        "--validation_steps",
        "3",
        "--num_validation_images",
        "2",
        "--validation_prompts",
        "a red one",
        "a blue two",
    ]
    # Disagreement with the prompts, which such a learning rate raises.
    metrics = train(out, *flags, *HELD_OUT, "--heldout_steps", "3", "--heldout_reward", "clip_score:-1")
    (folder,) = (out / "logs").rglob("rlr-sd")
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return out, metrics, events


def test_validation_images_are_of_the_moving_average(averaged_run):
    out, _, events = averaged_run
    (event,) = events.Images("validation")
    assert event.step == 3 and "reward_mean" in events.Tags()["scalars"]
    shown = torch.tensor(np.array(Image.open(io.BytesIO(event.encoded_image_string)))).permute(2, 0, 1) / 255
    prompts = ["a red one", "a red one", "a blue two", "a blue two"]
    # TensorBoard keeps a batch as one image, a row.
    average, trained = (torch.cat(list(images_of(folder, prompts)), dim=2) for folder in (out / "ema", out))
    assert (shown - average).abs().max() < 0.01 < (shown - trained).abs().max()
    # The same images are files.
    assert (validation_images(out, 3, prompts) - average).abs().max() < 0.01


def test_held_out_rewards_and_the_best_adapter_are_of_the_moving_average(averaged_run):
    out, metrics, _ = averaged_run
    assert same_adapter(out / "best", out / "ema") and not same_adapter(out / "best", out)
    assert "heldout_mean" in metrics[2] and "heldout_mean" not in metrics[1]


def test_the_run_continues_with_the_adapter_and_not_with_its_average(averaged_run, tmp_path):
    """The same run without an average ends in the same adapter."""
    train(tmp_path, "--learning_rate", "0.1", "--max_train_steps", "3")
    assert same_adapter(averaged_run[0], tmp_path)


# Validation, and the comparison with the base model


def validation_images(out, step, prompts):
    """The images of a validation, in a row; their files are numbered and have the words of the prompts in their names."""
    names = [f"{i:03}-{prompt.replace(' ', '-')}.png" for i, prompt in enumerate(prompts, 1)]
    folder = out / "validation" / f"step-{step:06}"
    assert sorted(path.name for path in folder.iterdir()) == names
    images = [torch.tensor(np.array(Image.open(folder / name))).permute(2, 0, 1) / 255 for name in names]
    return torch.cat(images, dim=2)


def test_validation_images_are_files_also_without_a_tracker_and_at_the_end(tmp_path):
    flags = [
        "--validation_prompts",
        "a red one",
        "a blue two",
        "--num_validation_images",
        "2",
        "--learning_rate",
        "0.1",
    ]
    train(tmp_path, *flags, "--validation_steps", "2", "--max_train_steps", "3", "--report_to", "none")
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step-000002", "step-000003"]
    prompts = ["a red one", "a red one", "a blue two", "a blue two"]
    last = torch.cat(list(images_of(tmp_path, prompts)), dim=2)
    assert (validation_images(tmp_path, 3, prompts) - last).abs().max() < 0.01
    assert (validation_images(tmp_path, 2, prompts) - last).abs().max() > 0.01


def test_validation_images_that_cannot_be_written_end_the_run_in_one_line(tmp_path):
    (tmp_path / "validation").write_text("mine")
    flags = ["--validation_prompts", "a red one", "--validation_steps", "1", "--num_validation_images", "1"]
    with pytest.raises(SystemExit, match="error: step 1: cannot write '.*step-000001': .*Not a directory") as stop:
        train(tmp_path, *flags)
    assert "\n" not in stop.value.code and (tmp_path / "validation").read_text() == "mine"


def test_validation_in_half_precision(tmp_path):
    """Where the network under training and the VAE have different types."""
    flags = ["--report_to", "tensorboard", "--validation_steps", "1", "--num_validation_images", "1"]
    train(tmp_path, *flags, "--mixed_precision", "bf16", "--max_train_steps", "1", "--validation_prompts", "a red one")
    assert list((tmp_path / "logs").rglob("events.*"))


def test_base_and_tuned_model_are_compared_on_the_same_images(tmp_path, capsys):
    flags = ["--learning_rate", "1e-2", "--num_eval_images", "3", "--validation_prompts", "a red one", "a blue two"]
    train(tmp_path, *flags, "--reward", "aesthetic,clip_score:5", "--validation_steps", "9")
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["num_images"] == 3
    assert results["gain"]["mean"] == pytest.approx(results["tuned"]["mean"] - results["base"]["mean"], abs=1e-5)
    assert results["gain"]["mean"] != 0 and 0 < results["gain"]["standard_error"]
    for name in ("base", "tuned"):
        members = {member: row[name]["mean"] for member, row in results["members"].items()}
        assert results[name]["mean"] == pytest.approx(members["aesthetic"] + 5 * members["clip_score"], rel=1e-5)
    printed = capsys.readouterr().out
    (base,) = re.findall(r" base aesthetic,clip_score:5: (\S+) mean, ", printed)
    assert float(base) == pytest.approx(results["base"]["mean"], rel=1e-2)
    ((gain, error),) = re.findall(r" gain aesthetic,clip_score:5: ([+-]\S+) mean, (\S+) standard error", printed)
    assert float(gain) == pytest.approx(results["gain"]["mean"], abs=0.01 * results["gain"]["standard_error"])
    assert float(error) == pytest.approx(results["gain"]["standard_error"], rel=1e-2)
    assert gain in (tmp_path / "README.md").read_text()


def test_the_held_out_reward_is_compared_too_and_stands_below_the_images(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2)).detach()\n")
    held_out = f"{tmp_path}/mine.py:red"
    out, flags = tmp_path / "out", ["--learning_rate", "1e-2", "--num_eval_images", "3", "--max_train_steps", "1"]
    flags += ["--validation_prompts", "a red one", "--validation_steps", "9"]
    train(out, *flags, "--heldout_reward", held_out, "--feature_model", TINY_CLIP)
    results = json.loads((out / "evaluation.json").read_text())
    args, prompts = parse_args([*BASE, "--heldout_reward", held_out]), ["a red one"] * 3
    red = draw_of(tiny_model())(prompts, 2)[:, 0].mean((1, 2))
    assert results["heldout"]["base"] == pytest.approx({"mean": red.mean().item(), "std": red.std().item()}, rel=1e-4)
    held = results["heldout"]
    assert held["gain"]["mean"] == pytest.approx(held["tuned"]["mean"] - held["base"]["mean"], abs=1e-6) != 0
    printed = capsys.readouterr().out
    assert f"  base held-out {held_out}: " in printed and f"  gain held-out {held_out}: " in printed
    assert "| `held-out mine.py:red` |" in (out / "README.md").read_text()
    lines = footer_lines(args, results)
    assert [line.partition(": ")[0] for line in lines] == ["mean aesthetic", "mean held-out red"]
    assert lines[1].endswith(f"tuned {shown(held['tuned']['mean'], held['tuned']['std'] / 3**0.5)}")


def test_a_held_out_reward_that_fails_at_the_end_leaves_the_rest_of_the_comparison(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def red(images, prompts):\n    if 'a red seven' in prompts:\n        raise ValueError('seven is not known')\n"
        "    return images[:, 0].mean((1, 2)).detach()\n"
    )
    out, flags = tmp_path / "out", ["--num_eval_images", "18", "--max_train_steps", "1", "--heldout_steps", "9"]
    flags += ["--heldout_reward", f"{tmp_path}/mine.py:red", "--num_heldout_images", "4", "--feature_model", TINY_CLIP]
    with pytest.raises(SystemExit, match="the held-out reward has failed in the comparison .*seven is not known"):
        train(out, *flags)
    results = json.loads((out / "evaluation.json").read_text())
    assert results["gain"] and "heldout" not in results
    assert (out / "before_after.png").exists() and "| `aesthetic` |" in (out / "README.md").read_text()


def test_small_gains_are_printed_with_their_digits(capsys):
    scores = {"mean": 0.0412345, "std": 0.00098765}
    gain = {"mean": 0.00000213, "standard_error": 0.00000298}
    results = {"num_images": 100, "base": scores, "tuned": {**scores, "mean": 0.0412366}, "gain": gain}
    print_comparison(parse_args(BASE), results)
    assert capsys.readouterr().out.splitlines() == [
        "  base aesthetic: 0.0412345 mean, 0.000988 standard deviation",
        " tuned aesthetic: 0.0412366 mean, 0.000988 standard deviation",
        "  gain aesthetic: +0.00000213 mean, 0.00000298 standard error",
        "over 100 images of the same prompts and seeds",
    ]


def test_the_end_of_a_run_says_where_the_adapter_is_and_how_to_evaluate_it(tmp_path, capsys):
    flags = ["--negative_prompt=-- it's", "--height", "32", "--mixed_precision", "no", "--max_train_steps", "1"]
    train(tmp_path / "out", *flags, "--heldout_reward", "clip_score", "--feature_model", TINY_CLIP)
    printed = capsys.readouterr().out
    assert f"the adapter is {tmp_path / 'out' / LORA}" in printed
    words = shlex.split(re.search("to evaluate it: (python evaluate_rlr.py .*)", printed)[1])
    args = vars(evaluate_rlr.parse_args(words[2:]))
    ways = {
        "adapters": [str(tmp_path / "out")],
        "output_dir": f"{tmp_path}/out-evaluation",
        "negative_prompt": "-- it's",
    }
    trained = vars(parse_args([*BASE, *flags, "--feature_model", TINY_CLIP]))
    # The evaluation takes these from the model's family, which has the same as the script.
    assert (args.pop("guidance_scale"), trained.pop("guidance_scale")) == (None, tiny_model().guidance_scale)
    shared = {name: trained[name] for name in EVALUATION_FLAGS if name in trained and name != "reward"}
    assert args.items() >= {**shared, **ways}.items()
    # A default of training and not of the evaluation, which also scores what was not trained for.
    assert args["reward"] == "aesthetic,clip_score"


def test_a_comparison_without_memory_left_loses_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, torch\n\ndef red(images, prompts):\n"
        f"    if os.path.exists({str(tmp_path / 'out' / LORA)!r}):\n        raise torch.OutOfMemoryError('none left')\n"
        "    return images[:, 0].mean((1, 2))\n"
    )
    with pytest.raises(SystemExit, match="the comparison with the base model has failed: none left"):
        train(tmp_path / "out", "--reward", f"{tmp_path}/mine.py:red", "--num_eval_images", "2")
    assert (tmp_path / "out" / LORA).exists()


def test_prompts_are_shown_as_they_are_written_above_the_images(tmp_path):
    """Also those that matplotlib would take for formulas, or could not read as one."""
    images = {name: torch.rand(3, 3, 8, 8) for name in ("base", "tuned")}
    scores = {name: torch.rand(3) for name in images}
    plot_before_after(images, scores, [r"one of $5 or $6", r"$\frac$", "a {red} #_^ one"], tmp_path / "images.png")
    assert np.asarray(Image.open(tmp_path / "images.png")).std() > 5


def test_lines_below_the_images_are_drawn():
    images, scores = (
        {name: torch.zeros(1, 3, 8, 8) for name in ("base", "tuned")},
        {"base": torch.ones(1), "tuned": torch.ones(1)},
    )

    def drawn(below):
        file = io.BytesIO()
        plot_before_after(images, scores, ["a red one"], file, below)
        return np.asarray(Image.open(file).convert("RGB")).astype(int)

    plain, one, other = drawn([]), drawn(["mean red: base 1"]), drawn(["mean blue: base 2"])
    assert plain.shape[0] < one.shape[0] == other.shape[0]
    rows = np.flatnonzero(np.abs(one - other).any((1, 2)))
    assert len(rows) and rows.min() > 0.85 * len(one)
