"""The page's files: what browsers are told about them, whose they are, and that none of them needs another machine."""

import gzip
import hashlib
import http.client
import re
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest

from kiloq.serve.pages import CONTENT_SECURITY_POLICY, MEDIA_TYPES, WEB

VENDOR = WEB / "vendor"
OURS = [path for path in WEB.rglob("*") if path.is_file() and VENDOR not in path.parents]
SERVED = sorted(path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.suffix in MEDIA_TYPES)


@pytest.fixture(scope="module")
def client(server: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url)


def prefix_of(client: httpx.Client) -> str:
    found = re.search(r'"(web/\w{12})/js/main.js"', client.get("/").text)
    assert found
    return found[1]


@pytest.mark.parametrize("path", ["/", "/web/x/js/main.js", "/web/x/no-such-file.js"])
def test_every_answer_forbids_what_the_page_does_not_need(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_every_file_arrives_whole_with_its_type_and_is_kept_for_good(client: httpx.Client) -> None:
    prefix = prefix_of(client)
    for name in SERVED:
        if name == "index.html":
            continue
        answer = client.get(f"/{prefix}/{name}")
        assert answer.content == (WEB / name).read_bytes(), name
        assert answer.headers["content-type"].startswith(MEDIA_TYPES[Path(name).suffix]), name
        assert "immutable" in answer.headers["cache-control"]


def test_the_page_is_asked_for_again_and_sent_only_when_it_changed(client: httpx.Client) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200
    assert client.head("/").status_code == 200


def test_an_address_of_another_version_is_answered_but_not_kept(client: httpx.Client) -> None:
    assert client.get("/web/old/js/main.js").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("accepts", ["gzip", "identity"])
def test_texts_are_compressed_only_for_who_asks(server: Any, accepts: str) -> None:
    request = urllib.request.Request(f"{server.url}/web/x/js/chat.js", headers={"Accept-Encoding": accepts})
    with urllib.request.urlopen(request) as answer:  # does not decompress on its own
        body, encoding = answer.read(), answer.headers["Content-Encoding"]
    assert encoding == ("gzip" if accepts == "gzip" else None)
    assert (gzip.decompress(body) if encoding else body) == (WEB / "js/chat.js").read_bytes()


@pytest.mark.parametrize("path", ["../pages.py", "..%2Fpages.py", "vendor/VERSIONS.toml", "%2Fetc%2Fpasswd", "js"])
def test_nothing_but_the_pages_files_is_served(server: Any, path: str) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))  # sends a path as it stands
    connection.request("GET", f"/web/x/{path}")
    assert connection.getresponse().status == 404
    connection.close()


def test_our_files_name_no_other_machine() -> None:
    for path in OURS:
        assert not re.findall(r"(?<!xmlns=\")(?<!const SVG = \")\bhttps?://[^\s|)]", path.read_text()), path


def test_index_has_neither_inline_scripts_nor_inline_styles() -> None:
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", page)
    for address in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert address.startswith("web/")
        assert (WEB / address.removeprefix("web/")).is_file()


def test_what_others_wrote_is_unchanged_listed_and_licensed() -> None:
    listed = tomllib.loads((VENDOR / "VERSIONS.toml").read_text())
    assert {path.name for path in VENDOR.iterdir() if path.is_dir()} == set(listed)
    for folder, package in listed.items():
        assert package["integrity"].startswith("sha512-")
        assert (VENDOR / folder / "LICENSE").stat().st_size > 500
        files = {
            path.relative_to(VENDOR / folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (VENDOR / folder).rglob("*")
            if path.is_file() and not path.name.startswith("LICENSE")
        }
        assert files == package["files"]


def test_our_files_are_short() -> None:
    assert all(len(path.read_text().splitlines()) <= 300 for path in OURS)
