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
"""The documents: links lead somewhere, commands are accepted, and the page on own training loops runs as it is."""

import ast
import importlib
import math
import os
import re
import shlex
from pathlib import Path

import evaluate_rlr
import pytest
import torch
import train_rlr_flow
import train_rlr_sd
import train_rlr_video


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "assets" / "README.md"]
PARSERS = {
    **dict.fromkeys(("train_rlr_sd.py", "rlr-train-sd"), train_rlr_sd.parse_args),
    **dict.fromkeys(("train_rlr_flow.py", "rlr-train-flow"), train_rlr_flow.parse_args),
    **dict.fromkeys(("train_rlr_video.py", "rlr-train-video"), train_rlr_video.parse_args),
    **dict.fromkeys(("evaluate_rlr.py", "rlr-evaluate"), evaluate_rlr.parse_args),
}
PACKAGES = ("rlr_utils", "diffusion_models", "reward_models", "rlr_training")
FOLDERS = (*PACKAGES, "tests", "tools", "benchmarks", "docs", "assets")
# Flags of other programs, and those of diffusers' scripts that ours do not have.
OTHER_FLAGS = {
    *("--extra", "--exclude", "--num_processes", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr"),
    *("--master_port", "--standalone", "--durations", "--help", "--version", "--upgrade", "--no-deps", "--index-url"),
    *("--lora_dropout", "--upcast_before_saving", "--dataloader_num_workers", "--skip_final_inference"),
    *("--optimizer", "--enable_xformers_memory_efficient_attention", "--use_dora"),
}


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))


def fenced_blocks(text):
    """(language, code) of each fenced block; a block in a list is moved to the left."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [(language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in found]


def without_blocks(text):
    return re.sub(r"^ *```.*?^ *```\n", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    """The code between backticks, its lines joined."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(text))]


def links_of(text):
    """The targets of all links and images, also of those in HTML."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", "code", without_blocks(text))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    return found + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)


def anchors_of(text):
    """The anchors of a Markdown file as GitHub makes them from its headings, and those set in HTML."""
    anchors, counts = set(re.findall(r"""<\w+ [^>]*(?:id|name)=["']([^"']+)["']""", text)), {}
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", without_blocks(text), re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        counts[slug] = counts.get(slug, -1) + 1
        anchors.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
    return anchors


def broken_links(document):
    """The links of a Markdown file that lead nowhere in the repository."""
    broken = []
    for target in links_of(document.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):  # the internet
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists():
            broken.append(target)
        elif anchor and file.suffix == ".md" and anchor not in anchors_of(file.read_text(encoding="utf-8")):
            broken.append(target)
    return broken


def command_words(text):
    """The words of each command of a shell script; a command ends at the end of its line, at a pipe, a semicolon or an &&."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ "))
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&<>"):
                commands.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in commands if words]


def commands_of_scripts(text, language_is_shell=lambda language: language in ("", "bash", "sh", "console", "shell")):
    """(parser, arguments) of each command that runs one of our scripts, in blocks and between backticks."""
    scripts = [code for language, code in fenced_blocks(text) if language_is_shell(language)]
    scripts += [code for code in inline_code(text) if " --" in code]
    found = []
    for words in (words for script in scripts for words in command_words(script)):
        for i, word in enumerate(words):
            parser = PARSERS.get(os.path.basename(word))
            if parser is not None:
                found.append((parser, words[i + 1 :]))
    return found


def all_flags():
    """Every flag that a program of the repository takes."""
    flags = set(OTHER_FLAGS)
    for path in [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))]:
        if path.parent.name != "tests":
            flags.update(re.findall(r'"(--[a-z][\w-]*)"', path.read_text(encoding="utf-8")))
    return flags


def test_anchors_are_made_as_github_makes_them():
    text = "# RLR: a *true* gradient\n## `rlr`, T = 50\n## It's 4.5x\n## It's 4.5x\n```\n# no heading\n```\n## [SDXL](x) + `--a_b`\n"
    assert anchors_of(text) == {"rlr-a-true-gradient", "rlr-t--50", "its-45x", "its-45x-1", "sdxl----a_b"}


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# There\n")
    (tmp_path / "page.md").write_text(
        "# Here\n[1](other.md) [2](other.md#there) [3](#here) [`4`](https://nowhere) `[5](no)`\n"
        "[6](gone.md) [7](other.md#here) ![8](gone.png) [9](#there)\n<img src='gone.svg'>\n```\n[10](no)\n```\n"
    )
    assert broken_links(tmp_path / "page.md") == ["gone.md", "other.md#here", "gone.png", "#there", "gone.svg"]


def test_commands_are_found_in_blocks_and_between_backticks():
    text = (
        "```bash\n# train_rlr_sd.py\ntorchrun --nproc_per_node 2 train_rlr_sd.py --seed ${1#x} \\\n  --rank 2 && evaluate_rlr.py"
        " --adapters 'a b' > log\n```\nRun `rlr-train-sd\n--seed 3`, not `train_rlr_sd.py`.\n```python\nevaluate_rlr.py\n```\n"
    )
    assert commands_of_scripts(text) == [
        (train_rlr_sd.parse_args, ["--seed", "${1#x}", "--rank", "2"]),
        (evaluate_rlr.parse_args, ["--adapters", "a b"]),
        (train_rlr_sd.parse_args, ["--seed", "3"]),
    ]


@each_document
def test_relative_links_and_anchors_exist(document):
    assert broken_links(document) == []


@each_document
def test_commands_are_accepted_by_the_scripts(document, capsys):
    flags = all_flags()
    for parser, arguments in commands_of_scripts(document.read_text(encoding="utf-8")):
        assert {word for word in arguments if word.startswith("--")} <= flags
        if any("$" in word for word in arguments):  # the shell knows the values
            continue
        if "..." in arguments:  # stands for further flags
            arguments = [word for word in arguments if word != "..."]
            required = ["--adapters", "x"] if parser is evaluate_rlr.parse_args else []
            arguments += [] if "--adapters" in arguments else required
        try:
            parser(arguments)
        except SystemExit as stop:
            if stop.code != 0:  # 0 is that of --help
                pytest.fail(f"{shlex.join(arguments)}: {capsys.readouterr().err}")


def test_the_demos_of_the_makefile_are_accepted():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    models = [
        parser(words).pretrained_model_name_or_path
        for parser, words in commands_of_scripts(f"```bash\n{makefile}```\n")
    ]
    assert models == ["assets/tiny-emoji", "assets/tiny-emoji-sd3", "assets/tiny-wan"]


@each_document
def test_flags_and_files_that_are_named_exist(document):
    text, flags = document.read_text(encoding="utf-8"), all_flags()
    for code in inline_code(text):
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - flags
        assert not unknown, f"`{code}`: no program here takes {sorted(unknown)}"
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*|(train|evaluate)_rlr\w*\.py|Makefile|[\w-]+\.toml", code):
            assert (ROOT / code).exists(), f"`{code}` does not exist"


@each_document
def test_python_in_documents_is_valid_and_its_imports_exist(document):
    for language, code in fenced_blocks(document.read_text(encoding="utf-8")):
        if language not in ("py", "python"):
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in PACKAGES:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("document, most", [("README.md", 200), ("docs/results.md", 150), ("CONTRIBUTING.md", 80)])
def test_documents_are_short(document, most):
    assert len((ROOT / document).read_text(encoding="utf-8").splitlines()) <= most


def test_the_example_of_a_training_loop_trains(monkeypatch, capsys):
    """The block as a reader copies it, run from the root of the repository."""
    text = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    (code,) = [code for language, code in fenced_blocks(text) if language == "python"]
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(code, scope)
    rewards = [float(value) for value in re.findall(r"mean reward (-?[\d.]+|nan)", capsys.readouterr().out)]
    assert len(rewards) == 3 and all(map(math.isfinite, rewards))
    # A new LoRA is the base model until something trains it: its second matrices are zero.
    second = [p for name, p in scope["unet"].named_parameters() if "lora_B" in name]
    assert second and all(p.isfinite().all() and p.abs().max() > 0 for p in second)


def test_the_example_of_a_flow_matching_model_trains_and_saves(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    (code,) = [code for _, code in fenced_blocks(text) if "tiny-emoji-sd3" in code]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    code = code.replace("num_steps, size, prompts = 10,", "num_steps, size, prompts = 3,")
    exec(code, {})
    assert len(re.findall(r"mean reward -?\d", capsys.readouterr().out)) == 2
    assert (tmp_path / "my-lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_example_of_an_own_chain_runs(capsys):
    """Its gradient is that of the mean of -(x_0 - 1)^2 with x_0 = 0.9^10 x_T + (1 - 0.9^10) / 0.1 shift + noise."""
    text = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    (code,) = [code for _, code in fenced_blocks(text) if "class Drift" in code]
    torch.manual_seed(0)
    scope = {}
    exec(code, scope)
    gradient = scope["chain"].shift.grad
    assert str(gradient) in capsys.readouterr().out
    x_0, weight = scope["batch"].x_0, (1 - 0.9**10) / 0.1
    expected = (2 * (x_0 - 1)).mean(0) * weight
    assert gradient.shape == (2,) and (gradient - expected).abs().max() < 0.5 * expected.abs().max()
