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
import os


# Before a library reads them, and for the processes that tests start: the references are a CPU's, two ranks would need two
# cards, and the Hub of the tests is a server on this machine. Only test_rlr_gpu.py uses a GPU.
if os.environ.get("RUN_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("HF_HUB_OFFLINE", None)

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402


# The tests run processes beside this one, and threads of several processes that share few cores slow each other down.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test seeded, and none sees the accelerator of the one before."""
    torch.manual_seed(0)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
