"""A Hugging Face hub with one dataset, on loopback: what its client libraries ask for, and no more.

`python hub.py FOLDER` serves the files in FOLDER as the dataset tales/of-the-mill and prints its port; each request is
a line on standard error.
"""

import hashlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "tales/of-the-mill"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers for one dataset at one commit."""

    protocol_version = "HTTP/1.1"

    def entry(self, path):
        """What the hub says of a file or a folder."""
        relative = path.relative_to(self.server.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": relative, "oid": "0" * 40, "size": 0}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": relative, "oid": oid, "size": path.stat().st_size}

    def say(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if "/paths-info/" in self.path:
            try:
                paths = json.loads(asked)["paths"]
            except ValueError:
                paths = [unquote(part.split("=", 1)[1]) for part in asked.split("&") if part.startswith("paths=")]
            found = [self.server.folder / path for path in paths]
            return self.say([self.entry(path) for path in found if path.exists()])
        return self.missing()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/datasets/{NAME}/tree/"):
            below = path.split("/tree/", 1)[1].split("/", 1)
            folder = self.server.folder / (below[1] if len(below) > 1 else "")
            if not folder.is_dir():
                return self.missing()
            walk = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
            return self.say([self.entry(each) for each in sorted(walk)])
        if path.startswith(f"/api/datasets/{NAME}"):
            files = [each for each in sorted(self.server.folder.rglob("*")) if each.is_file()]
            siblings = [{"rfilename": each.relative_to(self.server.folder).as_posix()} for each in files]
            modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(0))
            known = {"private": False, "tags": [], "downloads": 0, "lastModified": modified}
            return self.say({"id": NAME, "sha": COMMIT, "siblings": siblings, **known})
        if path.startswith(f"/datasets/{NAME}/resolve/"):
            file = self.server.folder / path.split("/resolve/", 1)[1].split("/", 1)[1]
            if file.is_file():
                return self.send(file)
        return self.missing()

    def send(self, file):
        data, code = file.read_bytes(), 200
        size = len(data)
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(size, int(last or size - 1) + 1)
            data, code = data[start:stop], 206
        self.send_response(code)
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, form, *values):
        print(self.command, self.path, self.headers.get("Range", ""), file=sys.stderr, flush=True)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = Path(sys.argv[1]).resolve()
    print(server.server_port, flush=True)
    server.serve_forever()
