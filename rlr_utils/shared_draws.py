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
"""The draws that decide how often the network is called, the same on all ranks."""

import random


class SharedDraws(random.Random):
    """Python's generator, seeded alike on all ranks, with a state for checkpoints.

    It draws the steps of a sweep and nothing else. Noise, which makes the images of the ranks differ, comes from elsewhere.
    """

    def state_dict(self):
        """JSON-ready."""
        return {"state": self.getstate()}

    def load_state_dict(self, state):
        version, numbers, gauss = state["state"]
        self.setstate((version, tuple(numbers), gauss))
