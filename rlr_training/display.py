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
"""How numbers and prompts are shown to people: on screen, in messages, on the model card and in plots."""

import math


DIGITS = 3


def evenly_spaced(length, most):
    """The indices of at most so many of `length` things, with the first and the last, evenly spaced."""
    count = min(most, length)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def shown(value, scale=None, sign=""):
    """A number as text, with as many decimals as three significant digits of a scale need.

    Args:
        scale: the size of what matters, such as the standard error. Without one, or for 0, nan and infinity, the number
            has four significant digits of its own.
        sign: "+" to show it for positive numbers too.
    """
    if scale is None or not 0 < scale < math.inf:
        return f"{value:{sign}.4g}"
    decimals = DIGITS - 1 - math.floor(math.log10(scale))
    return f"{value:{sign}.{max(decimals, 0)}f}"


def with_error(mean, standard_error, sign=""):
    """A mean and its standard error as text, such as "5.8800 +- 0.0271"."""
    return f"{shown(mean, standard_error, sign)} +- {shown(standard_error, standard_error)}"


def scores_shown(row, num_images):
    """The mean of scores, with the digits of its standard error, and their standard deviation, as texts.

    Args:
        row: {"mean", "std"} of the scores.
    """
    return shown(row["mean"], row["std"] / num_images**0.5), shown(row["std"], row["std"])


def rows_of(results, reward, heldout):
    """The comparisons of the reward and of the held-out one, {name: comparison}.

    Args:
        results: from `evaluation.compare_with_base`.
        reward, heldout: how the two are named.
    """
    rows = {reward: results}
    if "heldout" in results:
        rows[f"held-out {heldout}"] = results["heldout"]
    return rows


def without_files(rewards):
    """The value of --reward, in which custom rewards from files are named without them: "mine.py:red:2" is "red:2"."""
    return ",".join(part.rpartition(".py:")[2] for part in rewards.split(","))


def shortened(text, width=80):
    """A prompt in one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
