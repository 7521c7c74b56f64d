"""schemathesis, by the server's own description: whatever it sends, no answer is a 5xx, and errors have their shape."""

from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from kiloq.serve.errors import DASHSCOPE


@pytest.fixture(scope="module")
def small(start_server: Any) -> Any:
    """Short answers: requests that ask for all they may get are quick too."""
    return start_server("qwen1", "--max-context", "64", "--quiet")


@pytest.fixture(scope="module")
def description(small: Any) -> Any:
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_the_server(description: Any, mode: GenerationMode) -> None:
    asked: set[str] = set()
    for found in description.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            asked.add(case.path)
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=[not_a_server_error])
            if answer.status_code >= 400:
                keys = {"code", "message", "request_id"} if case.path.startswith(DASHSCOPE) else {"error"}
                assert set(answer.json()) == keys

        with suppress(Unsatisfiable):  # what takes nothing cannot be given something wrong
            ask()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"} <= asked


def test_the_description_is_whole(small: Any) -> None:
    described = httpx.get(f"{small.url}/openapi.json").json()
    assert described["info"]["title"] == "kiloq"
    tags = {tag["name"] for tag in described["tags"]}
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            assert set(operation["tags"]) <= tags, (method, path)
            assert set(operation["responses"]) >= {"200", "4XX", "5XX"}, (method, path)
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_the_examples_work(server: Any) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    bodies = {path: one["post"]["requestBody"] for path, one in described["paths"].items() if "post" in one}
    examples = {path: body["content"]["application/json"].get("example") for path, body in bodies.items()}
    assert examples["/v1/chat/completions"]
    for path, example in examples.items():
        if example is not None:
            answer = httpx.post(server.url + path, json=example, timeout=60)
            assert answer.status_code == 200, (path, answer.text)


def test_what_describes_it_comes_from_this_server_alone(small: Any) -> None:
    page = httpx.get(f"{small.url}/docs")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "://" not in page.text
    for path in ("swagger-ui.css", "swagger-ui-bundle.js"):
        assert f"web/docs/vendor/swagger/{path}" in page.text
        assert httpx.get(f"{small.url}/web/docs/vendor/swagger/{path}").status_code == 200
    assert httpx.get(f"{small.url}/web/docs/docs/start.js").status_code == 200
