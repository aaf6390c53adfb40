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
"""benchmarks/gpu.py, on a CPU."""

import json

import gpu


def test_quick_figures_are_kept_and_not_measured_again(tmp_path, capsys, monkeypatch):
    first = gpu.main(["--quick", "--out", str(tmp_path), "--only", "rates", "network"])
    assert first["network, batch 1"]["ours_forward_ms"] > 0 and first["rates"]["copy_gb_per_s"] > 0
    # What is known already is not measured again, and what was interrupted leaves the rest.
    monkeypatch.setattr(gpu, "network", None)
    results = gpu.main(["--quick", "--out", str(tmp_path)])
    assert results["rates"] == first["rates"] and results["network, batch 1"] == first["network, batch 1"]
    step = results["step, rlr, batch 1, plain"]
    assert 0 < step["seconds"] <= step["slower"] and step["tflop_per_image"] > 0
    assert json.loads((tmp_path / "gpu.json").read_text())["results"] == results
    tables = (tmp_path / "gpu.md").read_text()
    assert tables in capsys.readouterr().out and all(f"## {kind}" in tables for kind in ("rates", "network", "step"))
