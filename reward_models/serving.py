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
"""A server of rewards: `python -m reward_models --serve`.

    POST /NAME      {"prompts": [text], "images": [PNG in base64]}, all of one size, or for the images as they are
                    {"prompts": [text], "shape": [B, 3, H, W], "float32": little-endian numbers in [0, 1] in base64}
    POST /NAME/check  {"prompts": [text]}; whether the reward refuses one
    answer          {"scores": [number]}, or {"error": text} with the status 400 (a bad request, or a prompt that the reward
                    refuses), 401 (no token), 404 (no such reward), 413 (too large) or 500 (the reward has failed)

Each reward lives in a process of its own, which scores one request after the other. If it dies it is started again.
"""

import asyncio
import hmac
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from . import check_options, load_rewards, parse_reward, parse_reward_options, parse_reward_paths
from .loading import first_line
from .remote import TOKEN, from_json, read_texts, shared_token


LOOPBACK = ("127.0.0.1", "localhost", "::1")
_reward = _problem = None  # of a process that scores: its reward, or why it has none


def load_here(name, term, paths, options, size):
    """Load a reward in a process that scores."""
    from accelerate import PartialState

    global _reward, _problem
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the server
    threading.Thread(target=end_with_server, daemon=True).start()
    try:
        _reward = load_rewards({name: term}, paths, options=options, device=PartialState().device, size=size)
    except (ValueError, OSError) as error:
        _problem = first_line(error)


def problem_here():
    """Why a process that scores has no reward, or `None`."""
    return _problem


def end_with_server():
    """End a process that scores when the server ends, in whatever way."""
    multiprocessing.parent_process().join()
    os._exit(1)


def score_here(body, only_check):
    """Score a request in a process that scores, or only check its prompts; returns the status and the answer."""
    from accelerate import PartialState

    try:
        content = json.loads(body)
        images, prompts = (None, read_texts(content["prompts"])) if only_check else from_json(content)
    except Exception as error:  # whatever is sent must not end the server
        return 400, {"error": first_line(error)}
    try:
        _reward.check_prompts(prompts)
        if only_check:
            return 200, {"scores": []}
        (scores,) = _reward(images, prompts, device=PartialState().device).members.values()
    except ValueError as error:
        return 400, {"error": str(error)}
    except Exception as error:
        return 500, {"error": f"{type(error).__name__}: {first_line(error)}"}
    return 200, {"scores": scores.tolist()}


class Worker:
    """The process of a reward.

    Args:
        arguments: of `load_here`.
    """

    def __init__(self, *arguments):
        self.arguments = arguments
        self.turn = asyncio.Lock()
        self.start()

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=load_here, initargs=self.arguments)

    def problem(self):
        """Wait until the reward is loaded; why it cannot be, or `None`."""
        try:
            return self.pool.submit(problem_here).result()
        except BrokenProcessPool:
            return "its process has died"

    async def score(self, body, only_check, request):
        """The status and the answer, in the turn of the request; `None` if its client has gone by then."""
        async with self.turn:
            if await request.is_disconnected():
                return None
            try:
                return await asyncio.get_running_loop().run_in_executor(self.pool, score_here, body, only_check)
            except BrokenProcessPool:
                self.start()
                return 500, {"error": "the process of the reward has died and is started again"}


def route_of(name):
    """The part of the address that a reward has: its name, or that of a custom callable."""
    return name.rpartition(":")[2]


def make_app(workers, max_bytes, token):
    """The ASGI application.

    Args:
        workers: {route: `Worker`}.
        max_bytes: of a request's body.
        token: that a request must have, or `None`.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answer(status, content):
        return JSONResponse(content, status_code=status)

    async def score(request):
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return answer(401, {"error": "no token, or another one"})
        worker = workers.get(request.path_params["route"])
        if worker is None:
            return answer(404, {"error": f"there is no such reward, but {', '.join(workers)}"})
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                return answer(413, {"error": f"the body is larger than {max_bytes} bytes"})
        result = await worker.score(bytes(body), request.url.path.endswith("/check"), request)
        return Response(status_code=499) if result is None else answer(*result)

    routes = [Route(path, score, methods=["POST"]) for path in ("/{route}", "/{route}/check")]
    return Starlette(routes=routes)


def serve(args):
    """Serve the rewards of `args.serve` until somebody stops it.

    Raises:
        ValueError: if a library is missing, two rewards have one name, an address is open to others without a token, or a
            reward cannot be loaded.
        OSError: if the address cannot be listened at.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("--serve needs starlette and uvicorn: pip install starlette uvicorn") from error
    token, terms = shared_token(), parse_reward(args.serve)
    check_service(args, token, terms)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listening:  # before anything large is loaded
        paths, options = parse_reward_paths(args.reward_path), parse_reward_options(args.reward_option)
        workers = {route_of(name): Worker(name, term, paths, options, (64, 64)) for name, term in terms.items()}
        host = f"[{args.host}]" if ":" in args.host else args.host
        for route, worker in workers.items():
            problem = worker.problem()
            if problem is not None:
                raise ValueError(f"--serve: {problem}")
            print(f"http://{host}:{args.port}/{route}", file=sys.stderr, flush=True)
        app = make_app(workers, int(args.max_body_mb * 1e6), token)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def check_service(args, token, terms):
    """Refuse what cannot be served.

    Raises:
        ValueError: saying what it is.
    """
    if args.host not in LOOPBACK and token is None:
        raise ValueError(f"--host {args.host} is open to others: set a token in the environment variable {TOKEN}")
    if len(set(map(route_of, terms))) < len(terms):
        raise ValueError(f"--serve {args.serve!r} has two rewards of one name")
    for term in terms.values():
        if term.weight != 1:
            raise ValueError(f"--serve {term.entry!r}: weights belong to the sum of who asks")
    check_options(parse_reward_options(args.reward_option), terms)
    if not 0 < args.port < 2**16:
        raise ValueError(f"--port {args.port} is not in 1..65535")
    if not 0 < args.max_body_mb < 1e6:
        raise ValueError(f"--max_body_mb {args.max_body_mb} is not above 0, or is a million or more")
