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
"""A reward that a server scores, in another environment, on another GPU or machine: a black box.

The server is `python -m reward_models --serve`, or any that speaks as `serving.py` describes.
"""

import base64
import io
import logging
import math
import os
import random
import time

import httpx
import numpy as np
import torch
from PIL import Image

from .base import check_batch
from .loading import first_line


logger = logging.getLogger(__name__)

# The environment variable with the token that client and server share.
TOKEN = "RLR_REWARD_TOKEN"
LONGEST_PAUSE = 30  # seconds between two attempts
MAX_PIXELS = 2**26  # of the images of a request: 256 of 512 x 512; a small file may hold far more
WAITS = (429, 502, 503, 504, 500)  # what a server answers that may be well again later


class ServiceError(OSError):
    """A server refuses a request, or answers something else than scores."""


class Unreachable(ServiceError):
    """A server does not answer, or with errors of its own, for longer than it may."""


def shared_token():
    """The token of the environment without blanks around it, or `None`.

    Raises:
        ValueError: if it has characters that a header cannot hold.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not all("!" <= letter <= "~" for letter in token):
        raise ValueError(f"the environment variable {TOKEN} holds other characters than those of ASCII without blanks")
    return token or None


def to_json(images, prompts, image_format):
    """The body of a request: images (B, 3, H, W) in [0, 1] as PNG of 8 bits, or as they are in float32."""
    values = images.detach().float().cpu()
    if image_format == "raw":
        data = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
        return {"prompts": list(prompts), "shape": list(values.shape), "float32": data}
    return {"prompts": list(prompts), "images": [to_png(image) for image in values]}


def to_png(image):
    """An image (3, H, W) in [0, 1] as PNG in base64."""
    buffer = io.BytesIO()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def from_json(body):
    """(images (B, 3, H, W) in [0, 1], prompts) of the body of a request.

    Raises:
        ValueError: if it is not one, or its images differ in size.
    """
    if not isinstance(body, dict) or not isinstance(body.get("prompts"), list):
        raise ValueError('the body must be an object with "prompts", a list of texts')
    prompts = read_texts(body["prompts"])
    if "float32" in body:
        shape = tuple(body.get("shape", ()))
        values = np.frombuffer(base64.b64decode(body["float32"], validate=True), dtype="<f4")
        images = torch.from_numpy(values.reshape(shape).astype(np.float32))
    else:
        files = [base64.b64decode(text, validate=True) for text in body.get("images", ())]
        if len(files) != len(prompts):
            raise ValueError(f"{len(files)} images with {len(prompts)} prompts")
        pixels = sum(math.prod(open_png(file).size) for file in files)
        if pixels > MAX_PIXELS:
            raise ValueError(f"images of {pixels} pixels together are more than {MAX_PIXELS}")
        images = [from_png(file) for file in files]
        if len({image.shape for image in images}) != 1:
            raise ValueError('"images" must be PNG files in base64, all of one size')
        images = torch.stack(images)
    check_batch(images, prompts)
    return images, prompts


def read_texts(prompts):
    """The prompts of a request.

    Raises:
        ValueError: if they are no texts, or none.
    """
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError('"prompts" must be a list of texts that is not empty')
    for prompt in prompts:
        prompt.encode()  # half of a pair of surrogates is no text
    return prompts


def open_png(file):
    """A PNG of so many bytes, of which only the header is read."""
    return Image.open(io.BytesIO(file), formats=["PNG"])


def from_png(file):
    """An image (3, H, W) in [0, 1] of the bytes of a PNG."""
    return torch.from_numpy(np.array(open_png(file).convert("RGB"))).permute(2, 0, 1) / 255


class Remote(torch.nn.Module):
    """R = what a server answers for the images and their prompts.

    A request that fails for want of an answer is repeated, after pauses that double from a second on.

    Args:
        name: for messages.
        url: of the reward, http://HOST:PORT/NAME.
        image_format: "png" for 8 bits, or "raw" for float32.
        timeout: seconds that a request may take.

    Attributes:
        patience: seconds until a server that does not answer is given up, at least one attempt.
    """

    differentiable = False

    def __init__(self, name, url, image_format, timeout):
        super().__init__()
        self.name, self.url, self.image_format = name, url, image_format
        self.patience = 600.0
        token = shared_token()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request
        self.client = httpx.Client(timeout=timeout, headers=headers, trust_env=False)

    def forward(self, images, prompts):
        check_batch(images, prompts)
        answer = self.ask(to_json(images, prompts, self.image_format))
        scores = answer.get("scores") if isinstance(answer, dict) else None
        are_numbers = isinstance(scores, list) and all(isinstance(score, (int, float)) for score in scores)
        if not are_numbers or len(scores) != len(images):
            what = f"{len(scores)} scores" if are_numbers else "no list of scores"
            raise ServiceError(f"reward {self.name!r}: the server {self.url} answers {what} for {len(images)} images")
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def check_prompts(self, prompts):
        """Ask a server of ours whether it refuses some of the prompts; others do not know the question.

        Raises:
            ValueError: if it does.
        """
        try:
            response = self.client.post(f"{self.url}/check", json={"prompts": list(prompts)})
        except httpx.HTTPError:
            return
        if response.status_code == 400:
            raise ValueError(
                f"reward {self.name!r}: the server {self.url} refuses the prompts ({message_of(response)})"
            )

    def ask(self, body):
        """The answer to a request, as soon as there is one.

        Raises:
            ServiceError: if the server refuses the request.
            Unreachable: if there is no answer within `patience`.
        """
        started, pause, problem = time.monotonic(), 1.0, None
        while True:
            try:
                return self._ask_once(body)
            except Unreachable as error:
                left = self.patience - (time.monotonic() - started)
                if left <= 0:
                    raise
                if problem is None:
                    problem = error
                    logger.warning(f"{error}; trying again for up to {self.patience:.0f} seconds")
            time.sleep(min(pause * random.uniform(0.5, 1), left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _ask_once(self, body):
        place = f"reward {self.name!r}: the server {self.url}"
        try:
            response = self.client.post(self.url, json=body)
        except httpx.TimeoutException as error:
            raise Unreachable(f"{place} has not answered within {self.client.timeout.read:g} seconds") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"{place} cannot be reached ({first_line(error)})") from error
        if response.status_code in WAITS:
            raise Unreachable(f"{place} has an error ({response.status_code}: {message_of(response)})")
        if response.status_code == 401:
            raise ServiceError(f"{place} wants a token: set the environment variable {TOKEN} as on the server")
        if response.status_code == 413:
            raise ServiceError(
                f"{place} takes no larger requests: lower --reward_batch_size, or raise its --max_body_mb"
            )
        if not response.is_success:
            raise ServiceError(f"{place} refuses the images ({response.status_code}: {message_of(response)})")
        try:
            return response.json()
        except ValueError as error:
            raise ServiceError(f"{place} does not answer in JSON") from error


def message_of(response):
    """What a server says about an error, in one line of at most 200 letters."""
    try:
        text = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200] or "no message"


def load(path, revision, device, dtype, name, url=None, format="png", timeout=60.0):
    """Ask for the score of a gray image, so that a server that is not there is found at once.

    Raises:
        ValueError: without an address, or if the server cannot be reached, or refuses the image.
    """
    if path is not None:
        raise ValueError(f"{path!r}: a server has its files itself")
    if url is None:
        raise ValueError(f"it needs an address: --reward_option {name}.url=http://HOST:PORT/NAME")
    reward = Remote(name, url, format, timeout)
    patience, reward.patience = reward.patience, 0
    try:
        reward(torch.full((1, 3, 64, 64), 0.5), ['a "test"'])
    except ServiceError as error:
        raise ValueError(str(error)) from error
    reward.patience = patience
    return reward
