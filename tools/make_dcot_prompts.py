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
"""Write the coarse, mid and fine prompts of a diffusive chain of thought with a language model, for a list of prompts.

    python tools/make_dcot_prompts.py --prompts my_prompts.txt --output my_prompts.jsonl --model Qwen/Qwen2.5-1.5B-Instruct
    python tools/make_dcot_prompts.py --prompts my_prompts.txt --output my_prompts.jsonl \
        --endpoint http://localhost:8000/v1 --model NAME

The model is a text-generation model of transformers, or one behind an OpenAI-compatible endpoint, whose key, if it needs
one, is read from the environment variable OPENAI_API_KEY. Prompts that the output already holds are skipped. A line is added
as soon as its answer has been checked, so an interrupted run continues when it is started again. The result is for
`train_rlr_sd.py --prompts my_prompts.jsonl`; see docs/dcot.md.
"""

import argparse
import json
import os
import re
import sys

from huggingface_hub import InferenceClient
from tqdm import tqdm


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from reward_models.loading import first_line  # noqa: E402
from rlr_training.prompts import LEVELS, load_levels, load_prompts  # noqa: E402


# Most words are one or two of the 77 tokens that CLIP reads.
MAX_WORDS = 45
INSTRUCTION = """A text-to-image model draws an image in three phases. Write one prompt for each phase of this image:

{prompt}

"coarse": composition, how many things there are and where, in plain words.
"mid": shape, pose and parts of each thing.
"fine": texture, small details and light.

Each is a complete description of the image in at most {words} words. Answer with a JSON object that has exactly the keys "coarse", "mid" and "fine", and with nothing else."""


def levels_in(answer):
    """(coarse, mid, fine) from a model's answer.

    Raises:
        ValueError: if it contains no JSON object with three texts of at most `MAX_WORDS` words each.
    """
    match = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        levels = json.loads(match.group()) if match else None
    except ValueError:
        levels = None
    if not isinstance(levels, dict):
        raise ValueError(f"no JSON object in the answer {answer.strip()[:80]!r}")
    for level in LEVELS:
        text = levels.get(level)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"no text for {level!r} in the answer {answer.strip()[:80]!r}")
        if len(text.split()) > MAX_WORDS:
            raise ValueError(f"{level!r} has {len(text.split())} words, more than {MAX_WORDS}")
    return tuple(" ".join(levels[level].split()) for level in LEVELS)


def endpoint_model(url, model, max_new_tokens):
    """`ask(question) -> answer` of an OpenAI-compatible endpoint."""
    client = InferenceClient(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def ask(question):
        messages = [{"role": "user", "content": question}]
        answer = client.chat_completion(messages, model=model, max_tokens=max_new_tokens, temperature=0.7)
        return answer.choices[0].message.content or ""

    return ask


def local_model(model, max_new_tokens):
    """`ask(question) -> answer` of a text-generation model of transformers, from a folder or the Hub."""
    from transformers import pipeline

    generator = pipeline("text-generation", model=model)

    def ask(question):
        chat = generator.tokenizer.chat_template is not None
        asked = [{"role": "user", "content": question}] if chat else question
        return generator(asked, max_new_tokens=max_new_tokens, do_sample=True, return_full_text=False)[0][
            "generated_text"
        ]

    return ask


def write_levels(ask, prompts, output, tries):
    """Add a line for every prompt that the output lacks; returns {prompt: problem} for those that it still lacks.

    Args:
        ask: `ask(question) -> answer`.
        tries: questions for a prompt.

    Raises:
        ValueError: if the output has a line that training would refuse, or an unfinished last line.
    """
    failed, present = {}, set()
    if os.path.exists(output):
        present = set(load_prompts(output)) if os.path.getsize(output) else set()
        load_levels(output)
        with open(output, "rb") as file:
            content = file.read()
        if content and not content.endswith(b"\n"):
            raise ValueError(f"the last line of {output!r} is unfinished: complete or remove it")
    for prompt in tqdm([prompt for prompt in prompts if prompt not in present], desc="Prompts"):
        for _ in range(tries):
            try:
                levels = levels_in(ask(INSTRUCTION.format(prompt=prompt, words=MAX_WORDS)))
            except ValueError as error:
                failed[prompt] = str(error)
                continue
            failed.pop(prompt, None)
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": prompt, **dict(zip(LEVELS, levels))}, ensure_ascii=False) + "\n")
            break
    return failed


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="Prompts as for training.")
    parser.add_argument("--output", required=True, help="A .jsonl file to which lines are added.")
    parser.add_argument("--model", required=True, help="Folder or Hub name, or the model's name at the endpoint.")
    parser.add_argument("--endpoint", default=None, help="URL of an OpenAI-compatible endpoint, such as .../v1.")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="Largest length of an answer. Default: 400.")
    parser.add_argument(
        "--tries", type=int, default=3, help="How often a prompt is tried until an answer is good. Default: 3."
    )
    args = parser.parse_args(input_args)
    if not args.output.endswith(".jsonl"):
        parser.error(f"--output {args.output!r} must end in .jsonl")
    try:
        prompts = load_prompts(args.prompts)
        if args.endpoint is None:
            ask = local_model(args.model, args.max_new_tokens)
        else:
            ask = endpoint_model(args.endpoint, args.model, args.max_new_tokens)
        failed = write_levels(ask, prompts, args.output, args.tries)
    except Exception as error:  # loading a model or calling an endpoint may raise anything
        sys.exit(f"make_dcot_prompts.py: error: {first_line(error)}")
    for prompt, problem in failed.items():
        print(f"{prompt!r}: {problem}", file=sys.stderr)
    if failed:
        sys.exit(f"make_dcot_prompts.py: error: no good answer for {len(failed)} of {len(prompts)} prompts: try again")


if __name__ == "__main__":
    main()
