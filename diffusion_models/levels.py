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
"""Where the levels of a chain of thought change, see `chain_of_thought`."""

BOUNDARIES = (0.33, 0.67)


def levels_of_steps(num_steps, boundaries=BOUNDARIES):
    """The level of each of T steps, the first executed first: 0 (coarse), 1 (mid) or 2 (fine).

    Args:
        num_steps: T.
        boundaries: where the levels change, as shares of the chain.

    Raises:
        ValueError: if they are not two shares in ascending order.
    """
    if not 0 <= boundaries[0] <= boundaries[1] <= 1:
        raise ValueError(f"the boundaries {list(boundaries)} are not two shares of the chain in ascending order")
    return [sum(i >= boundary * num_steps for boundary in boundaries) for i in range(num_steps)]
