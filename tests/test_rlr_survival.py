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
"""What a run survives: being killed or stopped, a full disk, other ranks. In each case it ends as if nothing had been."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from rlr_testing import BASE, LORA, ROOT, metrics_of, same_adapter, train
from safetensors.torch import load_file
from train_rlr_sd import main, parse_args


SCRIPT = os.path.join(ROOT, "train_rlr_sd.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}


@pytest.mark.parametrize(
    "kills",
    [3, pytest.param(20, marks=pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="slow: RUN_SLOW=1"))],
)
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, kills):
    """SIGKILL at random moments, every second time while a checkpoint is being written."""
    flags = [*BASE, "--max_train_steps", str(8 * kills), "--checkpointing_steps", "2", "--learning_rate", "1e-3"]
    flags += ["--baseline", "per_prompt", "--images_per_prompt", "2", "--checkpoints_total_limit", "2"]
    # With what draws from the generators of each rank, and a moving average.
    flags += ["--gradient_estimator", "rlr_paper", "--num_inference_steps", "6", "--ema_decay", "0.9"]
    flags += ["--sweep_fraction", "0.5"]
    command = [sys.executable, SCRIPT, *flags, "--resume_from_checkpoint", "latest", "--output_dir"]
    subprocess.run([*command, str(tmp_path / "straight")], env=ENVIRONMENT, check=True, capture_output=True)

    out, rng, interrupted_saves = tmp_path / "killed", random.Random(kills), 0
    for kill in range(kills):
        process = subprocess.Popen(
            [*command, str(out)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = (out / "metrics.jsonl").read_text() if out.exists() else ""
        while not out.exists() or (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text() == before:
            assert process.poll() is None
            time.sleep(0.01)
        if kill % 2 == 0:
            while process.poll() is None and not any(name.startswith("partial-") for name in os.listdir(out)):
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, 2))
        process.kill()
        process.wait()
        interrupted_saves += any(name.startswith("partial-") for name in os.listdir(out))
    assert interrupted_saves > 0
    last = subprocess.run([*command, str(out)], env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert same_adapter(tmp_path / "straight", out)
    assert same_adapter(tmp_path / "straight" / "ema", out / "ema")
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 8 * kills + 1))
    for key in ("reward_mean", "grad_norm", "gamma_mean"):
        assert [line[key] for line in metrics_of(out)] == [line[key] for line in metrics_of(tmp_path / "straight")]
    assert {name for name in os.listdir(out) if "-" in name} == set(os.listdir(tmp_path / "straight")) & {
        f"checkpoint-{8 * kills - 2}",
        f"checkpoint-{8 * kills}",
    }
    assert "Traceback" not in last.stderr


def test_latest_leaves_out_what_is_not_whole_and_says_so(tmp_path, caplog):
    train(tmp_path, "--checkpointing_steps", "1", "--max_train_steps", "2")
    os.remove(tmp_path / LORA)
    os.remove(tmp_path / "checkpoint-2" / "rlr_state.json")
    (tmp_path / "partial-2").mkdir()
    metrics = train(tmp_path, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest")
    assert "'checkpoint-2' is not whole" in caplog.text and "'partial-2' is not whole" in caplog.text
    assert [line["step"] for line in metrics] == [1, 2]
    assert (tmp_path / "checkpoint-2" / "rlr_state.json").exists() and not (tmp_path / "partial-2").exists()


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(tmp_path, caplog):
    straight = train(tmp_path / "straight")
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "reward_mean"')  # killed before the first checkpoint
    metrics = train(out, "--resume_from_checkpoint", "latest")
    assert f"no checkpoint in {str(out)!r}, starting afresh" in caplog.text
    assert [line["reward_mean"] for line in metrics] == [line["reward_mean"] for line in straight]
    # A finished adapter is not given up that way.
    before = (out / LORA).read_bytes()
    with pytest.raises(SystemExit, match="already holds a run"):
        train(out, "--resume_from_checkpoint", "latest")
    assert (out / LORA).read_bytes() == before


def test_what_may_change_on_resume_and_a_seed_that_was_drawn(tmp_path):
    seed = BASE.index("--seed")
    flags = BASE[:seed] + BASE[seed + 2 :]
    flags += ["--output_dir", str(tmp_path), "--checkpointing_steps", "2"]
    main(parse_args(flags))
    config = json.loads((tmp_path / "training_args.json").read_text())
    assert config["num_processes"] == 1 and config["resolution"] == 32 and "hub_token" not in config
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", "3", "--checkpointing_steps", "1"]
    main(parse_args([*flags, "--report_to", "tensorboard", "--num_eval_images", "2"]))
    assert json.loads((tmp_path / "training_args.json").read_text())["seed"] == config["seed"]
    assert len(metrics_of(tmp_path)) == 3


def test_a_run_that_has_done_its_steps_is_finished_on_resume(tmp_path):
    """Killed between the last checkpoint and the adapter."""
    train(tmp_path, "--checkpointing_steps", "2")
    before = load_file(tmp_path / LORA)
    os.remove(tmp_path / LORA)
    assert len(train(tmp_path, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest")) == 2
    after = load_file(tmp_path / LORA)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    train(tmp_path, "--checkpointing_steps", "1", "--report_to", "tensorboard")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "partial-7").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    metrics = train(tmp_path, "--overwrite_output_dir", "--max_train_steps", "1")
    assert [line["step"] for line in metrics] == [1]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not any(name.startswith(("checkpoint-", "partial-")) for name in os.listdir(tmp_path))
    assert not (tmp_path / "logs" / "rlr-sd").exists()


@pytest.mark.parametrize(("name", "elsewhere"), [("out", "logs"), ("out", ".."), ("rlr-sd", "..")])
def test_overwriting_removes_no_logs_outside_of_the_folder(tmp_path, name, elsewhere):
    """Of an absolute path, of the folder above, and where the folder has the name of the tracker's."""
    out = tmp_path / name
    logging_dir = ".." if elsewhere == ".." else str(tmp_path / elsewhere)
    logs = (out / logging_dir / "rlr-sd").resolve()
    train(out, "--max_train_steps", "1")
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "notes.txt").write_text("mine")
    train(out, "--max_train_steps", "1", "--overwrite_output_dir", "--logging_dir", logging_dir)
    assert (logs / "notes.txt").read_text() == "mine"


STOPPING_REWARD = """
import os, signal

calls = 0

def stopping(images, prompts):
    global calls
    calls += 1
    if calls == {call} and not os.path.exists({mark!r}):
        open({mark!r}, "w").close()
        for _ in range(2):  # as under torchrun
            os.kill(os.getpid(), signal.{signal})
    return images.mean((1, 2, 3))

stopping.differentiable = True
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, name):
    """In the third step, whose two pictures are scored one by one after two on trial."""
    text = STOPPING_REWARD.format(call=2 + 5, mark=str(tmp_path / "mark"), signal=name)
    (tmp_path / "stopping.py").write_text(text)
    flags = ["--reward", f"{tmp_path}/stopping.py:stopping", "--max_train_steps", "5", "--learning_rate", "1e-3"]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="stopped after step 3; go on with .*--resume_from_checkpoint latest"):
        train(tmp_path / "out", *flags)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "out" / "checkpoint-3").exists() and not (tmp_path / "out" / LORA).exists()
    train(tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")
    train(tmp_path / "straight", *flags)
    assert same_adapter(tmp_path / "out", tmp_path / "straight")


def test_a_full_disk_loses_nothing(tmp_path):
    """No file may grow beyond 20 kB, which the metrics do not need and an optimizer's state does."""
    flags = ["--checkpointing_steps", "2", "--learning_rate", "1e-3", "--max_train_steps", "4"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "full", *flags, "--max_train_steps", "2")
    before = {path.name: path.read_bytes() for path in (tmp_path / "full" / "checkpoint-2").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="step 4: cannot write '.*partial-4': .*--resume_from_checkpoint") as stop:
            train(tmp_path / "full", *flags, "--resume_from_checkpoint", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in stop.value.code
    assert {path.name: path.read_bytes() for path in (tmp_path / "full" / "checkpoint-2").iterdir()} == before
    assert not any(name.startswith("partial-") for name in os.listdir(tmp_path / "full"))
    train(tmp_path / "full", *flags, "--resume_from_checkpoint", "latest")
    assert same_adapter(tmp_path / "full", tmp_path / "straight")


def test_a_compiled_unet_is_saved_and_resumed_as_it_is(tmp_path, monkeypatch):
    flags = ["--learning_rate", "1e-3", "--checkpointing_steps", "1", "--num_inference_steps", "5"]
    train(tmp_path / "plain", *flags)
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train(tmp_path / "compiled", *flags, "--max_train_steps", "1")
    train(tmp_path / "compiled", *flags, "--resume_from_checkpoint", "latest")
    plain, compiled = (load_file(tmp_path / name / LORA) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], compiled[key], rtol=1e-3, atol=1e-5)


def torchrun(out, *flags, processes=2):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, SCRIPT, *BASE, "--output_dir", str(out), *flags]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "also",
    [
        ["--mixing", "0.5"],
        # Variances are those within a micro-batch, whether the next one is another rank's or this one's.
        ["--max_train_steps", "3", "--sweep_fraction", "1"],
        ["--gradient_estimator", "ddpo", "--baseline", "predicted_x0"],
        # Three pictures of a prompt, of which one is drawn by the other rank.
        ["--baseline", "per_prompt", "--images_per_prompt", "3", "--mixing", "0.5"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_two_ranks_are_one_rank_with_twice_the_micro_batches(tmp_path, also):
    """A picture's noise does not depend on the rank that draws it, nor its advantage on the rank that sweeps it."""
    flags = ["--learning_rate", "1e-3", "--adam_epsilon", "1e-3", "--checkpointing_steps", "2", *also]
    one = train(tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    assert torchrun(tmp_path / "two", *flags).returncode == 0
    two = metrics_of(tmp_path / "two")
    assert len(two) == len(one) and all(line["num_images"] == 4 for line in two)
    for a, b in zip(one, two):
        for key in ("reward_mean", "reward_std", "grad_norm", "gamma_mean"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    first, second = (load_file(tmp_path / name / LORA) for name in ("one", "two"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)


def test_a_reward_that_fails_on_one_rank_ends_all(tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os\n\ncalls = 0\n\ndef failing(images, prompts):\n    global calls\n    calls += 1\n"
        "    if os.environ['RANK'] == '1' and calls > 5:\n        raise ValueError('the judge is ill')\n"
        "    return images.mean((1, 2, 3))\n\nfailing.differentiable = True\n"
    )
    result = torchrun(tmp_path / "out", "--reward", f"{tmp_path}/failing.py:failing", "--max_train_steps", "50")
    assert result.returncode != 0
    assert "train_rlr_sd.py: error: step 2: reward '" in result.stderr
    assert "failing.py:failing' fails: ValueError: the judge is ill (failing.py, line 9)" in result.stderr
    assert len(metrics_of(tmp_path / "out")) == 1
