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
"""Checkpoints and resuming: a resumed run ends in the weights of one that was never interrupted."""

import json
import os
import shutil
from types import SimpleNamespace

import accelerate.utils
import pytest
import torch
from rlr_testing import BASE, LORA, TINY_CLIP, metrics_of, same_adapter, train
from rlr_training.checkpoints import check_same_run, configuration, save_checkpoint
from rlr_training.errors import RunError
from safetensors.torch import load_file, save_file
from train_rlr_sd import parse_args


HELD_OUT = ["--heldout_reward", "clip_score", "--heldout_steps", "1", "--num_heldout_images", "8"]
HELD_OUT += ["--feature_model", TINY_CLIP]


def checkpoints(directory):
    """All that looks like a checkpoint, also what should not be there: a partial one."""
    return {name for name in os.listdir(directory) if name.startswith(("checkpoint", "partial"))}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The output folder of four steps with checkpoints after the second and the fourth; copy it to change it."""
    folder = tmp_path_factory.mktemp("run") / "four_steps"
    train(folder, "--checkpointing_steps", "2", "--max_train_steps", "4")
    return folder


# With six steps those that are swept are drawn. With one image per step the baseline is the running mean of rewards, and
# ddpo divides by the largest deviation so far. The held-out reward falls from the first step on.
@pytest.mark.parametrize(
    "also",
    [
        ["--num_inference_steps", "6", "--train_batch_size", "3"],
        ["--train_batch_size", "1", "--lr_scheduler", "linear"],
        ["--gradient_estimator", "ddpo", "--baseline", "predicted_x0"],
        ["--gradient_estimator", "rlr_paper", "--subchain_length", "1"],
        [
            *("--reward", "jpeg_compressibility:-1", "--learning_rate", "0.3", "--ema_decay", "0.5", *HELD_OUT),
            *("--early_stop_patience", "3"),
        ],
    ],
    ids=lambda flags: " ".join(flags[:4]),
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, also):
    flags = ["--checkpointing_steps", "2", "--max_train_steps", "4", "--learning_rate", "1e-3", *also]
    straight = train(tmp_path / "straight", *flags)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for name in checkpoints(tmp_path / "resumed") - {"checkpoint-2"}:
        shutil.rmtree(tmp_path / "resumed" / name)
    resumed = train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    # Early stopping counts the two scorings before the checkpoint.
    assert [line["step"] for line in resumed] == ([1, 2, 3] if "--heldout_reward" in also else [1, 2, 3, 4])
    times = {"seconds", "images_per_second"}
    for a, b in zip(straight, resumed):
        assert {key: a[key] for key in a.keys() - times} == {key: b[key] for key in b.keys() - times}
    assert len(straight) == len(resumed) and same_adapter(tmp_path / "straight", tmp_path / "resumed")
    if "--ema_decay" in also:
        assert same_adapter(tmp_path / "straight" / "ema", tmp_path / "resumed" / "ema")
        assert not same_adapter(tmp_path / "straight", tmp_path / "straight" / "ema")
    if "--heldout_reward" in also:
        assert straight[-1]["drift"] > 0  # from the base model, not from the adapter of the checkpoint


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    flags = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    train(tmp_path, *flags, "--max_train_steps", "3")
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-3"}
    # The adapter is in it, and not the whole network.
    assert {LORA, "optimizer.bin", "rlr_state.json"} <= set(os.listdir(tmp_path / "checkpoint-3"))
    assert not os.path.exists(tmp_path / "checkpoint-3" / "model.safetensors")
    train(tmp_path, *flags, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert checkpoints(tmp_path) == {"checkpoint-3", "checkpoint-4"}


def test_a_run_resumes_from_a_checkpoint_by_its_name_and_removes_it_as_diffusers_does(tmp_path, four_steps):
    out = tmp_path / "out"
    shutil.copytree(four_steps, out)
    flags = ["--resume_from_checkpoint", "checkpoint-4", "--checkpoints_total_limit", "2"]
    metrics = train(out, "--checkpointing_steps", "2", "--max_train_steps", "8", *flags)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert checkpoints(out) == {"checkpoint-6", "checkpoint-8"}


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path, four_steps):
    out = tmp_path / "out"
    shutil.copytree(four_steps, out)
    path = out / "checkpoint-4" / "rlr_state.json"
    state = json.loads(path.read_text())
    del state["transport"], state["clipping"]
    path.write_text(json.dumps(state))
    with pytest.raises(SystemExit, match="cannot resume .* earlier version, which did not keep clipping, transport"):
        train(out, "--max_train_steps", "5", "--resume_from_checkpoint", "latest")


def test_a_checkpoint_of_a_script_with_more_flags_is_resumed_if_it_did_not_use_them(tmp_path):
    config = configuration(parse_args([]), 1)
    before = {**config, "zo_scale": 0.02, "subchain_sampling": "uniform", "baseline_steps": None, "local_rank": 3}
    before.update(memory_budget_gb=24.0, enable_xformers_memory_efficient_attention=False, use_dora=False)
    (tmp_path / "rlr_state.json").write_text(json.dumps({"config": before}))
    check_same_run(config, str(tmp_path))
    (tmp_path / "rlr_state.json").write_text(json.dumps({"config": {**before, "zo_scale": 0.5}}))
    with pytest.raises(ValueError, match="configuration: zo_scale was 0.5 and is None;"):
        check_same_run(config, str(tmp_path))
    (tmp_path / "rlr_state.json").write_text(json.dumps({"config": {**before, "use_dora": True}}))
    with pytest.raises(ValueError, match="configuration: use_dora was True and is None;"):
        check_same_run(config, str(tmp_path))


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(tmp_path, four_steps):
    out = tmp_path / "out"
    shutil.copytree(four_steps, out)
    before = {name: (out / name).read_bytes() for name in (LORA, "metrics.jsonl", "README.md")}
    (out / "checkpoint-final").mkdir()
    (out / "checkpoint-9").mkdir()  # not whole: it does not count as the latest
    flags = ["--max_train_steps", "6", "--resume_from_checkpoint"]
    for bad, message in (
        (["--max_train_steps", "3", "--resume_from_checkpoint", "latest"], "--max_train_steps 3 ends before"),
        ([*flags, "checkpoint-2"], "'.*checkpoint-4' is newer"),
        ([*flags, "checkpoint-9"], "does not exist; whole checkpoints in .*: checkpoint-2, checkpoint-4"),
        ([*flags, "latest", "--num_inference_steps", "4"], "configuration: num_inference_steps was 3 and is 4;"),
        (
            [*flags, "latest", "--rank", "2", "--seed", "1"],
            "another configuration: rank was 4 and is 2; seed was 0 and",
        ),
        ([*flags, "latest", "--scale_lr"], "scale_lr was False and is True"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(out, *bad)
        assert before == {name: (out / name).read_bytes() for name in before}


def test_a_run_resumes_in_another_folder_if_there_is_no_run_in_it(tmp_path, four_steps):
    point = ["--resume_from_checkpoint", str(four_steps / "checkpoint-4"), "--max_train_steps", "5"]
    assert [line["step"] for line in train(tmp_path, *point)] == [5]
    with pytest.raises(SystemExit, match="'.*checkpoint-5' is newer"):
        train(tmp_path, *point, "--max_train_steps", "7")
    assert len(metrics_of(tmp_path)) == 1


def test_a_finished_run_is_extended_as_if_it_had_been_longer(tmp_path):
    flags = ["--num_inference_steps", "6", "--learning_rate", "1e-3", "--checkpointing_steps", "500"]
    train(tmp_path / "longer", *flags, "--max_train_steps", "4")
    train(tmp_path / "extended", *flags, "--max_train_steps", "2")
    assert checkpoints(tmp_path / "extended") == {"checkpoint-2"}
    train(tmp_path / "extended", *flags, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert same_adapter(tmp_path / "longer", tmp_path / "extended")
    # The same command again has nothing left to do.
    again = train(tmp_path / "extended", *flags, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert len(again) == 4 and same_adapter(tmp_path / "longer", tmp_path / "extended")


def without_a_key(path):
    """A file of the same format whose content lacks an entry."""
    if path.suffix == ".json":
        state = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in state.items() if key != "position"}))
    elif path.suffix == ".safetensors":
        save_file(dict(list(load_file(path).items())[1:]), path)
    else:
        lacking = {"optimizer.bin": "state", "scheduler.bin": "last_epoch", "random_states_0.pkl": "random_state"}
        torch.save({k: v for k, v in accelerate.utils.load(path).items() if k != lacking[path.name]}, path)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other type": lambda path: path.write_text("[1, 2]"),
    "missing key": without_a_key,
}
PARTS = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "rlr_state.json", LORA, "ema.safetensors"]


@pytest.fixture(scope="module")
def averaged_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "averaged"
    flags = ["--checkpointing_steps", "1", "--ema_decay", "0.5"]
    train(folder, *flags, "--max_train_steps", "2")
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_with_a_damaged_part_is_refused_by_its_name_and_nothing_changes(tmp_path, averaged_steps, part):
    """accelerate itself goes on without the random states, and the run is another one."""
    for name, damage in DAMAGES.items():
        out = tmp_path / name
        shutil.copytree(averaged_steps, out)
        damage(out / "checkpoint-2" / part)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        if name == "missing" and part == "rlr_state.json":
            continue  # an unfinished checkpoint: the one before is the latest
        with pytest.raises(SystemExit, match="^train_rlr_sd.py: error: cannot resume from '.*checkpoint-2': ") as stop:
            train(out, "--ema_decay", "0.5", "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
        assert "\n" not in stop.value.code
        if name != "missing key":  # that is noticed when the part is loaded
            assert part in stop.value.code
        if name in ("missing", "empty", "truncated") and part != "rlr_state.json":
            older = str(out / "checkpoint-1")
            assert f"{part} is {'missing' if name == 'missing' else 'damaged'}" in stop.value.code
            assert f"move it away to continue from {older!r}, which is whole" in stop.value.code
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_where_no_checkpoint_is_whole_that_is_said(tmp_path, averaged_steps):
    out = tmp_path / "out"
    shutil.copytree(averaged_steps, out)
    for step in (1, 2):
        (out / f"checkpoint-{step}" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="optimizer.bin is damaged; no older checkpoint is whole$"):
        train(out, "--ema_decay", "0.5", "--max_train_steps", "3", "--resume_from_checkpoint", "latest")


def test_an_unfinished_line_of_a_killed_run_is_removed(tmp_path, four_steps):
    out = tmp_path / "out"
    shutil.copytree(four_steps, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    resumed = train(out, "--resume_from_checkpoint", "latest", "--max_train_steps", "5")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5]


def test_the_precision_of_accelerates_configuration_is_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tmp_path, "--checkpointing_steps", "1", "--max_train_steps", "1")
    assert json.loads((tmp_path / "training_args.json").read_text())["mixed_precision"] == "bf16"
    assert "--mixed_precision bf16" in (tmp_path / "README.md").read_text()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(SystemExit, match="configuration: mixed_precision was 'bf16' and is 'no';"):
        train(tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")


@pytest.mark.parametrize("held_out", [[], HELD_OUT], ids=["", "held_out"])
def test_validation_prompts_may_change_on_resume_unless_held_out_images_are_of_them(tmp_path, held_out):
    before, after = (
        configuration(parse_args([*BASE, *held_out, *flags]), 1)
        for flags in ([], ["--validation_prompts", "a red one"])
    )
    (tmp_path / "rlr_state.json").write_text(json.dumps({"config": before}))
    if not held_out:
        check_same_run(after, tmp_path)
        return
    with pytest.raises(ValueError, match="validation_prompts was None and is .'a red one'.;"):
        check_same_run(after, tmp_path)


def test_ranks_with_different_adapters_are_not_saved(tmp_path):
    accelerator = SimpleNamespace(gather=lambda values: torch.cat([values, values + 1]))
    with pytest.raises(RunError, match=r"the ranks' adapters differ, \[4.0, 5.0\]"):
        save_checkpoint(accelerator, SimpleNamespace(output_dir=tmp_path), 1, [torch.nn.Parameter(torch.ones(4))])
    assert not os.listdir(tmp_path)
