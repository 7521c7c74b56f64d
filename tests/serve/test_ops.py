"""Running the server: keys, origins, hosts, ids, logs, readiness, clients that go, and the end."""

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
HELLO = {"model": "Qwen", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
LONG = HELLO | {"max_tokens": 800, "ignore_eos": True, "n": 4}  # far from done when the tests have done what they do
ENDLESS = HELLO | {"max_tokens": 8000, "ignore_eos": True, "n": 64}

ASK = httpx.Client(verify=False, timeout=60)  # no TLS here; without it a client is made in no time


def answers(server: Any) -> bool:
    return ASK.post(server.url + CHAT, json=HELLO).status_code == 200


# Keys


@pytest.fixture(scope="module")
def keyed(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\nfrom-file\n\n  second-in-file  \n")
    return start_server("qwen1", "--api-key", "from-flag", "--api-key", "other-flag", "--api-key-file", str(file))


@pytest.mark.parametrize("key", ["from-flag", "other-flag", "from-file", "second-in-file"])
def test_every_key_opens(keyed: Any, key: str) -> None:
    openai.OpenAI(base_url=keyed.openai, api_key=key).models.list()
    assert ASK.get(keyed.openai + "/models", headers={"x-api-key": key}).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Basic from-flag"}, {"authorization": "Bearer"}, {"x-api-key": ""}]
)
@pytest.mark.parametrize(
    "path", ["/v1/models", CHAT, "/metrics", "/tokenize", "/api/v1/models", "/nothing", "//health"]
)
def test_without_a_key_nothing_that_costs_is_open(keyed: Any, path: str, headers: dict[str, str]) -> None:
    for method in ("GET", "POST"):
        answer = ASK.request(method, keyed.url + path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json() if path.startswith("/api/v1/") else answer.json()["error"]
        assert error["code"] == ("InvalidApiKey" if path.startswith("/api/v1/") else "invalid_api_key")


def test_openais_client_knows_a_wrong_key(keyed: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=keyed.openai, api_key="from-fla").models.list()


@pytest.mark.parametrize("path", ["/health", "/ping", "/docs", "/openapi.json"])
def test_what_costs_nothing_is_open(keyed: Any, path: str) -> None:
    assert ASK.get(keyed.url + path).status_code == 200


def test_probes_may_ask_for_the_head_alone(server: Any) -> None:
    assert (ASK.head(server.url + "/health").status_code, ASK.head(server.url + "/health").content) == (200, b"")


def test_keys_are_in_no_log(keyed: Any) -> None:
    ASK.get(keyed.url + "/v1/models?key=from-flag", headers={"authorization": "Bearer wrong-secret"})
    ASK.get(keyed.url + "/v1/models", headers={"authorization": "Bearer from-file"})
    log = keyed.log.read_text()
    for secret in ("from-flag", "from-file", "wrong-secret"):
        assert secret not in log


# Origins and hosts


@pytest.fixture(scope="module")
def shared(start_server: Any) -> Any:
    """A server for pages of two origins, with a key and JSON logs."""
    return start_server(
        *("qwen1", "--api-key", "k", "--log-format", "json"),
        *("--cors-origin", "https://chat.example.com", "--cors-origin", "http://localhost:3000"),
    )


def preflight(server: Any, origin: str) -> httpx.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return ASK.options(server.url + CHAT, headers={"origin": origin, **asked})


def test_pages_of_given_origins_may_ask(shared: Any) -> None:
    for origin in ("https://chat.example.com", "http://localhost:3000"):
        answer = preflight(shared, origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers
        headers = {"origin": origin, "authorization": "Bearer k"}
        real = ASK.post(shared.url + CHAT, json=HELLO, headers=headers)
        assert real.status_code == 200
        assert real.headers["access-control-allow-origin"] == origin
        assert "origin" in real.headers["vary"].lower()


def test_a_page_that_may_ask_can_read_errors(shared: Any) -> None:
    answer = ASK.get(shared.openai + "/models", headers={"origin": "https://chat.example.com"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://chat.example.com"
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    "origin", ["https://chat.example.com.evil.example", "https://evil.example", "null", "http://chat.example.com"]
)
def test_pages_of_other_origins_may_not(shared: Any, origin: str) -> None:
    assert "access-control-allow-origin" not in preflight(shared, origin).headers
    answer = ASK.get(shared.openai + "/models", headers={"origin": origin, "authorization": "Bearer k"})
    assert "access-control-allow-origin" not in answer.headers


def test_without_origins_no_page_of_another_may_ask(server: Any) -> None:
    answer = preflight(server, "http://localhost:3000")
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "192.168.0.9", "[::2]:1", ""]
)
def test_names_that_mean_other_machines_are_refused_without_a_key(server: Any, host: str) -> None:
    answer = ASK.get(server.url + "/health", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.9.9.9:8000", "[::1]:8000", "kiloq.localhost"]
)
def test_names_that_mean_this_machine_are_known(server: Any, host: str) -> None:
    assert ASK.get(server.url + "/health", headers={"host": host}).status_code == 200


def test_a_key_makes_any_host_good(shared: Any) -> None:
    assert ASK.get(shared.url + "/health", headers={"host": "behind.a.proxy.example"}).status_code == 200


# Ids and the log


@pytest.mark.parametrize("given", ["abc-123", "a.b:c_d", "x" * 128])
def test_a_clients_request_id_is_kept(server: Any, given: str) -> None:
    assert ASK.get(server.url + "/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "é", "a/b"])
def test_an_odd_request_id_is_replaced(server: Any, given: str) -> None:
    got = ASK.get(server.url + "/nothing", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", got)


def logged(server: Any, request_id: str) -> dict[str, Any]:
    """The line of a request; it is written just after the answer, so another request comes in between."""
    ASK.get(server.url + "/health")
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["id"] == request_id]
    return line


def test_the_log_tells_of_an_answer_but_not_what_was_said(shared: Any) -> None:
    secret = "xylophone"
    body = HELLO | {"messages": [{"role": "user", "content": f"Say {secret}."}]}
    headers = {"authorization": "Bearer k", "x-request-id": "told"}
    answer = ASK.post(shared.url + CHAT, json=body, headers=headers)
    line = logged(shared, "told")
    assert (line["method"], line["path"], line["status"], line["end"]) == ("POST", CHAT, 200, "done")
    assert line["client"].startswith("127.0.0.1:")
    usage = answer.json()["usage"]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]
    assert 0 < line["ttft_ms"] <= line["total_ms"]
    assert secret not in shared.log.read_text()


def test_the_log_tells_of_a_refusal(shared: Any) -> None:
    ASK.post(shared.url + CHAT, json={}, headers={"authorization": "Bearer k", "x-request-id": "refused"})
    line = logged(shared, "refused")
    assert (line["status"], line["end"], line["prompt_tokens"]) == (400, "refused", None)


# Clients that go


def used(server: Any, name: str) -> float:
    text = ASK.get(server.url + "/metrics").text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def wait_for(is_so: Callable[[], bool]) -> None:
    """Asks until it is so; each question is a request, which the server answers between two steps at the earliest."""
    for _ in range(5000):
        if is_so():
            return
    raise AssertionError("it never was so")


def wait_until_free(server: Any) -> None:
    wait_for(lambda: not used(server, "kiloq_sequences_running") and not used(server, "kiloq_cache_blocks_used"))
    assert answers(server)


def open_post(server: Any, body: dict[str, object]) -> socket.socket:
    where = urlsplit(server.url)
    content = json.dumps(body).encode()
    connection = socket.create_connection((where.hostname, where.port), timeout=60)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_stream_whose_client_goes_frees_its_blocks(server: Any) -> None:
    with ASK.stream("POST", server.url + CHAT, json=ENDLESS | {"stream": True}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        wait_for(lambda: used(server, "kiloq_cache_blocks_used") > 0)
    wait_until_free(server)


def test_a_whole_answer_whose_client_goes_frees_its_blocks(server: Any) -> None:
    before = used(server, "kiloq_generated_tokens_total")
    connection = open_post(server, LONG)
    wait_for(lambda: used(server, "kiloq_generated_tokens_total") > before)
    assert used(server, "kiloq_sequences_running")
    connection.close()
    wait_until_free(server)
    assert used(server, "kiloq_generated_tokens_total") - before < 3200


def test_a_queued_request_whose_client_goes_is_never_begun(start_server: Any) -> None:
    server = start_server("qwen1", "--max-batch", "1")
    with ASK.stream("POST", server.url + CHAT, json=ENDLESS | {"stream": True}) as stream:
        lines = stream.iter_lines()  # kept: a generator that nobody holds closes the stream
        next(lines)
        waiting = [open_post(server, LONG | {"stream": is_stream}) for is_stream in (True, False)]
        wait_for(lambda: used(server, "kiloq_sequences_waiting") > 63)
        for connection in waiting:
            connection.close()
        wait_for(lambda: used(server, "kiloq_sequences_waiting") <= 63)
        assert used(server, "kiloq_sequences_running") == 1
    wait_until_free(server)


# Limits


def test_a_full_queue_sends_requests_away_for_a_while(start_server: Any) -> None:
    server = start_server("qwen1", "--max-batch", "1", "--max-queue", "1")
    client = openai.OpenAI(base_url=server.openai, api_key="none", max_retries=0)
    with ASK.stream("POST", server.url + CHAT, json=ENDLESS | {"stream": True}) as stream:
        lines = stream.iter_lines()  # kept: a generator that nobody holds closes the stream
        next(lines)
        answer = ASK.post(server.url + CHAT, json=HELLO)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="Qwen", messages=[{"role": "user", "content": "Hello"}])
        assert ASK.get(server.url + "/health").status_code == 200
    wait_until_free(server)


# The end


@pytest.fixture
def own(start_server: Any) -> Iterator[Any]:
    """A server that the test may end."""
    server = start_server("qwen1", "--drain-timeout", "300")  # a machine may be slow
    yield server
    server.process.kill()
    server.process.wait(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_end_before_the_server_does(own: Any, number: signal.Signals) -> None:
    body = LONG | {"stream": True, "stream_options": {"include_usage": True}}
    with ASK.stream("POST", own.url + CHAT, json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        own.process.send_signal(number)
        wait_for(lambda: ASK.get(own.url + "/health").status_code == 503)
        late = ASK.post(own.url + CHAT, json=HELLO)
        assert late.status_code == 503
        assert late.headers["retry-after"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 3200
    assert own.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        ASK.get(own.url + "/health")


def test_a_second_signal_cuts(own: Any) -> None:
    with ASK.stream("POST", own.url + CHAT, json=ENDLESS | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        own.process.send_signal(signal.SIGTERM)
        wait_for(lambda: ASK.get(own.url + "/health").status_code == 503)
        own.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "busy"
    assert own.process.wait(30) == 128 + signal.SIGTERM
    assert "Traceback" not in Path(own.log).read_text()
