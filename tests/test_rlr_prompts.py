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

import pytest
import torch
from rlr_utils import PromptEmbeds, PromptSampler, load_levels, load_prompts
from rlr_utils.prompts import expand


def test_built_in_prompts():
    prompts = load_prompts("simple_animals")
    assert len(prompts) == len(set(prompts)) >= 40
    assert "a cat" in prompts and "an owl" in prompts
    activities = load_prompts("activities")
    assert len(activities) == len(set(activities)) == 10 * len(prompts) and "a fox baking bread" in activities


def test_a_file_is_read_line_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa caf\u00e9\r\n\r\n  a red seven  \n".encode())
    assert load_prompts(str(file)) == ["a caf\u00e9", "a red seven"]


@pytest.mark.parametrize(
    "content, message", [(b" \n\n", "no prompt"), (b"caf\xe9\0\n", "not UTF-8"), (None, "no such file")]
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(file))
    assert str(file) in str(error.value)


def test_other_encodings_are_read_and_said(tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a café\r\n".encode("utf-16"))
    assert load_prompts(str(file)) == ["a café"] and not caplog.text
    file.write_bytes("a café\n“a fox”\n".encode("cp1252"))
    assert load_prompts(str(file)) == ["a café", "“a fox”"]
    assert "not UTF-8 (invalid continuation byte at byte 5), read as Windows-1252" in caplog.text


def test_empty_and_repeated_prompts_are_left_out_and_said(tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\na cat\n a fox \n\n\n")
    with caplog.at_level("INFO"):
        assert load_prompts(str(file)) == ["a fox", "a cat"]
    assert "2 prompts; left out: 3 empty, 1 repeated" in caplog.text


def test_templates_stand_for_all_their_prompts():
    assert expand("a {red|blue} {cat|small dog}") == ["a red cat", "a red small dog", "a blue cat", "a blue small dog"]
    assert expand("a {very |}big {cat}") == ["a very big {cat}", "a big {cat}"]
    with pytest.raises(ValueError, match="stands for 1,048,576 prompts"):
        expand("{a|b}" * 20)


LEVELS = {"prompt": "a  fox", "coarse": "an animal", "mid": "a fox in snow", "fine": "fur of a fox"}


def test_a_jsonl_file_may_hold_a_chain_of_thought(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, [LEVELS, {"prompt": "a {red|blue} cat", "source": "me"}])) + "\n\n")
    assert load_prompts(str(file)) == ["a fox", "a red cat", "a blue cat"]
    assert load_levels(str(file)) == {"a fox": ("an animal", "a fox in snow", "fur of a fox")}
    assert load_levels("simple_animals") == {}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a fox"', "line 2 is no JSON"),
        ('["a fox"]', 'line 2 is no object with a text "prompt"'),
        ('{"prompt": 3}', 'line 2 is no object with a text "prompt"'),
        ('{"prompt": "a fox", "coarse": "x"}', "'a fox' needs all of coarse, mid, fine"),
        ('{"prompt": "a fox", "coarse": "x", "mid": 1, "fine": "y"}', "'a fox' needs all of coarse, mid, fine"),
        ('{"prompt": "a {b|c}", "coarse": "x", "mid": "z", "fine": "y"}', "is a template, which cannot have levels"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(LEVELS) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(file))
        load_levels(str(file))
    assert str(file) in str(error.value)


def test_every_pass_meets_every_prompt_once_in_another_order():
    sampler = PromptSampler([str(i) for i in range(10)], seed=0)
    passes = [sampler.next_batch(10) for _ in range(3)]
    assert all(sorted(p, key=int) == sampler.prompts for p in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_prompt_may_come_several_times_in_a_row():
    sampler = PromptSampler(["a", "b", "c"], seed=0, images_per_prompt=4)
    drawn = sampler.next_batch(12)
    assert [len(set(drawn[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and set(drawn) == {"a", "b", "c"}


def test_every_prompt_is_encoded_once_while_it_is_kept():
    encoded, encoder = [], torch.nn.Linear(1, 2)

    def encode(prompt):
        encoded.append(prompt)
        states = encoder(torch.full((1, 3, 1), float(ord(prompt))))
        return states, states.mean(1)

    embeds_of = PromptEmbeds(encode, [encoder], "cpu", max_prompts=2)
    states, pooled = embeds_of(["a", "b", "a"])
    assert encoded == ["a", "b"] and not states.requires_grad
    torch.testing.assert_close(states, torch.cat([encode(prompt)[0] for prompt in "aba"]).detach())
    torch.testing.assert_close(pooled, states.mean(1))
    encoded.clear()
    embeds_of(["b", "c"])  # for which the oldest goes
    embeds_of(["b", "c"])
    assert encoded == ["c"]
    embeds_of(["a"])
    assert encoded == ["c", "a"]


def test_ranks_share_a_pass_and_a_run_resumes_where_it_was():
    prompts = [str(i) for i in range(12)]
    ranks = [PromptSampler(prompts, seed=1, rank=rank, num_ranks=2) for rank in range(2)]
    drawn = [rank.next_batch(3) for _ in range(2) for rank in ranks]
    single = PromptSampler(prompts, seed=1)
    assert sum(drawn, []) == single.next_batch(12)
    resumed = PromptSampler(prompts, seed=1)
    resumed.position = 12
    assert resumed.next_batch(7) == single.next_batch(7)
