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
"""The output folder: no run, and nobody's file, is overwritten by accident."""

import os
import resource
import shutil

import pytest
from rlr_testing import BASE, DIGITS, LORA, train
from rlr_training.output_dir import check_output_dir, check_writable
from rlr_training.processes import LOCKS, lock, unlock
from train_rlr_sd import main, parse_args


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(tmp_path):
    train(tmp_path, "--max_train_steps", "1")
    before = {name: (tmp_path / name).read_bytes() for name in (LORA, "metrics.jsonl", "training_args.json")}
    with pytest.raises(SystemExit, match="already holds a run: use another folder, continue it with --resume"):
        train(tmp_path, "--max_train_steps", "1")
    shutil.rmtree(tmp_path / "checkpoint-1")  # then there is an adapter, and no checkpoint to resume from
    with pytest.raises(SystemExit, match="already holds a run: use another folder, train its adapter further in"):
        train(tmp_path, "--max_train_steps", "1")
    # Errors in the input are reported first.
    with pytest.raises(SystemExit, match="no such file"):
        train(tmp_path, "--prompts", "nowhere.txt")
    with pytest.raises(SystemExit, match="cannot be loaded"):
        train(tmp_path, "--pretrained_model_name_or_path", "/nowhere")
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_folder_that_another_process_runs_in_is_refused(tmp_path):
    """The launcher may have ended, and the run that it has left behind not yet."""
    lock(tmp_path)
    lock(tmp_path)  # by the same process, as in a notebook
    held = LOCKS.pop(os.path.realpath(tmp_path))
    with pytest.raises(ValueError, match="a run is still writing into it; after Ctrl-C it finishes a step"):
        lock(tmp_path)
    held.release()
    lock(tmp_path)
    unlock(tmp_path)  # as a run that ends
    assert not os.path.exists(held.lock_file) and os.path.realpath(tmp_path) not in LOCKS


def check(folder, *flags, resume_path=None):
    check_output_dir(parse_args([*BASE, "--output_dir", str(folder), *flags]), resume_path)


def save_checkpoint_in(folder):
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "rlr_state.json").write_text("{}")


@pytest.mark.parametrize("name", ["README.md", "checkpoint-2/model.safetensors"])
@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]])
def test_files_of_others_are_not_replaced(tmp_path, name, flags):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"holds '{name.split('/')[0]}', .*use another folder"):
        check(tmp_path, *flags)


def test_a_folder_with_a_run_is_resumed_or_overwritten_if_the_command_says_so(tmp_path):
    save_checkpoint_in(tmp_path)
    for name in (LORA, "README.md", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        ValueError,
        match="already holds a run: use another folder, continue it with --resume_from_checkpoint latest, or start afresh"
        " with --overwrite_output_dir",
    ):
        check(tmp_path)
    check(tmp_path, "--overwrite_output_dir")
    check(tmp_path, resume_path=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="already holds a run"):
        check(tmp_path, resume_path=str(tmp_path / "elsewhere" / "checkpoint-2"))


def test_latest_starts_afresh_where_a_killed_run_has_left_only_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew')
    check(tmp_path, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="already holds a run: use another folder, or start afresh"):
        check(tmp_path)
    (tmp_path / LORA).write_text("")
    with pytest.raises(ValueError, match="already holds a run"):
        check(tmp_path, "--resume_from_checkpoint", "latest")


def test_a_folder_with_unrelated_files_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-final").mkdir()
    check(tmp_path)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (DIGITS, "cannot be a folder: '.*digits.txt' is a file"),
        (f"{DIGITS}/a/b", "cannot be a folder: '.*digits.txt' is a file"),
        ("/proc", "cannot be written to: No such file"),  # where not even root may write
        ("/proc/a/b", "cannot be written to: No such file"),
    ],
)
def test_a_folder_that_cannot_be_made_or_written_to_is_refused_before_anything_is_loaded(folder, message):
    with pytest.raises(ValueError, match=f"^--output_dir '{folder}' {message}"):
        check_writable(folder)
    flags = ["--output_dir", folder, "--pretrained_model_name_or_path", "/nowhere"]
    with pytest.raises(SystemExit, match=f"^train_rlr_sd.py: error: --output_dir '{folder}' {message}"):
        main(parse_args([*BASE, *flags]))


def test_a_folder_without_space_is_refused_and_a_writable_one_is_left_as_it_is(tmp_path):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="cannot be a folder: .*link' is a file"):
        check_writable(tmp_path / "link")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot be written to: File too large$"):
            check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_validation_images_are_kept_by_a_resumed_run_and_removed_by_one_that_overwrites(tmp_path):
    flags = ["--validation_prompts", "a red one", "--num_validation_images", "1"]
    train(tmp_path, *flags, "--max_train_steps", "1")
    train(tmp_path, *flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    (tmp_path / "validation" / "mine.png").touch()
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {"step-000001", "step-000002", "mine.png"}
    train(tmp_path, *flags, "--max_train_steps", "1", "--overwrite_output_dir")
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {"step-000001", "mine.png"}


def test_a_full_disk_at_the_end_is_reported_in_one_line(tmp_path):
    """The reward curve, which is written after the adapter, finds no space."""
    (tmp_path / "reward_curve.png").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="error: step 1: cannot write '.*reward_curve.png': .*No space left") as stop:
        train(tmp_path, "--max_train_steps", "1")
    assert "\n" not in stop.value.code and (tmp_path / LORA).exists()
