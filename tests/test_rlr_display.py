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
"""Numbers and prompts as people see them."""

import math

import pytest
from rlr_training.display import scores_shown, shortened, shown, with_error


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (5.88021, 1.0257, "5.88"),
        (5.88021, 0.0084, "5.88021"),
        (0.0000021, 0.0000030, "0.00000210"),
        (0.0417, 0.0123, "0.0417"),
        (-20417.3, 512.0, "-20417"),
        (1234.5, 1e6, "1234"),
        (7.0, 0.9999, "7.000"),
        # Without a scale, four digits of its own.
        (5.88021, 0.0, "5.88"),
        (0.000041234, None, "4.123e-05"),
        (41.2345, math.nan, "41.23"),
        (41.2345, math.inf, "41.23"),
        (math.nan, 1.0, "nan"),
    ],
)
def test_a_number_has_three_significant_digits_of_what_matters(value, scale, text):
    assert shown(value, scale) == text


def test_a_gain_is_shown_with_the_digits_of_its_error():
    assert with_error(0.00000213, 0.00000298, "+") == "+0.00000213 +- 0.00000298"
    assert with_error(-0.5, 0.25) == "-0.500 +- 0.250"
    assert with_error(0.0, 0.0, "+") == "+0 +- 0"


def test_a_mean_is_shown_with_the_digits_of_its_standard_error():
    assert scores_shown({"mean": 5.880214, "std": 1.0257}, 100) == ("5.880", "1.03")


def test_a_prompt_is_shortened_to_one_line():
    assert shortened(" a red\n fox ") == "a red fox"
    assert shortened("x" * 80) == "x" * 80 and shortened("x" * 81) == "x" * 76 + " ..."
