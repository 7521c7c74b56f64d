"""The load test against a real `kiloq serve` of the bundled model, and against servers that misbehave."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiloq.bench.serve_clients import Target, closed_loop, fetch
from kiloq.bench.serve_exchange import Ask, Outcome
from kiloq.bench.serve_load import LengthMix
from kiloq.bench.serve_process import ServerProcess, cpu_seconds, kiloq_server, memory_bytes
from kiloq.bench.serve_run import Load, Progress, run_load
from kiloq.cli.main import run
from kiloq.errors import KiloqError, RequestError

SHORT = LengthMix(40, 0.5, 12, 0.5)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    running = kiloq_server(None)
    yield running
    running.stop()


def test_every_request_is_answered_and_counted(server: ServerProcess) -> None:
    seen: list[str] = []
    load = Load(requests=10, clients=4, lengths=SHORT, endpoint="completions")
    result = asyncio.run(run_load(Target(url=server.url), load, pid=server.pid, watch=lambda p: seen.append(str(p))))
    figures = result.figures
    assert (figures.requests, figures.done, figures.short) == (10, 10, 0)
    assert [outcome.tokens for outcome in result.outcomes] == [answer for _, answer in SHORT.draw(10, 0)]
    for one, (prompt, _) in zip(result.outcomes, SHORT.draw(10, 0), strict=True):
        assert one.prompt_tokens == pytest.approx(prompt, rel=0.4, abs=20)
        assert len(one.times) <= one.tokens
        assert one.endings == ["length"]
    assert figures.server_cpu_s is not None
    assert "/10 requests" in seen[0]


def test_random_arrivals_come_at_their_times(server: ServerProcess) -> None:
    load = Load(requests=8, rate=40, lengths=SHORT, seed=5)
    result = asyncio.run(run_load(Target(url=server.url), load))
    assert result.figures.done == 8
    begun = [outcome.began for outcome in result.outcomes]
    assert begun == sorted(begun)


def test_clients_that_hang_up_are_counted_and_lose_nobody_else(server: ServerProcess) -> None:
    load = Load(requests=20, clients=6, lengths=SHORT, disconnect=0.5)
    figures = asyncio.run(run_load(Target(url=server.url), load)).figures
    assert figures.left > 0
    assert figures.left + figures.done == 20


def test_an_answer_that_is_no_stream_is_counted_too(server: ServerProcess) -> None:
    body = {"model": "kiloq-mini-chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    ask = Ask("/v1/chat/completions", json.dumps(body).encode(), 3, is_streamed=False)
    bad = Ask("/v1/chat/completions", b"{", 3)
    first, refused, third = asyncio.run(closed_loop(Target(url=server.url), [ask, bad, ask], 1, lambda _: None))
    assert first.state == third.state == "done"
    assert (refused.state, refused.status) == ("refused", 400)
    assert "error" in refused.message


def test_the_command_writes_a_report_and_a_picture(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "bench serve --clients 3 --requests 5 --lengths 20x6 --endpoint chat".split()  # noqa: SIM905  # as it is typed
    out = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert run([*words, "--url", f"{server.url}/v1", *out]) == 0
    assert "5 of 5 requests done" in capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record) == {"settings", "figures", "requests"}
    assert record["figures"]["done"] == 5
    assert all(row["answer_tokens"] == 6 and row["finish_reasons"] == ["length"] for row in record["requests"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--url", "localhost:8000"], "http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--url", "http://127.0.0.1:9", "--shape", "qwen2.5-0.5b"], "one server at a time"),
        (["--shape", "qwen2.5-0.5b", "--precision", "int3"], "int3"),
        (["--requests", "0"], "requests is 0"),
        (["--disconnect", "2"], "disconnect is 2"),
        (["--rate", "-1"], "rate is -1"),
        (["--endpoint", "responses"], "--endpoint"),
        (["--fields", "[1]"], "--fields"),
    ],
)
def test_a_mistake_is_one_clear_line(words: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", *words]) == 1
    said = capsys.readouterr().err
    assert match in said
    assert "Traceback" not in said


def test_costs_of_a_process_are_those_of_the_system(server: ServerProcess) -> None:
    cpu, memory = cpu_seconds(server.pid), memory_bytes(server.pid)
    assert cpu is not None
    assert cpu > 0
    assert memory is not None
    assert 50e6 < memory[0] <= memory[1]
    assert cpu_seconds(2**22 + 1) is None


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(KiloqError, match="no-such-model"):
        kiloq_server("no-such-model")


# Whole answers byte for byte, and what must become of them.
EVENT = b'data: {"choices":[{"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


TWO = EVENT % (b"a", b"null") + EVENT % (b'say \\"text\\": \\"b', b"null") + EVENT % (b"", b'"stop"')


@pytest.mark.parametrize("piece", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("answer", "state", "pieces"),
    [
        (HEAD + chunked(TWO + b"data: [DONE]\n\n", 9), "done", 2),
        (HEAD + chunked(TWO.replace(b"\n", b"\r\n"), 1000), "done", 2),
        (PLAIN + TWO, "done", 2),
        (HEAD + chunked(EVENT % (b"a", b"null"), 50), "lost", 1),  # no ending
        (HEAD + chunked(TWO, 50)[:-5], "lost", 2),  # cut off
        (HEAD + chunked(EVENT % (b"a", b"null") + b'data: {"error": {"message": "no"}}\n\n', 50), "refused", 1),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "refused", 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbusy", "lost", 0),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "lost", 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "lost", 0),
        (b"", "lost", 0),
    ],
)
def test_any_answer_in_any_pieces_has_one_meaning(answer: bytes, state: str, pieces: int, piece: int) -> None:
    outcome = asyncio.run(asked_of(answer, piece))
    assert (outcome.state, len(outcome.times)) == (state, pieces)
    assert outcome.ended >= outcome.began


async def asked_of(answer: bytes, piece: int) -> Outcome:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        for start in range(0, len(answer), piece):
            writer.write(answer[start : start + piece])
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        target = Target(url=f"http://127.0.0.1:{port}", timeout=20)
        (outcome,) = await closed_loop(target, [Ask("/", b"{}", 5)], 1, lambda _: None)
    return outcome


def test_a_server_that_closes_idle_connections_loses_no_request() -> None:
    async def load() -> list[Outcome]:
        async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(HEAD + chunked(TWO, 50))
            await reader.readuntil(b"\r\n\r\n{}")  # the next request is here: closing now tells its client nothing
            writer.close()

        async with await asyncio.start_server(speak, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            target = Target(url=f"http://127.0.0.1:{port}", timeout=20)
            return await closed_loop(target, [Ask("/", b"{}", 5)] * 3, 1, lambda _: None)

    assert [(one.state, len(one.times), one.message) for one in asyncio.run(load())] == [("done", 2, "")] * 3


def test_progress_counts_beginnings_and_ends() -> None:
    progress = Progress(2)
    outcome = Outcome(Ask("/", b"", 1))
    progress.tell(outcome)
    assert "0/2 requests  1 running, 1 without a first token" in str(progress)
    outcome.times.append(0.5)
    outcome.state = "done"
    progress.tell(outcome)
    assert "1/2 requests  0 running" in str(progress)
    assert progress.tokens == 1


def test_a_load_refuses_nonsense() -> None:
    with pytest.raises(RequestError, match="clients is 0"):
        Load(clients=0)


def test_a_page_that_is_not_there_says_so(server: ServerProcess) -> None:
    status, _ = asyncio.run(fetch(Target(url=server.url), "/nowhere"))
    assert status == 404
