"""A bucket of Google Cloud Storage in memory, reached in the two ways in which a run reaches one.

`Server` speaks the part of the JSON API that tensorstore (arrays of checkpoints) uses; `FileSystem` is what
`etils.epath` (all other files) finds under gs://. As in a real bucket there are no folders, objects appear whole, and
nothing can be appended to or renamed in place.
"""

import http.server
import io
import json
import re
import threading
import urllib.parse

import fsspec

OBJECTS: dict[str, tuple[bytes, int]] = {}
"""bucket/name -> content and generation."""
UPLOADS: list[str] = []
"""Names in the order in which they were written."""
_LOCK = threading.Lock()


def put(name: str, data: bytes) -> int:
    with _LOCK:
        generation = OBJECTS.get(name, (b"", 0))[1] + 1
        OBJECTS[name] = (data, generation)
        UPLOADS.append(name)
        return generation


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *given):
        pass

    def _asked(self):
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?", parts.path)
        return match[1], urllib.parse.unquote(match[2] or ""), query

    def _answer(self, code, body=b"", headers=()):
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        bucket, name, query = self._asked()
        if not name:
            prefix = f"{bucket}/"
            names = sorted(
                key.removeprefix(prefix) for key in OBJECTS if key.startswith(prefix + query.get("prefix", ""))
            )
            names = [key for key in names if key >= query.get("startOffset", "")]
            names = [key for key in names if "endOffset" not in query or key < query["endOffset"]]
            items = [
                {"name": key, "size": str(len(OBJECTS[prefix + key][0])), "generation": str(OBJECTS[prefix + key][1])}
                for key in names
            ]
            self._answer(200, json.dumps({"items": items}).encode(), [("Content-Type", "application/json")])
            return
        if f"{bucket}/{name}" not in OBJECTS:
            self._answer(404, b"{}")
            return
        data, generation = OBJECTS[f"{bucket}/{name}"]
        if query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304)
            return
        headers = [("x-goog-generation", str(generation)), ("x-goog-stored-content-length", str(len(data)))]
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, data, headers)
            return
        start = int(asked[1]) if asked[1] else len(data) - int(asked[2])
        stop = min(int(asked[2]) + 1, len(data)) if asked[1] and asked[2] else len(data)
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}"))
        self._answer(206, data[start:stop], headers)

    def do_POST(self):
        bucket, _, query = self._asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{bucket}/{query['name']}"
        if query.get("ifGenerationMatch", str(OBJECTS.get(name, (b"", 0))[1])) != str(OBJECTS.get(name, (b"", 0))[1]):
            self._answer(412, b"{}")
            return
        answer = {"name": query["name"], "generation": str(put(name, data)), "size": str(len(data))}
        self._answer(200, json.dumps(answer).encode(), [("Content-Type", "application/json")])

    def do_DELETE(self):
        bucket, name, _ = self._asked()
        self._answer(204 if OBJECTS.pop(f"{bucket}/{name}", None) else 404)


class FileSystem(fsspec.AbstractFileSystem):
    """Objects by `bucket/name`; a folder is there as long as an object is below it."""

    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        return re.sub(r"^(gs|gcs)://", "", str(path)).strip("/")

    def info(self, path, **options):
        name = self._strip_protocol(path)
        if name in OBJECTS:
            return {"name": name, "size": len(OBJECTS[name][0]), "type": "file"}
        if any(key.startswith(name + "/") for key in OBJECTS):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **options):
        name = self._strip_protocol(path)
        if name in OBJECTS:
            return [self.info(name)] if detail else [name]
        below = {key[len(name) + 1 :].split("/")[0] for key in list(OBJECTS) if key.startswith(name + "/")}
        if not below:
            raise FileNotFoundError(path)
        found = [self.info(f"{name}/{part}") for part in sorted(below)]
        return found if detail else [entry["name"] for entry in found]

    def _open(self, path, mode="rb", **options):
        name = self._strip_protocol(path)
        if mode == "rb":
            if name not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[name][0])
        assert mode == "wb", "objects cannot be appended to"
        return _Upload(name)

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _rm(self, path):
        OBJECTS.pop(self._strip_protocol(path), None)

    def rm_file(self, path):
        self._rm(path)

    def rmdir(self, path):
        pass

    def cp_file(self, path1, path2, **options):
        if self._strip_protocol(path1) in OBJECTS:
            put(self._strip_protocol(path2), OBJECTS[self._strip_protocol(path1)][0])


class _Upload(io.BytesIO):
    def __init__(self, name):
        super().__init__()
        self._name = name

    def close(self):
        if not self.closed:
            put(self._name, self.getvalue())
        super().close()
