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
"""Options of rewards: NAME.OPTION=VALUE."""

from types import SimpleNamespace

import pytest
import torch
from reward_models import (
    REWARDS,
    load_reward,
    load_rewards,
    options_in_help,
    parse_reward,
    parse_reward_options,
)
from rlr_testing import TINY_AESTHETIC, TINY_CLIP
from rlr_training.checkpoints import configuration
from rlr_training.hub import command_of, evaluation_command_of
from train_rlr_sd import parse_args


CUSTOM = """
class Neon:
    def __init__(self, strength="1", color="red"):
        self.strength, self.color = float(strength), "rgb".index(color[0])

    def __call__(self, images, prompts):
        return self.strength * images[:, self.color].mean((1, 2))


def plain(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def custom(tmp_path):
    path = tmp_path / "neon.py"
    path.write_text(CUSTOM)
    return str(path)


def test_entries_are_parsed_by_the_last_dot_before_the_first_equals_sign():
    entries = [
        "vqa.question=Is a = b? Is it {prompt}.",
        "hpsv2.1.dtype=fp16",
        "a/b.py:Neon.color=blue",
        "vqa.question=?",
    ]
    expected = {"vqa": {"question": "?"}, "hpsv2.1": {"dtype": "fp16"}, "a/b.py:Neon": {"color": "blue"}}
    assert parse_reward_options(entries) == expected
    assert parse_reward_options(entries[:1]) == {"vqa": {"question": "Is a = b? Is it {prompt}."}}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("vqa.question", "'vqa.question' is not of the form NAME.OPTION=VALUE"),
        ("question=?", "is not of the form NAME.OPTION=VALUE"),
        ("vqa.=x", "is not of the form NAME.OPTION=VALUE"),
        ("vga.question=x", "unknown reward 'vga', known are: aesthetic"),
        ("vqa.questoin=x", "there is no such option of 'vqa'; it has dtype, question, answer, model"),
        ("motion.dtype=fp16", "there is no such option of 'motion'; it has none"),
        ("aesthetic.dtype=half", "'aesthetic.dtype=half': must be one of fp32, fp16, bf16"),
    ],
)
def test_bad_options_are_refused(entry, problem):
    with pytest.raises(ValueError, match=f"^reward option .*{problem}"):
        parse_reward_options([entry])


def test_the_precision_of_a_reward_is_an_option():
    rewards = load_rewards(
        parse_reward("aesthetic,clip_score"),
        {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP},
        options=parse_reward_options(["clip_score.dtype=bf16"]),
        size=(32, 32),
    )
    assert [next(module.clip.parameters()).dtype for module in rewards.modules] == [torch.float32, torch.bfloat16]


def test_a_class_of_the_user_gets_options_when_it_is_made(custom):
    name, images = f"{custom}:Neon", torch.rand(2, 3, 8, 8)
    options = parse_reward_options([f"{name}.strength=2", f"{name}.color=blue"])
    rewards = load_rewards(parse_reward(name), {}, options=options, size=(8, 8))
    torch.testing.assert_close(rewards(images, ["", ""]).total, 2 * images[:, 2].mean((1, 2)))
    plain = load_rewards(parse_reward(name), {}, size=(8, 8))
    torch.testing.assert_close(plain(images, ["", ""]).total, images[:, 0].mean((1, 2)))
    with pytest.raises(ValueError, match=r"making an instance of the class with size fails: .*unexpected keyword"):
        load_rewards(parse_reward(name), {}, options={name: {"size": "1"}}, size=(8, 8))
    with pytest.raises(ValueError, match="has no option 'size': options are for classes"):
        load_rewards(parse_reward(f"{custom}:plain"), {}, options={f"{custom}:plain": {"size": "1"}}, size=(8, 8))


def test_options_of_rewards_that_are_not_in_use_are_refused(capsys):
    option = ["--reward_option", "vqa.question=Is it {prompt}?"]
    assert parse_args(["--reward", "vqa", *option]).reward_option == option[1:]
    assert parse_args(["--heldout_reward", "vqa:1", *option]).reward_option == option[1:]
    with pytest.raises(SystemExit):
        parse_args(["--reward", "aesthetic", *option])
    assert "reward option 'vqa...': the reward 'vqa' is not in use" in capsys.readouterr().err


def test_the_command_of_an_evaluation_has_the_options_of_what_it_scores():
    """The held-out reward is scored beside the trained one, and both are named where they are the default of training."""
    own, held = "vqa.question=Is it {prompt}?", "clip_score.dtype=bf16"
    args = parse_args(
        ["--reward", "vqa", "--heldout_reward", "vqa:2,clip_score:3", "--reward_option", own, "--reward_option", held]
    )
    command = evaluation_command_of(args, {"reward": args.reward, "reward_option": args.reward_option})
    assert f"--reward vqa,clip_score:3 --reward_option '{own}' --reward_option {held}" in command
    assert " --reward aesthetic " in evaluation_command_of(parse_args([]), {})


def test_every_option_is_in_the_help():
    text = options_in_help()
    for name, known in REWARDS.items():
        for option in known.options:
            assert f"{name}.{option} " in text
    assert "NAME.dtype" in text


def test_an_unknown_option_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="there is no such option of 'aesthetic'; it has dtype"):
        load_reward("aesthetic", path="nowhere", options={"size": "1"})


def test_where_servers_are_is_neither_in_checkpoints_nor_in_cards():
    """So that a run goes on with a server at another address; labels may have dots."""
    own = ["remote@v1.2.format=raw", "vqa.question=Is it {prompt}?", "mine.py:Neon.api_key=secret"]
    places = ["remote@v1.2.url=http://10.0.0.7:8000/x", "remote@v1.2.timeout=5"]
    flags = [word for option in (*own, *places) for word in ("--reward_option", option)]
    args = parse_args(["--reward", "remote@v1.2,vqa,mine.py:Neon", *flags])
    assert configuration(args, 1)["reward_option"] == own
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="no")
    command = command_of(args, {"reward_option": args.reward_option}, accelerator, "train_rlr_sd.py")
    assert "10.0.0.7" not in command and "remote@v1.2.url=..." in command and "format=raw" in command
    assert "secret" not in command and "mine.py:Neon.api_key=..." in command  # nobody knows what an own reward is told
