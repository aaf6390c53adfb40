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
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dcot import main as measure
from make_dcot_prompts import MAX_WORDS, levels_in, main
from rlr_testing import TINY_CLIP
from rlr_training.prompts import load_levels
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel


GOOD = {"coarse": "an animal in the middle", "mid": "a fox that sits", "fine": "red  fur in snow"}


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint on the loopback interface that returns the entries of `answers` in order."""
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": answers.pop(0)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answers, asked
    server.shutdown()


def test_an_endpoint_writes_only_missing_prompts(tmp_path, endpoint, capsys):
    url, answers, asked = endpoint
    (tmp_path / "prompts.txt").write_text("a fox\na cat\nan owl\n")
    output = tmp_path / "levels.jsonl"
    own = json.dumps({"prompt": "a cat", "coarse": "mine", "mid": "mine", "fine": "mine"}) + "\n"
    output.write_text(own)
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(output), "--endpoint", url, "--model", "m"]
    answers += [f"Certainly!\n```json\n{json.dumps(GOOD)}\n```", "I cannot.", '{"coarse": "an owl"}', "{broken}"]
    with pytest.raises(SystemExit, match="no good answer for 1 of 3 prompts"):
        main(flags)
    assert "'an owl': no JSON object in the answer '{broken}'" in capsys.readouterr().err
    assert output.read_text().startswith(own) and len(output.read_text().splitlines()) == 2
    assert "a fox" in asked[0]["messages"][0]["content"] and asked[0]["model"] == "m"
    answers.append(json.dumps(GOOD))
    main(flags)
    load_levels.cache_clear()
    levels = load_levels(str(output))
    assert levels == {name: tuple(" ".join(GOOD[level].split()) for level in GOOD) for name in ("a fox", "an owl")} | {
        "a cat": ("mine",) * 3
    }
    main(flags)  # nothing is left to ask for
    assert len(asked) == 5 and not answers


@pytest.mark.parametrize(
    "answer, message",
    [
        ("", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ('{"coarse": "a", "mid": "b"}', "no text for 'fine'"),
        ('{"coarse": "a", "mid": "", "fine": "c"}', "no text for 'mid'"),
        (json.dumps({**GOOD, "fine": "word " * (MAX_WORDS + 1)}), f"'fine' has {MAX_WORDS + 1} words"),
    ],
)
def test_bad_answers_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        levels_in(answer)


def test_a_local_model_with_bad_answers_writes_nothing(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY_CLIP)
    tokenizer.save_pretrained(tmp_path / "model")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=2048, **ids)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    flags = ["--output", str(tmp_path / "levels.jsonl"), "--model", str(tmp_path / "model"), "--max_new_tokens", "5"]
    (tmp_path / "prompts.txt").write_text("a fox\n")
    with pytest.raises(SystemExit, match="no good answer for 1 of 1 prompts"):
        main(["--prompts", str(tmp_path / "prompts.txt"), *flags, "--tries", "1"])
    assert not (tmp_path / "levels.jsonl").exists()
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        main(["--prompts", str(tmp_path / "prompts.txt"), *flags, "--model", str(tmp_path / "nowhere")])


def test_a_file_with_an_unfinished_last_line_is_refused(tmp_path, endpoint):
    (tmp_path / "prompts.txt").write_text("a fox\n")
    output = tmp_path / "levels.jsonl"
    output.write_text('{"prompt": "a cat"}')
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(output), "--endpoint", endpoint[0]]
    with pytest.raises(SystemExit, match="the last line of .* is unfinished"):
        main([*flags, "--model", "m"])
    assert output.read_text() == '{"prompt": "a cat"}'


def test_quick_dcot_trains_with_and_without_levels(tmp_path, capsys):
    rows = measure(["--quick", "--workers", "0", "--out", str(tmp_path)])
    assert [(row["chain_of_thought"], row["fine_range"]) for row in rows] == [
        *((False, False), (True, False)),
        *((False, True), (True, True)),
    ]
    plain, thought = rows[:2]
    assert plain["base"] == rows[2]["base"] != thought["base"]  # the base model is evaluated with the levels, too
    assert "chain of thought, fine range" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"dcot.csv", "dcot.png"}
