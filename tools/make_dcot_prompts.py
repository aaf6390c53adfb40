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
"""Have a language model write the coarse, mid and fine prompts of a diffusive chain of thought for every prompt of a list.

    python tools/make_dcot_prompts.py --prompts my_prompts.txt --output my_prompts.jsonl --model Qwen/Qwen2.5-1.5B-Instruct
    python tools/make_dcot_prompts.py --prompts my_prompts.txt --output my_prompts.jsonl \
        --endpoint http://localhost:8000/v1 --model NAME

The model is any text-generation model of transformers, or what answers at an OpenAI-compatible endpoint (its key, if it
needs one, is the environment variable OPENAI_API_KEY). Prompts that are in the output already are left as they are, and
lines are only ever added to it, each when its answer has been found good: an interrupted run is continued by starting it
again. The result is for `train_rlr_sd.py --prompts my_prompts.jsonl`; see docs/dcot.md.
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
from rlr_utils import load_levels, load_prompts  # noqa: E402
from rlr_utils.prompts import LEVELS  # noqa: E402


# Of CLIP's 77 tokens, since a word takes one or two.
MAX_WORDS = 45
INSTRUCTION = """A text-to-image model draws a picture in three phases. Write one prompt for each phase of this picture:

{prompt}

"coarse": composition, how many things there are and where, in plain words.
"mid": shape, pose and parts of each thing.
"fine": texture, small details and light.

Each is a complete description of the picture in at most {words} words. Answer with a JSON object that has exactly the keys "coarse", "mid" and "fine", and with nothing else."""


def levels_in(answer):
    """(coarse, mid, fine) of a model's answer.

    Raises:
        ValueError: if it holds no JSON object with three texts of at most `MAX_WORDS` words each.
    """
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        levels = json.loads(found.group()) if found else None
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
    """Add a line for every prompt that the output does not have; {prompt: what was wrong} of those it still has not."""
    failed, there = {}, set()
    if os.path.exists(output):
        there = set(load_prompts(output)) if os.path.getsize(output) else set()
        load_levels(output)  # or a line that training would refuse would be found there only
        with open(output, "rb") as file:
            content = file.read()
        if content and not content.endswith(b"\n"):
            raise ValueError(f"{output!r} does not end with a whole line: mend or move it")
    for prompt in tqdm([prompt for prompt in prompts if prompt not in there], desc="Prompts"):
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
    parser.add_argument("--prompts", required=True, help="As for training.")
    parser.add_argument("--output", required=True, help="A .jsonl file, to which lines are added.")
    parser.add_argument("--model", required=True, help="Folder or Hub name, or what the endpoint calls it.")
    parser.add_argument("--endpoint", default=None, help="URL of an OpenAI-compatible endpoint, such as .../v1.")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="Length of an answer.")
    parser.add_argument("--tries", type=int, default=3, help="Questions a prompt, until an answer is good.")
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
    except Exception as error:  # whatever a model's loading or an endpoint's client may raise
        sys.exit(f"make_dcot_prompts.py: error: {first_line(error)}")
    for prompt, problem in failed.items():
        print(f"{prompt!r}: {problem}", file=sys.stderr)
    if failed:
        sys.exit(f"make_dcot_prompts.py: error: no good answer for {len(failed)} of {len(prompts)} prompts: try again")


if __name__ == "__main__":
    main()
