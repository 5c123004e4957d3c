"""A small server that speaks the Hub's protocol, for tests that go through `huggingface_hub`'s own client over HTTP.

    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)  # read when huggingface_hub is imported: run clients elsewhere

It holds repositories in memory, each a list of commits, and serves what a push and a load ask for: create, preupload,
LFS (one part and several), commit (ndjson), resolve (HEAD, redirects to LFS, ranges), model info, tree, whoami. As on
the Hub, LFS content lies on a host of another name, which gets no token. Writing needs the token `HubServer.token`. A
request that it does not know is answered with 501 and noted in `unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# As on the Hub: by name, or by size.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
LFS_SIZE = 10 * 2**20


@dataclass
class StoredFile:
    data: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Commit:
    title: str
    files: dict[str, StoredFile]
    oid: str


@dataclass
class Repository:
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def commit(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        history = self.branches[branch]
        names = "".join(f"{path}{file.sha256}" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{len(history)}{title}{names}".encode()).hexdigest()
        history.append(Commit(title, files, oid))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        """A commit by branch or by its own name; an empty one for a branch without commits."""
        if revision in self.branches:
            history = self.branches[revision]
            return history[-1] if history else Commit("initial commit", {}, "0" * 40)
        commits = [commit for history in self.branches.values() for commit in history]
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Fault:
    method: str
    path: str  # regular expression
    status: int
    times: int


class HubServer:
    """Serves at `endpoint` while its context is open.

    Args:
        part_size: LFS files larger than this many bytes are uploaded in parts of this size; None: all in one.
    """

    user = "me"
    token = "hf_token_of_the_tests"

    def __init__(self, part_size: int | None = None):
        self.part_size = part_size
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.unknown: list[str] = []
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        port = self._http.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    # ---- what tests look at and set up ----

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo_id].find(revision)
        return {path: file.data for path, file in commit.files.items()} if commit else {}

    def titles(self, repo_id: str, branch: str = "main") -> list[str]:
        return [commit.title for commit in self.repositories[repo_id].branches[branch]]

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path matches with this status."""
        self.faults.append(Fault(method, path, status, times))

    def answered(self, method: str, path: str) -> list[int]:
        """The statuses that requests of this kind got."""
        return [code for verb, where, code in self.requests if verb == method and re.search(path, where)]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


REPO = r"(?P<repo>[^/]+/[^/]+)"
# Method, path, name of the handler's method; the groups are its arguments. Writing ones need the token.
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", r"/api/agent-harnesses", "harnesses"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
    ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w{64})(/(?P<part>\d+))?", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>\w{64})/complete", "lfs_complete"),
    ("GET", r"/lfs/(?P<oid>\w{64})", "lfs_get"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
NEEDS_TOKEN = ("whoami", "create", "preupload", "commit", "branch", "lfs_batch")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self._read_body()
        fault = self.hub.fault_for(self.command, url.path)
        if fault is not None:
            return self._error(fault.status, "", "a fault that the test asked for")
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if verb == method and match:
                if name in NEEDS_TOKEN and self.headers["Authorization"] != f"Bearer {self.hub.token}":
                    return self._error(401, "", "Invalid username or password.")
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    return getattr(self, name)(**arguments)
        self.hub.unknown.append(f"{self.command} {self.path}")
        return self._error(501, "", f"this server does not know {self.command} {url.path}")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ---- answers ----

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, Content_Type="application/json", X_Error_Message=message, **headers)

    def _find(self, repo: str, revision: str) -> Commit | None:
        """The commit; None after an error was sent."""
        if repo not in self.hub.repositories:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        commit = self.hub.repositories[repo].find(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _send_file(self, data: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self._send(200, data, Accept_Ranges="bytes", **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        content_range = f"bytes {start}-{end}/{len(data)}"
        return self._send(206, data[start : end + 1], Content_Range=content_range, **headers)

    # ---- the API ----

    def whoami(self) -> None:
        self._json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def harnesses(self) -> None:
        self._json({"standardEnvVars": [], "harnesses": {}})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        exists = repo in self.hub.repositories
        self.hub.repositories.setdefault(repo, Repository())
        self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo}, 409 if exists else 200)

    def branch(self, repo: str, branch: str) -> None:
        commit = self._find(repo, "main")
        if commit is None:
            return None
        branches = self.hub.repositories[repo].branches
        if branch in branches:
            return self._error(409, "", "Reference already exists")
        branches[branch] = list(branches["main"])
        return self._json({})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self._find(repo, revision)
        if commit is None:
            return

        def answer(file: dict) -> dict:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            known = commit.files.get(file["path"])
            oid = (known.sha256 if known.is_lfs else known.git_oid) if known else None
            return {
                "path": file["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
                "oid": oid,
            }

        self._json({"files": [answer(file) for file in json.loads(self.body)["files"]], "commitOid": commit.oid})

    def lfs_batch(self, repo: str) -> None:
        def answer(wanted: dict) -> dict:
            oid, size = wanted["oid"], wanted["size"]
            result = {"oid": oid, "size": size}
            url = f"{self.hub.storage}/lfs/{oid}"
            part = self.hub.part_size
            if oid in self.hub.lfs:
                return result  # already here: nothing to do
            if part is None or size <= part:
                return result | {"actions": {"upload": {"href": url}}}
            urls = {str(n): f"{url}/{n}" for n in range(1, -(-size // part) + 1)}
            return result | {
                "actions": {"upload": {"href": f"{url}/complete", "header": {"chunk_size": str(part)} | urls}}
            }

        self._json({"transfer": "basic", "objects": [answer(wanted) for wanted in json.loads(self.body)["objects"]]})

    def lfs_put(self, oid: str, part: str | None = None) -> None:
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        elif not self._store(oid, self.body):
            return
        self._send(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def lfs_complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        data = b"".join(parts[sent["partNumber"]] for sent in json.loads(self.body)["parts"])
        if self._store(oid, data):
            self._json({})

    def _store(self, oid: str, data: bytes) -> bool:
        if hashlib.sha256(data).hexdigest() != oid:
            self._error(400, "", "the content is not what its name says")
            return False
        self.hub.lfs[oid] = data
        return True

    def commit(self, repo: str, revision: str) -> None:
        parent = self._find(repo, revision)
        if parent is None:
            return None
        files, title = dict(parent.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._error(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = StoredFile(self.hub.lfs[value["oid"]], is_lfs=True)
            else:
                return self._error(501, "", f"this server does not know the operation {key}")
        commit = self.hub.repositories[repo].commit(revision, title, files)
        return self._json(
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit.oid}"}
        )

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self._find(repo, revision)
        if commit is not None:
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            content = {"_id": repo, "id": repo, "modelId": repo, "private": False, "tags": [], "siblings": siblings}
            self._json(content | {"sha": commit.oid, "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        commit = self._find(repo, revision)
        if commit is None:
            return None
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            return self._error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries: dict[str, dict] = {}
        for path, file in sorted(inside.items()):
            first, _, rest = path.removeprefix(prefix).partition("/")
            if rest and self.query.get("recursive", "false").lower() not in ("true", "1"):
                entries[first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
                continue
            entry = {"type": "file", "path": path, "oid": file.git_oid, "size": len(file.data)}
            lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.is_lfs else {}
            entries[path] = entry | lfs
        return self._json(list(entries.values()))

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._find(repo, revision)
        if commit is None:
            return None
        file = commit.files.get(path)
        if file is None:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X_Repo_Commit": commit.oid}
        if not file.is_lfs:
            return self._send_file(file.data, ETag=f'"{file.git_oid}"', **headers)
        headers |= {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(len(file.data))}
        return self._send(302, Location=f"{self.hub.storage}/lfs/{file.sha256}", **headers)

    def lfs_get(self, oid: str) -> None:
        self._send_file(self.hub.lfs[oid], ETag=f'"{oid}"')
