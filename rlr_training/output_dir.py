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
"""The output folder of a run: claimed before anything is written, and never another run's by accident."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from diffusion_models.adapters import KOHYA_FILE, LORA_FILE, save_kohya, save_lora
from diffusion_models.lora_files import SECOND_FILE

from .checkpoints import checkpoints_of, incomplete_in
from .errors import saving


METRICS_FILE = "metrics.jsonl"
VALIDATION_FOLDER = "validation"
# What a run leaves in its output folder, beside its checkpoints and the logs of its trackers.
RUN_FILES = (
    *(
        METRICS_FILE,
        "training_args.json",
        "evaluation.json",
        "reward_curve.png",
        "before_after.png",
        "before_after.gif",
    ),
    *("README.md", "report.html"),
    *(os.path.join(folder, name) for folder in ("", "best", "ema") for name in (LORA_FILE, SECOND_FILE, KOHYA_FILE)),
)


def check_writable(folder):
    """Try whether an output folder can be made and written to; nothing is left behind.

    Raises:
        ValueError: if it cannot.
    """
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ValueError(f"--output_dir {folder!r} cannot be a folder: {place!r} is a file")
    try:
        # Asking for permissions would miss read-only and full disks.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**12))
    except OSError as error:
        raise ValueError(f"--output_dir {folder!r} cannot be written to: {error.strerror}") from error


def check_output_dir(args, resume_path):
    """Refuse to write over what another run, or somebody, has left in the output folder.

    Raises:
        ValueError: if the folder holds a run that this one neither resumes nor overwrites, or a README.md or checkpoint
            that no run has written.
    """
    folder = args.output_dir
    has_adapter = any(os.path.exists(os.path.join(folder, name)) for name in (LORA_FILE, SECOND_FILE))
    has_metrics = os.path.exists(os.path.join(folder, METRICS_FILE))
    holds_run = checkpoints_of(folder) or has_adapter or has_metrics
    if resume_path is None:
        # A run that was killed before its first checkpoint has nothing to resume from, and nothing to lose.
        resumed = args.resume_from_checkpoint == "latest" and not has_adapter
    else:
        resumed = os.path.abspath(os.path.dirname(resume_path)) == os.path.abspath(folder)
    for name in ("README.md", *incomplete_in(folder)):
        if os.path.exists(os.path.join(folder, name)) and not holds_run:
            raise ValueError(
                f"--output_dir {folder!r} holds {name!r}, which no run of this script has written and which would be"
                " replaced: use another folder"
            )
    if holds_run and not (resumed or args.overwrite_output_dir):
        remedies = "use another folder"
        if checkpoints_of(folder):
            remedies += ", continue it with --resume_from_checkpoint latest"
        elif has_adapter:
            remedies += ", train its adapter further in another folder with --adapter_path"
        raise ValueError(
            f"--output_dir {folder!r} already holds a run: {remedies}, or start afresh with --overwrite_output_dir"
        )


def clear_run(args, tracker):
    """Remove what an earlier run has left in the output folder; files of others stay."""
    incomplete = [os.path.join(args.output_dir, name) for name in incomplete_in(args.output_dir)]
    for path in [*checkpoints_of(args.output_dir).values(), *incomplete]:
        shutil.rmtree(path)
    logs = Path(args.output_dir, args.logging_dir, tracker).resolve()
    if Path(args.output_dir).resolve() in logs.parents:  # an absolute --logging_dir may hold other runs' logs as well
        shutil.rmtree(logs, ignore_errors=True)
    for images in Path(args.output_dir, VALIDATION_FOLDER).glob("step-*"):
        shutil.rmtree(images)
    for name in RUN_FILES:
        if os.path.isfile(os.path.join(args.output_dir, name)):
            os.remove(os.path.join(args.output_dir, name))


def write_configuration(args, config, tracker):
    """Make the output folder, cleared if it is to be overwritten, with training_args.json in it."""
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir!r} cannot be made: {error.strerror}") from error
    if args.overwrite_output_dir:
        clear_run(args, tracker)
    with open(os.path.join(args.output_dir, "training_args.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


def place_adapter(model, output_dir, name="", with_kohya=False):
    """Write the adapter into the output folder, or a folder `name` of it, where it is never half there.

    Args:
        with_kohya: write it in the layout of kohya, too.

    Raises:
        RunError: if it cannot be written.
    """
    partial = os.path.join(output_dir, "partial-adapter")
    with saving(partial):
        save_lora(model, partial)
        if with_kohya:
            save_kohya(model, partial)
        directory = os.path.join(output_dir, name)
        os.makedirs(directory, exist_ok=True)
        for file in os.listdir(partial):
            os.replace(os.path.join(partial, file), os.path.join(directory, file))
        shutil.rmtree(partial)
