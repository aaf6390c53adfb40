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
"""What a run survives: kills, signals, a full disk, and failures of one rank of several."""

import json
import os
import random
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from rlr_processes import printed_by, run, run_two_ranks, start_run, torchrun
from rlr_testing import BASE, LORA, metrics_of, same_adapter, train
from rlr_training.checkpoints import checkpoints_of
from rlr_training.output_dir import check_output_dir, clear_run
from rlr_training.processes import stopping_after_a_step
from safetensors.torch import load_file
from train_rlr_sd import TRACKER, main, parse_args


FLAGS = ["--learning_rate", "1e-3", "--checkpointing_steps", "1", "--max_train_steps", "4"]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The output folder of four steps with `FLAGS`, which nothing has interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    train(folder, *FLAGS)
    return folder


def killed_after(step, straight, folder):
    """Make `folder` what the run `straight` would have left had it been killed after a checkpoint, one step later."""
    shutil.copytree(straight, folder)
    for path in folder.iterdir():
        if path.name not in {"metrics.jsonl", "training_args.json", *(f"checkpoint-{i}" for i in range(1, step + 1))}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]))


def steps_of(folder):
    return [line["step"] for line in metrics_of(folder)]


@pytest.mark.parametrize(
    "kills",
    [3, pytest.param(20, marks=pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="slow: RUN_SLOW=1"))],
)
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, kills):
    """SIGKILL at random moments, and every second time while a checkpoint is being written that is not the first."""
    num_steps, out, straight = 6 * kills + 2, tmp_path / "killed", tmp_path / "straight"
    flags = ["--max_train_steps", str(num_steps), "--checkpointing_steps", "2", "--learning_rate", "1e-3"]
    flags += ["--baseline", "per_prompt", "--images_per_prompt", "2", "--checkpoints_total_limit", "2"]
    # These draw from the generators of each rank, and keep a moving average.
    flags += ["--gradient_estimator", "rlr_paper", "--num_inference_steps", "6", "--ema_decay", "0.9"]
    flags += ["--sweep_fraction", "0.5", *RESUME]
    run(straight, *flags)

    rng, interrupted_saves = random.Random(kills), 0
    for kill in range(kills):
        before = max(checkpoints_of(out), default=0)
        process = start_run(out, *flags)
        if kill % 2 == 0:
            while process.is_alive() and max(checkpoints_of(out), default=0) == before:
                time.sleep(0.0005)
            while process.is_alive() and not any(name.startswith("partial-") for name in os.listdir(out)):
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, 3))  # while it loads, or in its first steps
        assert process.is_alive(), printed_by(out)
        process.kill()
        process.join()
        interrupted_saves += any(name.startswith("partial-") for name in os.listdir(out))
    assert interrupted_saves > 0 and max(checkpoints_of(out)) >= kills and not (out / LORA).exists()
    run(out, *flags)
    assert "Traceback" not in printed_by(out)
    assert same_adapter(straight, out) and same_adapter(straight / "ema", out / "ema")
    assert steps_of(out) == list(range(1, num_steps + 1))
    for key in ("reward_mean", "grad_norm", "gamma_mean"):
        assert [line[key] for line in metrics_of(out)] == [line[key] for line in metrics_of(straight)]
    checkpoints = {f"checkpoint-{num_steps - 2}", f"checkpoint-{num_steps}"}
    for folder in (straight, out):
        assert {name for name in os.listdir(folder) if "-" in name} == checkpoints


def test_latest_ignores_incomplete_checkpoints_with_a_warning(tmp_path, straight, caplog):
    out = tmp_path / "out"
    killed_after(4, straight, out)
    os.remove(out / "checkpoint-4" / "rlr_state.json")
    (out / "partial-4").mkdir()
    train(out, *FLAGS, *RESUME)
    assert "'checkpoint-4' is incomplete and is ignored" in caplog.text
    assert "'partial-4' is incomplete and is ignored" in caplog.text
    assert steps_of(out) == [1, 2, 3, 4] and same_adapter(out, straight)
    assert (out / "checkpoint-4" / "rlr_state.json").exists() and not (out / "partial-4").exists()


def test_latest_without_a_checkpoint_starts_afresh_with_a_warning(tmp_path, straight, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "reward_mean"')  # killed before the first checkpoint
    metrics = train(out, *FLAGS, "--max_train_steps", "2", *RESUME)
    assert f"no checkpoint in {str(out)!r}, starting afresh" in caplog.text
    assert [line["reward_mean"] for line in metrics] == [line["reward_mean"] for line in metrics_of(straight)[:2]]
    # An adapter that is finished is not replaced in this way.
    shutil.rmtree(out / "checkpoint-1")
    shutil.rmtree(out / "checkpoint-2")
    args = parse_args([*BASE, "--output_dir", str(out), *RESUME])
    with pytest.raises(ValueError, match="already holds a run"):
        check_output_dir(args, None)
    os.remove(out / LORA)
    check_output_dir(args, None)


def test_length_and_outputs_may_change_on_resume_and_a_drawn_seed_stays(tmp_path):
    seed = BASE.index("--seed")
    flags = [*BASE[:seed], *BASE[seed + 2 :], "--output_dir", str(tmp_path), "--checkpointing_steps", "1"]
    main(parse_args([*flags, "--max_train_steps", "1"]))
    config = json.loads((tmp_path / "training_args.json").read_text())
    assert config["num_processes"] == 1 and config["resolution"] == 32 and "hub_token" not in config
    flags += [*RESUME, "--max_train_steps", "2", "--checkpointing_steps", "3"]
    main(parse_args([*flags, "--report_to", "tensorboard", "--num_eval_images", "2"]))
    assert json.loads((tmp_path / "training_args.json").read_text())["seed"] == config["seed"]
    assert steps_of(tmp_path) == [1, 2]


def test_a_run_that_was_killed_after_its_last_step_is_finished_on_resume(tmp_path, straight):
    killed_after(4, straight, tmp_path / "out")
    train(tmp_path / "out", *FLAGS, *RESUME)
    assert steps_of(tmp_path / "out") == [1, 2, 3, 4] and same_adapter(tmp_path / "out", straight)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path, straight):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    (out / "notes.txt").write_text("mine")
    (out / "partial-7").mkdir()
    (out / "checkpoint-7").mkdir()
    (out / "logs" / TRACKER).mkdir(parents=True)
    (out / "logs" / "others").mkdir()
    train(out, "--overwrite_output_dir", "--max_train_steps", "1")
    assert steps_of(out) == [1]
    assert (out / "notes.txt").read_text() == "mine" and (out / "logs" / "others").exists()
    assert [name for name in os.listdir(out) if name.startswith(("checkpoint-", "partial-"))] == ["checkpoint-1"]
    assert not (out / "logs" / TRACKER).exists()


@pytest.mark.parametrize(("name", "elsewhere"), [("out", "logs"), ("out", ".."), (TRACKER, "..")])
def test_overwriting_removes_no_logs_outside_of_the_folder(tmp_path, name, elsewhere):
    """With an absolute --logging_dir, with the folder above, and where the output folder has the tracker's name."""
    out = tmp_path / name
    logging_dir = ".." if elsewhere == ".." else str(tmp_path / elsewhere)
    out.mkdir()
    logs = (out / logging_dir / TRACKER).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "notes.txt").write_text("mine")
    (out / "metrics.jsonl").write_text("")
    clear_run(SimpleNamespace(output_dir=str(out), logging_dir=logging_dir), TRACKER)
    assert (logs / "notes.txt").read_text() == "mine" and not (out / "metrics.jsonl").exists()


STOPPED_REWARD = """
import os, signal

def stopped(images, prompts):
    \"\"\"Sends a signal twice, as torchrun does, when the run has a number of steps behind it.\"\"\"
    name, _, steps = os.environ.get("STOP_WITH", "").partition(" after ")
    if name and os.path.exists({metrics!r}) and len(open({metrics!r}).readlines()) == int(steps):
        del os.environ["STOP_WITH"]
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, name))
    return images.mean((1, 2, 3))

stopped.differentiable = True
"""


def test_ctrl_c_and_sigterm_save_a_checkpoint_and_say_how_to_continue(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "reward.py").write_text(STOPPED_REWARD.format(metrics=str(out / "metrics.jsonl")))
    flags = ["--reward", f"{tmp_path}/reward.py:stopped", "--max_train_steps", "5", "--learning_rate", "1e-3", *RESUME]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for name, last_step in (("SIGINT", 2), ("SIGTERM", 4)):
        monkeypatch.setenv("STOP_WITH", f"{name} after {last_step - 1}")
        message = f"^train_rlr_sd.py: stopped after step {last_step}; continue .* --resume_from_checkpoint latest$"
        with pytest.raises(SystemExit, match=message):
            train(out, *flags)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (out / f"checkpoint-{last_step}").exists() and not (out / LORA).exists()
    train(out, *flags)
    train(tmp_path / "straight", *flags)
    assert same_adapter(out, tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_signal_stops_at_once_unless_it_follows_immediately(number, monkeypatch):
    """torchrun passes on what the terminal has sent to the ranks already."""
    now, triggers, interruptions = [100.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def send():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            interruptions.append(now[0])

    before = signal.signal(number, lambda number, frame: None)  # without one it would end the tests
    try:
        with stopping_after_a_step(SimpleNamespace(is_main_process=True, set_trigger=lambda: triggers.append(now[0]))):
            for seconds in (0, 1, 3):
                now[0] = 100.0 + seconds
                send()
    finally:
        signal.signal(number, before)
    assert triggers == [100.0] and interruptions == [103.0]


def test_a_full_disk_loses_nothing(tmp_path, straight):
    """No file may grow beyond 20 kB, which is enough for the metrics but not for the state of an optimizer."""
    out = tmp_path / "out"
    killed_after(2, straight, out)
    before = {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="step 3: cannot write '.*partial-3': .*--resume_from_checkpoint") as stop:
            train(out, *FLAGS, *RESUME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in stop.value.code
    assert {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()} == before
    assert not any(name.startswith("partial-") for name in os.listdir(out))
    train(out, *FLAGS, *RESUME)
    assert same_adapter(out, straight)


def test_a_compiled_network_is_saved_and_resumed_like_another(tmp_path, straight, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train(tmp_path, *FLAGS, "--max_train_steps", "1")
    train(tmp_path, *FLAGS, "--max_train_steps", "2", *RESUME)
    plain, compiled = load_file(straight / "checkpoint-2" / LORA), load_file(tmp_path / LORA)
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], compiled[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "also",
    [
        ["--mixing", "0.5"],
        # Variances are those within a micro-batch, whether the next one is of another rank or of this one.
        ["--max_train_steps", "3", "--sweep_fraction", "1"],
        # The units of the rewards are of all images, too.
        [
            *("--gradient_estimator", "ddpo", "--baseline", "predicted_x0", "--reward", "aesthetic,clip_score"),
            *("--reward_normalize", "--reward_floor", "aesthetic:5"),
        ],
        # Three images of a prompt, one of which is drawn by the other rank.
        ["--baseline", "per_prompt", "--images_per_prompt", "3", "--mixing", "0.5"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_two_ranks_are_one_rank_with_twice_the_micro_batches(tmp_path, also):
    """The noise of an image does not depend on the rank that draws it, nor its advantage on the rank that sweeps it."""
    flags = ["--learning_rate", "1e-3", "--adam_epsilon", "1e-3", "--checkpointing_steps", "2", *also]
    batches = 2 if "--mixing" in also else 1
    one = train(tmp_path / "one", *flags, "--gradient_accumulation_steps", str(2 * batches))
    run_two_ranks(tmp_path / "two", *flags, "--gradient_accumulation_steps", str(batches))
    two = metrics_of(tmp_path / "two")
    assert len(two) == len(one) and all(line["num_images"] == 4 * batches for line in two)
    for a, b in zip(one, two):
        for key in ("reward_mean", "reward_std", "grad_norm", "gamma_mean"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    first, second = (load_file(tmp_path / name / LORA) for name in ("one", "two"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)


def test_a_reward_that_fails_on_one_rank_of_torchrun_ends_all(tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os\n\ncalls = 0\n\ndef failing(images, prompts):\n    global calls\n    calls += 1\n"
        "    if os.environ['RANK'] == '1' and calls > 5:\n        raise ValueError('the judge is ill')\n"
        "    return images.mean((1, 2, 3))\n\nfailing.differentiable = True\n"
    )
    result = torchrun(tmp_path / "out", "--reward", f"{tmp_path}/failing.py:failing", "--max_train_steps", "50")
    assert result.returncode != 0
    assert "train_rlr_sd.py: error: step 2: reward '" in result.stderr
    assert "failing.py:failing' fails: ValueError: the judge is ill (failing.py, line 9: raise" in result.stderr
    assert len(metrics_of(tmp_path / "out")) == 1
