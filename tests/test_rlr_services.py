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
"""Rewards that a server scores: a real server in a process of its own, and rude ones."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
import torch
from PIL import Image
from reward_models import load_reward, load_rewards, parse_reward, parse_reward_options
from reward_models.__main__ import main, parse_args
from reward_models.remote import TOKEN, ServiceError, Unreachable, from_json, to_json
from rlr_processes import fail_on_two_ranks, printed_by, start_run
from rlr_testing import ROOT, metrics_of, same_adapter, train


CODE = """
import os, time
import torch

calls = 0

def mean(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

def fickle(images, prompts):
    global calls
    calls += 1
    if "die" in prompts:
        os._exit(1)
    if "refuse" in prompts:
        raise ValueError("I will not")
    if "wait" in prompts:
        time.sleep(0.5)
    return torch.full((len(prompts),), float(calls)) if "count" in prompts else images.mean((1, 2, 3))

def check(prompts):
    if "me" in prompts:
        raise ValueError("not me")

fickle.check_prompts = check
mean.differentiable = fickle.differentiable = False
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """`python -m reward_models --serve` of the functions of `CODE`, which may be killed and started again."""

    def __init__(self, folder, *flags, names=("mean", "fickle"), **environment):
        (folder / "rewards.py").write_text(CODE)
        self.port, self.log = free_port(), folder / "server.log"
        served = ",".join(f"{folder}/rewards.py:{name}" for name in names)
        self.command = [sys.executable, "-m", "reward_models", "--serve", served, "--port", str(self.port), *flags]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = None

    def start(self):
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def wait(self):
        """Until it answers."""
        for _ in range(1200):
            try:
                httpx.post(self.url("mean"), timeout=5)
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/{name}"

    def options(self, name="mean", reward="remote", **others):
        return parse_reward_options(
            [f"{reward}.{key}={value}" for key, value in {"url": self.url(name), **others}.items()]
        )

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--max_body_mb", "0.2").start().wait()
    yield server
    server.kill()


class Rude(BaseHTTPRequestHandler):
    """Answers requests by the script of its server: {"status", "body", "delay"} one after the other, the last one always."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script = self.server.script
        answer = script.pop(0) if len(script) > 1 else script[0]
        self.server.seen.append(len(body["prompts"]))
        time.sleep(answer.get("delay", 0))
        content = answer.get("body", json.dumps({"scores": [0.5] * len(body["prompts"])})).encode()
        self.send_response(answer.get("status", 200))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def rude():
    """`rude(*script)` starts a server; returns it, with the options of a reward that asks it."""
    servers = []

    def start(*script):
        one = ThreadingHTTPServer(("127.0.0.1", 0), Rude)
        one.script, one.seen, one.daemon_threads = [{}, *script], [], True
        threading.Thread(target=one.serve_forever, daemon=True).start()
        servers.append(one)
        return one, {"url": f"http://127.0.0.1:{one.server_address[1]}/x"}

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


# What is sent


def png(side):
    """A black image as PNG in base64."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PNG_8, PNG_9, BOMB = png(8), png(9), png(8_500)


def test_images_arrive_as_they_are_or_rounded_to_8_bits():
    images, prompts = torch.rand(3, 3, 5, 7), ["a", "b", "ü"]
    for image_format, tolerance in (("raw", 0), ("png", 0.5 / 255 + 1e-6)):
        found, read = from_json(json.loads(json.dumps(to_json(images, prompts, image_format))))
        assert (found - images).abs().max() <= tolerance and read == prompts and found.dtype == torch.float32


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([], "must be an object"),
        ({"prompts": "a"}, "must be an object"),
        ({"prompts": []}, "a list of texts that is not empty"),
        ({"prompts": ["a"], "images": []}, "0 images with 1 prompts"),
        ({"prompts": ["\ud800"], "images": ["a"]}, "surrogates not allowed"),
        ({"prompts": ["a"], "images": [BOMB]}, "images of 72250000 pixels together are more than"),
        ({"prompts": ["a", "b"], "images": [PNG_8, PNG_9]}, "must be PNG files in base64, all of one size"),
        ({"prompts": ["a"], "images": ["%%"]}, "base64"),
        ({"prompts": ["a"], "shape": [1, 3, 2, 2], "float32": "AAAA"}, "size"),
        ({"prompts": ["a"], "shape": [1, 3, 1, 1], "float32": base64.b64encode(bytes(10) + b"\0@").decode()}, "0, 1"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused(body, problem):
    with pytest.raises(ValueError, match=problem):
        from_json(body)


# The server


def test_scores_are_those_of_the_reward_in_either_format(server):
    images, prompts = torch.rand(3, 3, 16, 20), ["a", "bb", "ccc"]
    expected = images.mean((1, 2, 3)) + torch.tensor([1.0, 2.0, 3.0])
    raw, png = (
        load_rewards(
            parse_reward("remote@A:2"), {}, options=server.options(reward="remote@A", format=one), size=(16, 20)
        )
        for one in ("raw", "png")
    )
    assert not raw.has_gradient
    torch.testing.assert_close(raw(images, prompts).members["remote@A"], expected)
    torch.testing.assert_close(png(images, prompts).total, 2 * expected, rtol=0, atol=5e-3)


def test_two_servers_are_two_rewards(server):
    options = server.options(reward="remote@A") | server.options("fickle", reward="remote@B")
    rewards = load_rewards(parse_reward("remote@A,remote@B:3"), {}, options=options, size=(8, 8))
    scores = rewards(torch.full((1, 3, 8, 8), 0.2), ["abc"])
    assert scores.total.item() == pytest.approx(3.2 + 3 * 0.2, abs=0.01)
    assert list(scores.members) == ["remote@A", "remote@B"]


def test_clients_at_once_lose_and_mix_up_nothing(server):
    """32 of them, each with images and prompts of its own, in parts."""

    def ask(i):
        reward = load_reward("remote", options={"url": server.url("mean"), "format": "raw"})
        images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        prompts = ["x" * (i + j) for j in range(4)]
        scores = torch.cat([reward(part, prompts[k : k + 2]) for k, part in zip((0, 2), images.split(2))])
        return scores, images.mean((1, 2, 3)) + torch.arange(i, i + 4)

    with ThreadPoolExecutor(32) as pool:
        for scores, expected in pool.map(ask, range(32)):
            torch.testing.assert_close(scores, expected.float(), rtol=1e-6, atol=1e-5)


def test_too_large_requests_are_refused(server):
    reward = load_reward("remote", options={"url": server.url("mean"), "format": "raw"})
    with pytest.raises(ServiceError, match="takes no larger requests: lower --reward_batch_size"):
        reward(torch.rand(2, 3, 128, 128), ["a", "b"])
    assert reward(torch.rand(1, 3, 32, 32), ["a"]).shape == (1,)


@pytest.mark.parametrize(
    ("name", "prompt", "problem"),
    [
        (
            "nothing",
            None,
            r"refuses the images \(404: there is no such reward, but mean, fickle\)",
        ),
        ("fickle", "refuse", r"refuses the images \(400: .*fickle.*I will not.*"),
    ],
)
def test_what_the_server_refuses_is_said(server, name, prompt, problem):
    with pytest.raises((ValueError, ServiceError), match=problem) as error:
        reward = load_reward("remote", options={"url": server.url(name)})
        reward(torch.rand(1, 3, 8, 8), [prompt])
    assert "\n" not in str(error.value)


def test_a_reward_whose_process_dies_is_started_again(server, caplog):
    reward = load_reward("remote", options={"url": server.url("fickle")})
    reward.patience = 0
    with pytest.raises(Unreachable, match="the process of the reward has died and is started again"):
        reward(torch.rand(1, 3, 8, 8), ["die"])
    reward.patience = 60
    assert reward(torch.full((1, 3, 8, 8), 0.2), ["live"]).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--serve", "motion", "--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: set a token"),
        (["--serve", "a.py:motion,motion"], "has two rewards of one name"),
        (["--serve", "beauty"], "unknown reward 'beauty'"),
        (["--serve", "motion", "--reward", "motion", "x.png"], "--serve scores no images of its own"),
        (["x.png"], "give images and --reward, or --serve"),
        (["--serve", "motion:2"], "--serve 'motion:2': weights belong to the sum of who asks"),
        (["--serve", "motion", "--reward_option", "vqa.answer=No"], "the reward 'vqa' is not in use"),
        (["--serve", "motion", "--port", "99999"], "--port 99999 is not in 1..65535"),
        (["--serve", "motion", "--max_body_mb", "inf"], "--max_body_mb inf is not above 0"),
    ],
)
def test_a_server_that_cannot_be_is_refused(flags, problem, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(SystemExit) as error:
        main(parse_args(flags))
    assert problem in f"{error.value} {capsys.readouterr().err}"


def test_a_token_that_no_header_can_hold_is_refused_and_an_empty_one_is_none(monkeypatch, rude):
    _, options = rude()
    for token in ("sécret", "two words", "line\nbreak"):
        monkeypatch.setenv(TOKEN, token)
        with pytest.raises(ValueError, match=f"the environment variable {TOKEN} holds other characters") as error:
            load_reward("remote", options=options)
        assert token not in str(error.value)
    monkeypatch.setenv(TOKEN, " ")
    assert "authorization" not in load_reward("remote", options=options).client.headers


def test_a_reward_that_cannot_be_loaded_ends_the_server_in_one_line(tmp_path):
    (tmp_path / "rewards.py").write_text(CODE)
    with pytest.raises(
        SystemExit, match=r"^python -m reward_models: error: --serve: reward .* has no callable 'nothing'$"
    ):
        main(parse_args(["--serve", f"{tmp_path}/rewards.py:nothing", "--port", str(free_port())]))


def test_requests_whose_clients_have_gone_are_not_scored(server):
    """Four clients that give up after a tenth of a second; the reward takes longer."""
    before = httpx.post(server.url("fickle"), json=to_json(torch.zeros(1, 3, 8, 8), ["count"], "raw")).json()[
        "scores"
    ][0]

    def give_up(i):
        with suppress(httpx.TimeoutException):
            httpx.post(server.url("fickle"), json=to_json(torch.zeros(1, 3, 8, 8), ["wait"], "raw"), timeout=0.1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(give_up, range(4)))
    after = httpx.post(server.url("fickle"), json=to_json(torch.zeros(1, 3, 8, 8), ["count"], "raw")).json()["scores"][
        0
    ]
    assert after - before <= 2  # itself, and the one that had begun


def test_prompts_that_a_server_refuses_are_refused_before_any_image(server):
    rewards = load_rewards(parse_reward("remote"), {}, options=server.options("fickle"), size=(8, 8))
    rewards.check_prompts(["a", "b"])
    with pytest.raises(ValueError, match=r"refuses the prompts \(.*refuses the prompts: ValueError: not me"):
        rewards.check_prompts(["a", "me"])
    other = load_rewards(parse_reward("remote"), {}, options=server.options("mean"), size=(8, 8))
    other.check_prompts(["a", "me"])


# The client


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"body": '{"scores": [1, 2, 3]}'}, "answers 3 scores for 2 images"),
        ({"body": '{"scores": 1}'}, "answers no list of scores for 2 images"),
        ({"body": '{"scores": [null, 1]}'}, "answers no list of scores for 2 images"),
        ({"body": "[1, 2]"}, "answers no list of scores"),
        ({"body": "<html>"}, "does not answer in JSON"),
        ({"status": 418, "body": "I am a\nteapot"}, r"refuses the images \(418: I am a teapot\)"),
    ],
)
def test_wrong_answers_are_refused_at_once(rude, answer, problem):
    server, options = rude(answer)
    reward = load_reward("remote", options=options)
    with pytest.raises(ServiceError, match=problem):
        reward(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert server.seen == [1, 2]


def test_errors_of_a_server_and_slow_answers_are_waited_for(rude, caplog, monkeypatch):
    """With pauses that grow, and one warning."""
    pauses = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr("reward_models.remote.time", clock)
    monkeypatch.setattr("reward_models.remote.random.uniform", lambda low, high: high)
    failing = {"status": 503, "body": '{"error": "loading"}'}
    server, options = rude({"delay": 0.6}, failing, {"status": 500}, {})
    reward = load_reward("remote", options={**options, "timeout": "0.3"})
    assert reward(torch.rand(2, 3, 8, 8), ["a", "b"]).tolist() == [0.5, 0.5]
    assert pauses == [1, 2, 4] and server.seen == [1, 2, 2, 2, 2]
    assert caplog.text.count("trying again for up to 600 seconds") == 1


def test_a_slow_server_is_given_up_after_the_time_that_it_may_take(rude):
    server, options = rude({"delay": 3})
    reward = load_reward("remote", options={**options, "timeout": "0.2"})
    reward.patience = 0.5
    with pytest.raises(Unreachable, match="has not answered within 0.2 seconds"):
        reward(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert len(server.seen) >= 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "it needs an address: --reward_option remote.url=http://HOST:PORT/NAME"),
        ({"url": "localhost:8000/x"}, "must be of the form http://HOST:PORT/NAME"),
        ({"url": "http://localhost:8000"}, "must be of the form http://HOST:PORT/NAME"),
        ({"url": "http://localhost:abc/x"}, "must be of the form http://HOST:PORT/NAME"),
        ({"url": "http://localhost:99999/x"}, "must be of the form http://HOST:PORT/NAME"),
        ({"url": "http://localhost/a\tb"}, "must be of the form http://HOST:PORT/NAME"),
        ({"url": "http://localhost/x?a=1"}, "must be of the form http://HOST:PORT/NAME"),
        ({"url": "http://localhost/x", "timeout": "1e12"}, "and at most a day"),
        ({"url": "http://me:secret@localhost/x"}, "must hold no password"),
        ({"url": "http://localhost/x", "timeout": "-1"}, "must be a number of seconds above 0"),
        ({"url": "http://localhost/x", "format": "jpeg"}, "must be one of png, raw"),
        ({"url": "http://127.0.0.1:9/x"}, "the server http://127.0.0.1:9/x cannot be reached"),
    ],
)
def test_addresses_without_a_server_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        load_reward("remote", options=options)


# Runs


def remote_flags(server, *others):
    return [
        "--reward",
        "remote",
        "--reward_option",
        f"remote.url={server.url('mean')}",
        "--max_train_steps",
        "4",
        *others,
    ]


def test_a_run_loses_nothing_when_its_server_goes(tmp_path, monkeypatch):
    """Killed in a step: the run ends with a checkpoint of the step before, and goes on with another server to the very
    adapter of a run that was not disturbed. The token is needed, and is in no log and no file. The processes of the rewards
    end with the server."""
    monkeypatch.setenv(TOKEN, "a-secret")
    server = Server(tmp_path, names=["mean"]).start().wait()
    try:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        flags = [
            "--num_eval_images",
            "0",
            "--heldout_reward",
            "remote",
            "--num_heldout_images",
            "4",
            "--heldout_steps",
            "3",
        ]
        flags += ["--feature_model", os.path.join(ROOT, "assets/tiny-aesthetic/clip")]
        train(whole, *remote_flags(server, *flags))
        process = start_run(parts, *remote_flags(server, *flags, "--reward_timeout", "0.5"), **{TOKEN: "a-secret"})
        while len(metrics_of(parts) if (parts / "metrics.jsonl").exists() else []) < 2:
            time.sleep(0.01)
        server.kill()
        process.join()
        assert process.exitcode == 1
        (message,) = [line for line in printed_by(parts).splitlines() if "error" in line]
        assert "cannot be reached" in message and "nothing is lost" in message
        steps = len(metrics_of(parts))
        assert 2 <= steps < 4 and (parts / f"checkpoint-{steps}").is_dir()

        server.start().wait()
        for token in ("", "another"):
            monkeypatch.setenv(TOKEN, token)
            with pytest.raises(ValueError, match=f"wants a token: set the environment variable {TOKEN}"):
                load_reward("remote", options=server.options()["remote"])
        monkeypatch.setenv(TOKEN, "a-secret")
        train(parts, *remote_flags(server, *flags, "--resume_from_checkpoint", "latest"))
        assert same_adapter(whole, parts)
        compared = ("reward_mean", "heldout_mean", "drift")
        lines = [
            [{key: line.get(key) for key in compared} for line in metrics_of(folder)] for folder in (whole, parts)
        ]
        assert lines[0] == lines[1] and lines[0][2]["heldout_mean"] is not None
        server.process.terminate()
        server.process.wait()
        wait_until_gone(server.process.pid)
    finally:
        server.kill()
    texts = [path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("a-secret" in text for text in texts) and server.url("mean") in server.log.read_text()


def wait_until_gone(group):
    """Until no process is left of a group."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the processes of the rewards are left")


def test_a_server_that_is_gone_for_one_rank_ends_both_with_a_checkpoint(server, tmp_path):
    """One prompt of six ends the process of the reward; in which step, the seed decides."""
    (tmp_path / "prompts.txt").write_text("\n".join(["live 1", "live 2", "live 3", "live 4", "live 5", "die"]))
    flags = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--train_batch_size",
        "1",
        "--reward",
        "remote",
        "--seed",
        "1",
    ]
    flags += [
        "--reward_option",
        f"remote.url={server.url('fickle')}",
        "--reward_timeout",
        "0.1",
        "--max_train_steps",
        "4",
    ]
    printed = fail_on_two_ranks(tmp_path / "out", *flags, "--num_eval_images", "0")
    steps = len(metrics_of(tmp_path / "out"))
    assert steps > 0 and printed.count("nothing is lost") == 2
    assert (tmp_path / "out" / f"checkpoint-{steps}" / "random_states_1.pkl").is_file()


def test_a_held_out_scoring_that_a_server_refused_is_made_up_for(tmp_path, rude):
    """When the run goes on, with a server at another address: its line is that of a run that was not disturbed."""
    flags = [
        "--heldout_reward",
        "remote",
        "--num_heldout_images",
        "4",
        "--heldout_steps",
        "2",
        "--max_train_steps",
        "4",
    ]
    flags += ["--feature_model", os.path.join(ROOT, "assets/tiny-aesthetic/clip"), "--decode_batch_size", "1"]

    def run(folder, *script, more=()):
        _, options = rude(*script)
        return train(tmp_path / folder, *flags, "--reward_option", f"remote.url={options['url']}", *more)

    whole = run("whole", {})
    # The prompts, and four images of the base model.
    with pytest.raises(SystemExit, match="nothing is lost"):
        run("parts", *[{}] * 5, {"status": 400})
    assert [line["step"] for line in metrics_of(tmp_path / "parts")] == [1]
    parts = run("parts", {}, more=["--resume_from_checkpoint", "latest"])
    compared = [
        [(line["step"], line.get("heldout_mean"), line.get("drift")) for line in one] for one in (whole, parts)
    ]
    assert compared[0] == compared[1] and compared[0][1][1] == 0.5
    assert same_adapter(tmp_path / "whole", tmp_path / "parts")
