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
"""The command-line parser of the scripts, and the types of their flags."""

import argparse
import difflib
import math
import re


# {flag that only one script has: why}
ELSEWHERE = {"--export_kohya": "only train_rlr_sd.py writes this layout, for SD 1.x, 2.x and XL"}
# Ends the help of a flag whose default depends on the model.
OF_FAMILY = " Default: that of the model's family, see docs/models.md."


class FlagParser(argparse.ArgumentParser):
    """An argument parser that shows defaults in its help and reports an error in one line, without the usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=DefaultsFormatter, usage="%(prog)s [flags]", **options)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} must be one of {', '.join(action.choices)}")

    def error(self, message):
        message = re.sub(r"^argument (--\w+): ", r"\1 ", message)
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown is not None and unknown[1] in ELSEWHERE:
            message = f"{unknown[1]}: {ELSEWHERE[unknown[1]]}"
        elif unknown is not None:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}\n")


class DefaultsFormatter(argparse.HelpFormatter):
    """Adds the default to the help of each flag that has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action):
        is_set = action.default not in (None, False, [], argparse.SUPPRESS)
        if not is_set or "default" in action.help.lower():
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{action.help} Default: {default}."


def whole_number(least=1):
    """The type of a whole number that is at least `least`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return value

    return parse


def number(fits, meaning):
    """The type of a finite number.

    Args:
        fits: `fits(value) -> bool`.
        meaning: what a number that fits is, as in "must be a positive number".
    """

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text} must be {meaning}")
        return value

    return parse


POSITIVE = number(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = number(lambda value: value >= 0, "a number that is not negative")
BETA = number(lambda value: 0 <= value < 1, "in [0, 1)")
OPEN_SHARE = number(lambda value: 0 < value < 1, "in (0, 1)")
SHARE = number(lambda value: 0 <= value <= 1, "in [0, 1]")


def frames_to_score(text):
    """The type of --score_frames: all, chunk, or a whole number."""
    return text if text in ("all", "chunk") else whole_number()(text)


def whole_or_auto(least=1):
    """The type of a whole number that is at least `least`, or of auto."""
    return lambda text: text if text == "auto" else whole_number(least)(text)


def number_or_auto(text):
    """A number where the text is one, else the text itself, which is checked after parsing."""
    try:
        return float(text)
    except ValueError:
        return text
