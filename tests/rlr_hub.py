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
"""A small Hub on the loopback interface, for the real client of huggingface_hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.hf_api


class LoopbackHub:
    """Serves files of repositories, and accepts or refuses commits, as the Hub does; use it as a context manager.

    Args:
        files: `{(repository, revision): {file name: bytes}}`; a commit is made up for each.
        refused: `{repository: (HTTP status, error code of the Hub)}`, the answer to every request for it.
        token: what a client needs to create a repository or to commit.
        broken_commits: the number of commits that fail with a server error before one is accepted.

    Attributes:
        url: address of the server, for the environment variable HF_ENDPOINT of other processes.
        commits: `[(repository, summary, {file name: bytes})]` that were accepted.
    """

    def __init__(self, files=None, refused=None, token=None, broken_commits=0):
        self.files = files or {}
        self.refused = refused or {}
        self.token = token
        self.broken_commits = broken_commits
        self.commits = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.respond(*hub.answer(self.path.split("?")[0]), with_body=False)

            def do_GET(self):
                self.respond(*hub.answer(self.path.split("?")[0]))

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                self.respond(*hub.accept(self.path.split("?")[0], body, token))

            def respond(self, status, headers, body, with_body=True):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path):
        """(status, headers, body) of a file, or of an error."""
        parts = path.strip("/").removeprefix("datasets/").split("/", 4)
        owner, name, kind, revision, file = ([*parts, ""] + [""] * 4)[:5]
        repository = f"{owner}/{name}"
        if repository in self.refused:
            status, code = self.refused[repository]
            return status, {"X-Error-Code": code}, b""
        if kind != "resolve":
            return 404, {}, b""
        # After the first answer the client asks for the commit that was in it.
        found = {
            file_name: (self.commit(repository, name), content)
            for (held, name), contents in self.files.items()
            if held == repository and revision in (name, self.commit(repository, name))
            for file_name, content in contents.items()
        }
        if not found:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if file not in found:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": next(iter(found.values()))[0]}, b""
        commit, content = found[file]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def accept(self, path, body, token):
        """(status, headers, body) for a new repository, a card, or one of the two requests of a commit."""
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if token != self.token:
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            return self.json({"url": f"{self.url}/someone/{name}", "name": f"someone/{name}", "id": "1"})
        _, _, owner, name, kind, _ = path.strip("/").split("/")
        if kind == "preupload":
            asked = json.loads(body)["files"]
            answers = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.json({"files": answers})
        if self.broken_commits > 0:
            self.broken_commits -= 1
            return 507, {}, b""  # after a 500 the client would try again for half a minute
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.commits.append((f"{owner}/{name}", lines[0]["value"]["summary"], files))
        oid = hashlib.sha1(body).hexdigest()
        return self.json({"commitUrl": f"{self.url}/{owner}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    @staticmethod
    def json(answer):
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    @staticmethod
    def commit(repository, revision):
        return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()

    def serve_this_process(self, monkeypatch):
        """Let the client of this process, which has read HF_ENDPOINT when it was imported, ask this server."""
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
