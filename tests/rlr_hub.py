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
"""A small Hub on the loopback interface, that the real client of huggingface_hub talks to in the tests."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub:
    """Serves files of repositories and refuses others as the Hub does; use it as a context manager.

    Args:
        files: `{(repository, revision): {file name: bytes}}`; a commit is made up for each.
        refused: `{repository: (HTTP status, error code of the Hub)}`.
    """

    def __init__(self, files, refused=None):
        self.files = files
        self.refused = refused or {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.respond(with_body=False)

            def do_GET(self):
                self.respond(with_body=True)

            def respond(self, with_body):
                status, headers, body = hub.answer(self.path.split("?")[0])
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
        owner, name, kind, revision, file = ([*path.strip("/").split("/", 4), ""] + [""] * 4)[:5]
        repository = f"{owner}/{name}"
        if repository in self.refused:
            status, code = self.refused[repository]
            return status, {"X-Error-Code": code}, b""
        if kind != "resolve":
            return 404, {}, b""
        # After the first answer the client asks for the commit that it was told.
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

    @staticmethod
    def commit(repository, revision):
        return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
