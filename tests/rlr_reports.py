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
"""report.html of a run and of an evaluation, as a parser and as a browser read it."""

import shutil
import subprocess
from html.parser import HTMLParser

import html5lib
import numpy as np
import pytest
from PIL import Image


class Page(HTMLParser):
    """A page of valid HTML: the cells of its tables, the attributes of its images, and the addresses of everything else."""

    def __init__(self, text):
        super().__init__()
        html5lib.HTMLParser(strict=True).parse(text)  # raises at the first error
        self.rows, self.images, self.links, self.tag = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "img":
            self.images.append(dict(attributes))
        self.links += [value for name, value in attributes if name in ("src", "href") and tag != "img"]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.rows[-1].append(data)

    def handle_endtag(self, tag):
        self.tag = None


def pixels_of(report, folder, width):
    """The first 1,600 rows (1600, W, 3) of pixels of a report in a browser of a width; the test is skipped without a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the report with")
    shot = folder / "shot.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},1600",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(shot).convert("RGB")).astype(int)
