"""Hub ids: one spelling, only the files that are needed, resumed, hash-checked, and clear words when it fails.

A small server on this machine stands in for the hub; each run of ours is a process of its own, as for a person.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest

from kiloq.checkpoint.hub import ModelId, bundled, download, parse_id, resolve
from kiloq.errors import CheckpointError

REPO = "Qwen/Qwen-Tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 * 2**20  # what the hub library writes at once


@dataclass
class FakeHub:
    """What the server serves and what it was asked. Files over 1,000 bytes are LFS files."""

    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)  # "GET /path [range]" in order
    cut: list[int] = field(default_factory=list)  # large GETs end after so many bytes; -1 answers 500
    damage: bool = False
    url: str = ""

    def listing(self) -> list[dict[str, object]]:
        rows = []
        for name, data in self.files.items():
            row: dict[str, object] = {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if len(data) > 1000:
                row["lfs"] = {"sha256": sha256(data), "oid": sha256(data), "size": len(data), "pointerSize": 130}
            rows.append({"rfilename": name, "path": name, "type": "file", "blobId": row["oid"], **row})
        return rows


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {wanted}".strip())
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            self.reply(json.dumps({"id": REPO, "sha": COMMIT, "siblings": self.hub.listing()}).encode())
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self.reply(json.dumps(self.hub.listing()).encode())
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.send_file(self.hub.files[path.split("/", 5)[5]], wanted)
        elif path == f"/api/v1/models/{REPO}/repo/files":  # ModelScope
            rows = [{"Path": n, "Type": "blob", "Size": len(d), "Sha256": sha256(d)} for n, d in self.hub.files.items()]
            self.reply(json.dumps({"Code": 200, "Success": True, "Data": {"Files": rows}}).encode())
        elif path == f"/api/v1/models/{REPO}/repo":
            name = parse_qs(urlsplit(self.path).query)["FilePath"][0]
            self.send_file(self.hub.files[name], wanted)
        else:
            self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def send_file(self, data: bytes, wanted: str) -> None:
        large = len(data) > 1000
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data) if large else hashlib.sha1(data).hexdigest()}"'}
        first = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        body = bytes(len(data)) if self.hub.damage and large else data
        body = body[first:]
        cut = self.hub.cut.pop(0) if self.hub.cut and large and self.command == "GET" else len(body)
        if cut < 0:
            self.reply(b"", 500)
        else:
            self.reply(body, 206 if first else 200, headers, stop=cut)

    def reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, stop: int = 10**9) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    content = FakeHub(
        files={
            "config.json": b'{"model_type": "qwen"}',
            "generation_config.json": b"{}",
            "qwen.tiktoken": os.urandom(2000),
            "chat_template.jinja": b"{{ messages }}",
            "LICENSE": b"terms",
            "model.safetensors": os.urandom(5000),
            "pytorch_model.bin": os.urandom(5000),
            "modeling_qwen.py": b"raise SystemExit",
            "README.md": b"hello",
            "onnx/model.safetensors": os.urandom(3000),
            "onnx/config.json": b"{}",
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": content}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    content.url = f"http://127.0.0.1:{server.server_port}"
    yield content
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import os, sys
from kiloq.checkpoint import hub
from kiloq.errors import KiloqError
try:
    for call in sys.argv[2:]:
        print(getattr(hub, call)(sys.argv[1], cache_dir=os.environ.get("KILOQ_TEST_CACHE")))
except KiloqError as error:
    sys.exit(f"{error}")
assert "torch" not in sys.modules or "modelscope" in sys.modules  # its library imports torch where it finds it
"""


@dataclass
class Person:
    """Someone with a cache of their own, who calls functions of hub.py one after another."""

    home: Path
    url: str

    def run(self, *calls: str, model: str = REPO, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {
            "HF_ENDPOINT": self.url,
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_CACHE": str(self.home / "modelscope"),
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        env.pop("HF_HUB_CACHE", None)
        command = [sys.executable, "-c", SCRIPT, model, *calls]
        return subprocess.run(command, env=env, cwd=self.home, capture_output=True, text=True, check=False)

    def folder(self, *calls: str, model: str = REPO, **environment: str) -> Path:
        done = self.run(*calls, model=model, **environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.splitlines()[-1])

    def error(self, *calls: str, model: str = REPO, **environment: str) -> str:
        done = self.run(*calls, model=model, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr.splitlines()[-1]


@pytest.fixture
def person(hub: FakeHub, tmp_path: Path) -> Person:
    return Person(tmp_path, hub.url)


def test_only_the_needed_files_come_and_the_second_time_nothing_is_asked(hub: FakeHub, person: Person) -> None:
    folder = person.folder("resolve")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "qwen.tiktoken",
        "chat_template.jinja",
        "LICENSE",
        "model.safetensors",
        ".kiloq-verified",
    }
    for name in ("model.safetensors", "qwen.tiktoken", "config.json"):
        assert (folder / name).read_bytes() == hub.files[name]
    hub.requests.clear()
    assert person.folder("resolve", "resolve") == folder
    assert hub.requests == []
    assert person.folder("resolve", "download", HF_HUB_OFFLINE="1") == folder


def test_old_weights_come_where_there_is_no_safetensors(hub: FakeHub, person: Person) -> None:
    del hub.files["model.safetensors"]
    hub.files["training_args.bin"] = os.urandom(2000)
    folder = person.folder("resolve")
    assert (folder / "pytorch_model.bin").read_bytes() == hub.files["pytorch_model.bin"]
    assert not (folder / "training_args.bin").exists()


def test_an_interrupted_file_goes_on_where_it_ended(hub: FakeHub, person: Person) -> None:
    hub.files["model.safetensors"] = os.urandom(1024) * (25 * 1024)  # 25 MiB
    del hub.files["qwen.tiktoken"]
    hub.cut = [15 * 2**20, -1]  # the line drops after 15 MiB, and the hub is down when it is asked again
    assert "cannot be reached" in person.error("resolve")
    large = [line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]
    assert [line.split()[2:] for line in large] == [[], [f"bytes={CHUNK}-"]]
    hub.requests.clear()
    folder = person.folder("resolve")
    large = [line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]
    assert [line.split()[2:] for line in large] == [[f"bytes={CHUNK}-"]]
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_damaged_file_is_refused_and_removed(hub: FakeHub, person: Person) -> None:
    hub.damage = True
    message = person.error("resolve")
    assert "model.safetensors" in message
    assert "sha256" in message
    assert not [path for path in person.home.rglob("*") if path.is_file() and path.stat().st_size == 5000]
    hub.damage = False
    assert (person.folder("resolve") / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_what_another_program_left_in_the_cache_is_checked_once(hub: FakeHub, person: Person) -> None:
    folder = person.folder("resolve")
    (folder / ".kiloq-verified").unlink()
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(bytes(5000))
    message = person.error("resolve")
    assert "model.safetensors" in message
    assert "damaged" in message
    assert not blob.exists()
    assert (person.folder("resolve") / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_offline_one_error_says_what_to_do(person: Person) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        message = person.error("resolve", **environment)
        for words in (REPO, "not on this machine", f"kiloq download {REPO}", "folder", "ms:"):
            assert words in message


def test_an_id_that_no_hub_knows_may_have_been_a_folder(person: Person) -> None:
    (person.home / "models" / "my-qwen").mkdir(parents=True)
    message = person.error("resolve", model="models/my-qwn")
    for words in ("no folder 'models/my-qwn'", "Hugging Face", "Did you mean the folder 'models/my-qwen'?"):
        assert words in message


def test_modelscope_ids_come_from_there_and_once(hub: FakeHub, person: Person) -> None:
    pytest.importorskip("modelscope", reason="the modelscope extra is not installed")
    folder = person.folder("resolve", model="ms:qwen/Qwen-Tiny")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "qwen.tiktoken",
        "chat_template.jinja",
        "LICENSE",
        "model.safetensors",
        ".kiloq-verified",
    }
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    hub.requests.clear()
    assert person.folder("resolve", model=f"modelscope:{REPO}") == folder
    assert hub.requests == []
    assert "no model Qwen/Nope on ModelScope" in person.error("resolve", model="ms:Qwen/Nope")


@pytest.mark.parametrize("model", [REPO, f"ms:{REPO}"])
def test_a_cache_of_ones_own_takes_the_place_of_the_hubs(hub: FakeHub, person: Person, model: str) -> None:
    if model.startswith("ms:"):
        pytest.importorskip("modelscope", reason="the modelscope extra is not installed")
    folder = person.folder("resolve", model=model, KILOQ_TEST_CACHE="own")
    assert folder.is_relative_to(person.home / "own") or folder.is_relative_to("own")
    assert (person.home / folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    large = [path for path in person.home.rglob("*") if path.is_file() and path.stat().st_size == 5000]
    assert all(path.is_relative_to(person.home / "own") for path in large)
    hub.requests.clear()
    assert person.folder("resolve", model=model, KILOQ_TEST_CACHE="own") == folder
    assert hub.requests == []


def test_modelscope_without_its_package_names_the_extra(person: Person) -> None:
    (person.home / "modelscope.py").write_text("raise ImportError")
    message = person.error("resolve", model=f"ms:{REPO}", PYTHONPATH=str(person.home))
    assert "pip install 'kiloq[modelscope]'" in message


@pytest.mark.parametrize(
    ("model", "hub_name"),
    [
        ("Qwen/Qwen-7B-Chat", "huggingface"),
        ("qwen/Qwen-7B-Chat", "huggingface"),
        ("hf:Qwen/Qwen-7B-Chat", "huggingface"),
        ("https://huggingface.co/Qwen/Qwen-7B-Chat/", "huggingface"),
        ("ms:qwen/Qwen-7B-Chat", "modelscope"),
        ("modelscope:Qwen/Qwen-7B-Chat", "modelscope"),
        ("https://www.modelscope.cn/models/qwen/Qwen-7B-Chat", "modelscope"),
        ("https://modelscope.cn/models/Qwen/Qwen-7B-Chat", "modelscope"),
    ],
)
def test_every_spelling_is_one_id(model: str, hub_name: str) -> None:
    assert parse_id(model) == ModelId(hub_name, "Qwen/Qwen-7B-Chat")


def test_the_hub_can_be_named_apart() -> None:
    assert parse_id("qwen/Qwen-7B", hub="modelscope") == ModelId("modelscope", "Qwen/Qwen-7B")


@pytest.mark.parametrize(
    "model",
    [
        "./models/qwen",
        "/no/such/folder",
        "~/qwen",
        "a/b/c",
        "../x",
        "Qwen-7B",
        "",
        "a b/c",
        "a--b/c",
        "a/b.git",
        "a/" + 96 * "b",
    ],
)
def test_a_path_that_is_not_there_is_no_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder on this machine nor a hub id"):
        resolve(model)


@pytest.mark.parametrize("model", ["~nosuchuser/x", f"a/{5000 * 'b'}", f"{300 * 'a'}/b"])
def test_a_path_that_cannot_be_is_one_error(model: str) -> None:
    for call in (resolve, download):
        with pytest.raises(CheckpointError, match=model[:200]) as caught:
            call(model)
        assert len(str(caught.value)) < 500


def test_a_folder_is_itself_and_a_file_is_refused(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


def test_an_unknown_bundled_model_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no bundled model 'kiloq-huge'"):
        bundled("kiloq-huge")
