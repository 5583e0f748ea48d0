"""What goes wrong is said clearly, leaks nothing, and the stack serves on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("bad"), "mistral", sliding_window=24)
    with running(stack_settings(checkpoint, max_model_len=256, policy="fcfs")) as stack:
        yield stack


@pytest.fixture(autouse=True)
def serves_on(stack: Stack) -> Iterator[None]:
    yield
    status, body = post(stack, {"model": "tiny", "prompt": "still there?", "max_tokens": 3})
    assert status == 200, body
    stack.assert_nothing_leaks()


def post(stack: Stack, body: object, path: str = "/completions") -> tuple[int, dict[str, object]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(stack.base_url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "tiny", "prompt": [7] * 300}, 400, "maximum context length is"),
        ({"model": "tiny", "prompt": [7] * 200, "max_tokens": 100}, 400, "256"),
        ({"model": "other", "prompt": "x"}, 404, "other"),
        ({"model": "tiny", "prompt": "x", "priority": 1}, 400, "--scheduling-policy fcfs"),
        (b"{not json", 400, "JSON"),
        ({"model": "tiny", "prompt": {"a": 1}}, 400, "prompt"),
        ({"model": "tiny", "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"model": "tiny", "prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        ({"model": "tiny", "prompt": "x", "temperature": 9}, 400, "temperature"),
        ({"model": "tiny", "prompt": "x", "tempreature": 1}, 400, "tempreature"),
        ({"model": "tiny", "prompt": ""}, 400, "prompt"),
        ({"model": "tiny", "prompt": [100000]}, 400, "vocabulary"),
    ],
)
def test_each_is_a_clear_error(stack: Stack, body: object, status: int, says: str) -> None:
    got, reply = post(stack, body)
    error = reply["error"]
    assert isinstance(error, dict)
    assert got == status
    assert error["code"] == status
    assert says in str(error["message"])


def test_an_unknown_path_and_a_wrong_method_are_error_objects(stack: Stack) -> None:
    assert post(stack, {}, "/nonsense")[0] == 404
    status, reply = post(stack, {}, "/models")
    assert status == 405
    assert reply["error"]["message"]  # type: ignore[index]
