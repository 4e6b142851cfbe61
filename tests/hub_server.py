"""A Hub on this machine, for an unmodified `huggingface_hub` whose `HF_ENDPOINT` points here: repositories with
commits, branches and tags, LFS uploads, private repositories and tokens, ranges, and faults on request. In memory;
127.0.0.1 only.

What each address answers follows what the client sends and reads (huggingface_hub 1.x and 2.x).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


OWNER_TOKEN, READER_TOKEN = "hf_owner", "hf_reader"  # the first may write and see private repositories of `org`
USERS = {OWNER_TOKEN: "owner", READER_TOKEN: "reader"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".pkl")


@dataclass
class Repository:
    private: bool
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # commit: path: sha256 of the content
    order: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, str], branch: str, message: str) -> str:
        text = json.dumps([files, self.order, message], sort_keys=True)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.files[commit] = files
        self.order.append(commit)
        self.messages.append(message)
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        return next((commit for commit in self.order if len(revision) >= 7 and commit.startswith(revision)), None)


class Fault:
    """What goes wrong with requests whose address matches: `drop` sends half of the body and closes the connection,
    `cut` sends half of it as if that were all, `status` answers with that number."""

    def __init__(self, pattern: str, kind: str, times: int = 1, status: int = 500, method: str = "GET"):
        self.pattern, self.kind, self.times, self.status, self.method = pattern, kind, times, status, method

    def strikes(self, method: str, path: str) -> bool:
        if self.times > 0 and method == self.method and re.search(self.pattern, path):
            self.times -= 1
            return True
        return False


class HubServer:
    """The server; `url` is what HF_ENDPOINT becomes."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    @contextmanager
    def failing(self, *args, **kwargs):
        fault = Fault(*args, **kwargs)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        repository = self.repositories[repo_id]
        return self.blobs[repository.files[repository.resolve(revision)][path]]

    def put(self, repo_id: str, path: str, content: bytes) -> None:
        """Change one file behind the client's back."""
        repository = self.repositories[repo_id]
        files = dict(repository.files[repository.branches["main"]])
        files[path] = self.store(content)
        repository.commit(files, "main", f"put {path}")

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid


class _Problem(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # (method, pattern of the path, name of the method that answers)
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        """Requests are kept in `hub.requests` instead."""

    def _answer(self) -> None:
        body = self._body()
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, parts.path)), None)
        try:
            if fault is not None and fault.kind == "status":
                raise _Problem(fault.status, "", "a fault on request")
            for method, pattern, name in self.ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, parts.path)):
                    arguments = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        status, headers, content = getattr(self, f"_{name}")(body, **arguments)
                    break
            else:
                raise _Problem(404, "", f"nothing at {self.command} {parts.path}")
        except _Problem as problem:
            status, content = problem.status, json.dumps({"error": problem.message}).encode()
            headers = {"X-Error-Message": problem.message} | ({"X-Error-Code": problem.code} if problem.code else {})
        self.hub.requests.append((self.command, parts.path, status))
        self._send(status, headers, content, fault)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: dict, content: bytes, fault: Fault | None) -> None:
        half = content[: len(content) // 2]
        if fault is not None and fault.kind == "cut":
            content = half
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(half if fault is not None and fault.kind == "drop" else content)
        if fault is not None and fault.kind == "drop":
            self.wfile.flush()
            self.close_connection = True

    # -- who may do what

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Problem(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        hidden = repository is not None and repository.private and self.user != "owner"
        if repository is None or hidden:  # as the Hub: a private repository is not admitted to exist
            if self.user is None:
                raise _Problem(401, "RepoNotFound", "Repository not found")
            raise _Problem(404, "RepoNotFound", "Repository not found")
        if write and self.user != "owner":
            raise _Problem(403 if self.user else 401, "", "You don't have the required permissions")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise _Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -- addresses

    def _json(self, value, status: int = 200):
        return status, {}, json.dumps(value).encode()

    def _whoami(self, body):
        if self.user is None:
            raise _Problem(401, "", "Invalid credentials in Authorization header")
        return self._json(
            {"type": "user", "name": self.user, "orgs": [{"name": "org"}], "auth": {"type": "access_token"}}
        )

    def _validate(self, body):
        import yaml

        content = json.loads(body)["content"]
        header = re.match(r"^---\n(.*?)\n---", content, re.DOTALL)
        try:
            values = yaml.safe_load(header.group(1)) if header else {}
            errors = [] if isinstance(values, dict) else [{"message": "metadata is no mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, body):
        asked = json.loads(body)
        if self.user is None:
            raise _Problem(401, "", "Invalid username or password.")
        if self.user != "owner":
            raise _Problem(403, "", "You don't have the rights to create a model under this namespace")
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if repo_id in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.commit({".gitattributes": self.hub.store(attributes)}, "main", "initial commit")
        return self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def _preupload(self, body, repo, revision):
        self._commit_of(self._repository(repo, write=True), revision)
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        return self._json({"files": files})

    def _lfs(self, body, repo):
        self._repository(repo, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(found)
        return self._json({"transfer": "basic", "objects": objects})

    def _upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Problem(400, "", "The content is not what its sha256 says")
        self.hub.store(body)
        return self._json({})

    def _commit(self, body, repo, revision):
        repository = self._repository(repo, write=True)
        files = dict(repository.files[self._commit_of(repository, revision)])
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Problem(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {path: oid for path, oid in files.items() if not path.startswith(f"{value['path']}/")}
        commit = repository.commit(files, revision, message)
        return self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _tag(self, body, repo, revision):
        repository = self._repository(repo, write=True)
        repository.tags[json.loads(body)["tag"]] = self._commit_of(repository, revision)
        return self._json({})

    def _branch(self, body, repo, revision):
        repository = self._repository(repo, write=True)
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repository.branches[revision] = self._commit_of(repository, start)
        return self._json({})

    def _refs(self, body, repo):
        repository = self._repository(repo)
        refs = {
            kind: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()]
            for kind, names in (("branches", repository.branches), ("tags", repository.tags))
        }
        return self._json({**refs, "converts": []})

    def _info(self, body, repo, revision="main"):
        repository = self._repository(repo)
        commit = self._commit_of(repository, revision)
        siblings = [
            {"rfilename": path, "size": len(self.hub.blobs[oid])} for path, oid in repository.files[commit].items()
        ]
        return self._json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
                "gated": False,
                "disabled": False,
            }
        )

    def _tree(self, body, repo, revision, folder=""):
        repository = self._repository(repo)
        files = repository.files[self._commit_of(repository, revision)]
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        found = []
        for path, oid in sorted(files.items()):
            if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :]):
                item = {"type": "file", "path": path, "size": len(self.hub.blobs[oid]), "oid": oid[:40]}
                if path.endswith(LFS_SUFFIXES):
                    item["lfs"] = {"oid": oid, "size": item["size"], "pointerSize": 134}
                found.append(item)
        if prefix and not found:
            raise _Problem(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return self._json(found)

    def _resolve(self, body, repo, revision, path):
        repository = self._repository(repo)
        commit = self._commit_of(repository, revision)
        oid = repository.files[commit].get(path)
        if oid is None:
            raise _Problem(404, "EntryNotFound", "Entry not found")
        content = self.hub.blobs[oid]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.command == "HEAD" or not asked:
            return 200, headers | ({"Content-Length": str(len(content))} if self.command == "HEAD" else {}), content
        first, last = int(asked.group(1)), int(asked.group(2) or len(content) - 1)
        if first >= len(content):
            raise _Problem(416, "", "Range not satisfiable")
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return 206, headers, part
