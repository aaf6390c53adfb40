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
"""Where the prompts come from, what is left out with a message, and the order in which training uses them."""

import gzip
import json
import re

import datasets
import pandas
import pytest
import torch
from rlr_testing import BASE, DIGITS, train
from rlr_training.prompts import (
    PromptSampler,
    conditions_of,
    expand,
    levels_of,
    load_levels,
    load_prompts,
    load_training_prompts,
)
from train_rlr_sd import main, parse_args


# Lists and files


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
    ("content", "message"),
    [
        (b" \n\n", "no prompt"),
        (b"", "no prompt"),
        (b"caf\xe9\0\n", "not a text: byte 4 is a control character"),
        ("a fox".encode("utf-16-le"), "not a text: byte 1 is a control character"),  # without its byte order mark
        (gzip.compress(b"a fox\n", mtime=0), "not a text: byte"),
        (b'\n{"prompt": "a fox"}\n{"prompt": "a cat"}\n', "it is JSON and no text .*: name it .jsonl"),
        (b'["a fox",\n "a cat"]\n', "it is JSON and no text .*: name it .json"),
        (None, "no such file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(file))
    assert str(file) in str(error.value)


DATASET = "to train on a column of a dataset use --dataset_name {} --caption_column NAME"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.csv", "prompt,style\na fox,oil\n", f"prompts are in .txt files .*; {DATASET}$"),
        ("prompts.PARQUET", "PAR1", f"prompts are in .txt files .*; {DATASET}$"),
        ("prompts.yaml", "- a fox\n", "prompts are in .txt files (one a line), .json or .jsonl files$"),
        ("prompts.tsv", "a fox\toil\n", "prompts are in .txt files (one a line), .json or .jsonl files$"),
        ("prompts.png", "", "prompts are in .txt files (one a line), .json or .jsonl files$"),
        ("folder", None, f"it is a folder; {DATASET}$"),
        ("prompts.json", "a fox\n", "it is not JSON (Expecting value.*); name it .jsonl if it has an object a line"),
        ("prompts.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "it is not JSON (Extra data.*); name it .jsonl if"),
        ("prompts.json", '{"prompt": "a fox"}', 'it is not a list of prompts, or of objects with a text "prompt"'),
        ("prompts.json", '["a fox", 3]', 'entry 2 is not an object with a text "prompt"$'),
        ("prompts.json", "[]", "there is no prompt"),
        (
            "prompts.json",
            '[{"text": "a fox", "n": 1}]',
            f"entry 1 is not an object with a text \"prompt\", only 'text'; {DATASET}$",
        ),
        (
            "prompts.jsonl",
            '{"caption": "a fox", "url": "x"}',
            f"line 1 is not an object with a text \"prompt\", only 'caption', 'url'; {DATASET}$",
        ),
    ],
    ids=lambda value: "" if value is None else value[:25],
)
def test_files_that_are_no_prompt_files_are_refused_with_the_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    message = message.format(path).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^prompts '{path}': {message}") as error:
        load_prompts(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["prompts.json", "PROMPTS.JSON"])
def test_a_json_file_holds_a_list_of_prompts_or_of_objects(tmp_path, name):
    file = tmp_path / name
    file.write_text(json.dumps(["a {red|blue} cat", {"prompt": "a dog", "source": "me"}, LEVELS], indent=2))
    assert load_prompts(str(file)) == ["a red cat", "a blue cat", "a dog", "a fox"]
    assert load_levels(str(file)) == {"a fox": ("an animal", "a fox in snow", "fur of a fox")}


def test_other_encodings_are_read_with_a_warning(tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a café\r\n".encode("utf-16"))
    assert load_prompts(str(file)) == ["a café"] and not caplog.text
    file.write_bytes("a café\n“a fox”\n".encode("cp1252"))
    assert load_prompts(str(file)) == ["a café", "“a fox”"]
    assert "not UTF-8 (invalid continuation byte at byte 5), read as Windows-1252" in caplog.text


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\na cat\n a fox \n\n\n")
    with caplog.at_level("INFO"):
        assert load_prompts(str(file)) == ["a fox", "a cat"]
    assert "2 prompts; left out: 3 empty, 1 repeated" in caplog.text


def test_a_template_stands_for_all_its_prompts():
    assert expand("a {red|blue} {cat|small dog}") == ["a red cat", "a red small dog", "a blue cat", "a blue small dog"]
    assert expand("a {very |}big {cat}") == ["a very big {cat}", "a big {cat}"]
    with pytest.raises(ValueError, match="stands for 1,048,576 prompts"):
        expand("{a|b}" * 20)


@pytest.mark.parametrize("text", ["a {cat}", "{a} | {b}", "(a) | [b]", "a } and {", "{}", "x}|{y"])
def test_braces_without_a_bar_between_them_are_kept(text):
    assert expand(text) == [text]


@pytest.mark.parametrize(
    "text",
    ["{a|b", "a|b}", "a {b|c", "{a|{b|c}}", "{a {b|c} d}", "{{a|b}", "{a|b}}", "{a|b} and {c|d", f"{{{'a' * 3000}|b"],
    ids=lambda text: text[:20],
)
def test_a_template_that_is_not_closed_or_nested_is_refused(text):
    with pytest.raises(ValueError, match="^the template .* has a brace too many or too few: .*") as error:
        expand(text)
    assert len(str(error.value)) < 250


def test_only_the_first_prompts_are_used_if_asked_for():
    args = parse_args(["--prompts", DIGITS, "--max_prompts", "3"])
    assert load_training_prompts(args) == load_prompts(DIGITS)[:3]


def test_prompts_that_the_text_encoder_truncates_give_one_warning(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a red one\n" + "a red two and " * 4 + "a blue nine\n")
    with caplog.at_level("WARNING", logger="rlr_training"):
        train(tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"), "--max_train_steps", "1")
    warnings = [record.getMessage() for record in caplog.records if "does not see" in record.getMessage()]
    assert len(warnings) == 1 and "1 of 2 prompts are longer than 16 tokens" in warnings[0]
    assert re.search(r"it does not see '[a-z ]*a red two and a blue nine'$", warnings[0])


def test_a_very_long_prompt_is_quoted_in_a_line_and_not_repeated_at_every_image(tmp_path, capfd, caplog):
    """Also a negative or a validation prompt."""
    long = "very " * 480
    (tmp_path / "prompts.txt").write_text(f"{long}\na red one\n")
    flags = ["--negative_prompt", f"{long} blue", "--validation_prompts", f"{long} green", "--num_eval_images", "2"]
    train(tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"), *flags, "--num_validation_images", "1")
    captured = capfd.readouterr()
    printed = "".join(line for line in captured.out.splitlines() if not line.startswith("to evaluate it"))
    assert "3 of 4 prompts are longer than 16 tokens" in caplog.text
    for text in (printed, captured.err, caplog.text, (tmp_path / "out" / "README.md").read_text().split("```bash")[0]):
        assert "very " * 20 not in text.replace(f"negative_prompt={long + ' blue'!r}", "")


# The chain of thought

LEVELS = {"prompt": "a  fox", "coarse": "an animal", "mid": "a fox in snow", "fine": "fur of a fox"}


def test_a_jsonl_file_may_hold_a_chain_of_thought(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, [LEVELS, {"prompt": "a {red|blue} cat", "source": "me"}])) + "\n\n")
    assert load_prompts(str(file)) == ["a fox", "a red cat", "a blue cat"]
    assert load_levels(str(file)) == {"a fox": ("an animal", "a fox in snow", "fur of a fox")}
    assert load_levels("simple_animals") == {}
    # A prompt without levels stands for itself.
    expected = [["a red cat", "an animal"], ["a red cat", "a fox in snow"], ["a red cat", "fur of a fox"]]
    assert levels_of(str(file), ["a red cat", "a fox"]) == expected
    assert levels_of(str(file), ["a red cat", "a blue cat"]) is None and levels_of(None, ["a fox"]) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a fox"', "line 2 is not JSON"),
        ('["a fox"]', 'line 2 is not an object with a text "prompt"'),
        ('{"prompt": 3}', 'line 2 is not an object with a text "prompt"'),
        ('{"prompt": "a fox", "coarse": "x"}', "'a fox' needs all of coarse, mid, fine"),
        ('{"prompt": "a fox", "coarse": "x", "mid": 1, "fine": "y"}', "'a fox' needs all of coarse, mid, fine"),
        ('{"prompt": "a {b|c}", "coarse": "x", "mid": "z", "fine": "y"}', "is a template, which cannot have levels"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(LEVELS) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(file))
        load_levels(str(file))
    assert str(file) in str(error.value)


def test_conditions_change_with_the_step_where_prompts_have_levels(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, [LEVELS, {"prompt": "a cat"}])))
    args = parse_args(["--prompts", str(file), "--num_inference_steps", "5", "--dcot_boundaries", "0.2", "0.6"])
    embed = lambda prompts: {"length": torch.tensor([len(prompt) for prompt in prompts])}  # noqa: E731
    conditions = conditions_of(args, ["a fox", "a cat"], embed)
    by_level = {level: [len(LEVELS[level]), len("a cat")] for level in ("coarse", "mid", "fine")}
    assert [one["length"].tolist() for one in conditions] == [
        *(by_level["coarse"], by_level["mid"], by_level["mid"], by_level["fine"], by_level["fine"])
    ]
    assert conditions_of(args, ["a cat"], embed)["length"].tolist() == [5]  # one condition for the whole chain


# Datasets


def test_prompts_from_a_local_dataset(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pandas.DataFrame({"caption": ["a red one", "", "a blue two"]}).to_parquet(data / "train.parquet")
    flags = [flag for flag in BASE if flag not in ("--prompts", DIGITS)]
    flags += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]
    with pytest.raises(SystemExit, match="--dataset_name .*: no --caption_column 'text' in it, only caption"):
        main(parse_args(flags))
    with pytest.raises(SystemExit, match="--dataset_name .*: .*validation"):
        main(parse_args([*flags, "--dataset_split", "validation"]))
    main(parse_args([*flags, "--caption_column", "caption"]))
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("streaming", [[], ["--dataset_streaming"]], ids=["loaded", "streamed"])
def test_prompts_of_a_dataset_in_a_folder_or_a_file(tmp_path, streaming):
    rows = [{"text": [f"a red {word}", "another caption"], "other": 1} for word in ("one", "two", "one", "three")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (tmp_path / "data", tmp_path / "data" / "train.jsonl"):
        args = parse_args(["--dataset_name", str(source), *streaming])
        assert load_training_prompts(args) == ["a red one", "a red two", "a red three"]
        args = parse_args(["--dataset_name", str(source), "--max_prompts", "2", *streaming])
        assert load_training_prompts(args) == ["a red one", "a red two"]


@pytest.fixture
def saved(tmp_path):
    """A folder with a Dataset and a DatasetDict as save_to_disk writes them."""
    rows = {"text": ["a red one", "a red two", "a red one"], "other": [1, 2, 3]}
    dataset = datasets.Dataset.from_dict(rows, split="train")
    dataset.save_to_disk(tmp_path / "one")
    splits = {"train": dataset, "test": dataset.select([1]), "all": dataset.rename_column("text", "caption")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.mark.parametrize("streaming", [[], ["--dataset_streaming"]], ids=["loaded", "streamed"])
def test_prompts_of_a_dataset_of_save_to_disk(saved, streaming):
    def prompts_of(name, *flags):
        return load_training_prompts(parse_args(["--dataset_name", str(saved / name), *flags, *streaming]))

    assert prompts_of("one") == prompts_of("splits") == ["a red one", "a red two"]
    assert prompts_of("one", "--max_prompts", "1") == ["a red one"]
    assert prompts_of("one", "--dataset_split", "train") == ["a red one", "a red two"]
    assert prompts_of("splits", "--dataset_split", "test") == ["a red two"]
    with pytest.raises(ValueError, match="--dataset_name .*one': no --dataset_split 'test' in it: it has no splits$"):
        prompts_of("one", "--dataset_split", "test")
    with pytest.raises(ValueError, match="no --dataset_split 'valid' in it, only train, test, all$"):
        prompts_of("splits", "--dataset_split", "valid")
    with pytest.raises(ValueError, match="no --caption_column 'text' in it, only caption, other$"):
        prompts_of("splits", "--dataset_split", "all")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("one/dataset_info.json", "{", "JSONDecodeError"),
        ("one/state.json", "{", "JSONDecodeError"),
        ("one/state.json", "{}", "KeyError: '_data_files'"),
        ("one/dataset_info.json", None, "FileNotFoundError"),
        ("one/data-00000-of-00001.arrow", None, "FileNotFoundError: .* No such file"),
        ("one/data-00000-of-00001.arrow", "x", "ArrowInvalid"),
        ("splits/dataset_dict.json", "{}", "KeyError: 'splits'"),
        ("splits/test/state.json", None, "FileNotFoundError"),
    ],
)
def test_a_damaged_dataset_of_save_to_disk_is_named(saved, file, content, message):
    path = saved / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    folder = saved / file.partition("/")[0]
    message = f"^--dataset_name '{folder}': a damaged folder of save_to_disk: {message}"
    with pytest.raises(ValueError, match=message) as error:
        load_training_prompts(parse_args(["--dataset_name", str(folder)]))
    assert "\n" not in str(error.value)


def test_a_dataset_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n")
    (tmp_path / "broken.csv").write_text('text\na fox\n"a cat", "b", 3\n\0\n')
    for name in ("prompts.txt", "broken.csv"):
        with pytest.raises(ValueError, match=f"--dataset_name .*{name}") as error:
            load_training_prompts(parse_args(["--dataset_name", str(tmp_path / name)]))
        assert "\n" not in str(error.value)


# The order of the prompts


def test_every_pass_has_every_prompt_once_in_another_order():
    sampler = PromptSampler([str(i) for i in range(10)], seed=0)
    passes = [sampler.next_batch(10) for _ in range(3)]
    assert all(sorted(p, key=int) == sampler.prompts for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert PromptSampler(sampler.prompts, seed=1).next_batch(10) != passes[0]


def test_a_prompt_may_come_several_times_in_a_row():
    sampler = PromptSampler(["a", "b", "c"], seed=0, images_per_prompt=4)
    drawn = sampler.next_batch(12)
    assert [len(set(drawn[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and set(drawn) == {"a", "b", "c"}


def test_ranks_share_a_pass_and_a_resumed_run_continues_it():
    prompts = [str(i) for i in range(12)]
    ranks = [PromptSampler(prompts, seed=1, rank=rank, num_ranks=2) for rank in range(2)]
    drawn = [rank.next_batch(3) for _ in range(2) for rank in ranks]
    single = PromptSampler(prompts, seed=1)
    assert sum(drawn, []) == single.next_batch(12)
    resumed = PromptSampler(prompts, seed=1)
    resumed.position = 12
    assert resumed.next_batch(7) == single.next_batch(7)
