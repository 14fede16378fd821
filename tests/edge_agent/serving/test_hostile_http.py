"""Whatever is sent gets an answer in a sentence, and the next caller a completion."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time

import pytest

from edge_agent import serving, serving_app
from edge_agent.serving_access import Access
from edge_agent.serving_requests import read_completion
from edge_agent.serving_work import Desk
from tests.edge_agent.serving.conftest import LetterEngine

JSON = {"Content-Type": "application/json"}
GOOD = b'{"model": "sketchfleet", "prompt": "ab", "max_tokens": 2}'


def raw(endpoint, data: bytes, timeout=10.0) -> bytes:
    """What comes back for these bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout) as line:
        line.sendall(data)
        found = b""
        while part := line.recv(65536):
            found += part
        return found


def post(endpoint, body: bytes, headers=JSON, path="/v1/completions", method="POST"):
    """(status, headers, the answer as JSON)"""
    head = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": len(body), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items() if value is not None)
    got = raw(endpoint, f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body)
    top, _, rest = got.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(": ", 1) for line in top.decode().split("\r\n")[1:])
    return int(top.split()[1]), fields, json.loads(rest)


def refused(endpoint, body, status=400, **options):
    """The sentence of an error in OpenAI's form."""
    got, _, answer = post(endpoint, body, **options)
    assert got == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    return answer["error"]["message"]


def still_answers(endpoint):
    status, _, answer = post(endpoint, GOOD)
    assert status == 200 and answer["choices"][0]["text"] == "AB"


@pytest.fixture(scope="module")
def endpoint():
    from tests.edge_agent.serving.conftest import Endpoint

    started = Endpoint(LetterEngine())
    yield started
    started.stop()


def asking(**changes) -> bytes:
    facts = {"model": "sketchfleet", "prompt": "ab", "max_tokens": 2, **changes}
    return json.dumps(facts).encode()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{}", "model is missing"),
        (b'{"model": "sketchfleet", "prompt": "a", "temperature": NaN}', "NaN is no number"),
        (b'{"model": "sketchfleet", "prompt": "a", "temperature": -Infinity}', "is no number"),
        (b'{"model": "sketchfleet", "prompt": "a", "temperature": 1e999}', "must be a number"),
        (b'{"model": "sketchfleet", "prompt": "a", "top_p": ' + b"9" * 999 + b"}", "from 0.0 to 1"),
        (b'{"model": "sketchfleet", "prompt": "a", "seed": ' + b"9" * 9999 + b"}", "valid JSON"),
        (b'{"model": "sketchfleet", "prompt": "\\ud800"}', "half a character"),
        (b'{"model": "sketchfleet", "prompt": "a", "stop": ["\\udfff"]}', "half a character"),
        (asking(model=7), "model must be a text"),
        (asking(prompt=7), "prompt must be a text"),
        (asking(prompt=[]), "prompt must be a text"),
        (asking(prompt={}), "prompt must be a text"),
        (asking(prompt=["a", 1]), "do not mix them"),
        (asking(prompt=[-1]), "from 0 to 399"),
        (asking(prompt=[400]), "from 0 to 399"),
        (asking(prompt=[True]), "from 0 to 399"),
        (asking(prompt=[[]]), "at least one"),
        (asking(prompt=["a"] * 17), "17 prompts are too many"),
        (asking(prompt=["a"] * 9, n=2), "18 completions, at most 16"),
        (asking(prompt="a" * 100), "fills the context"),
        (asking(max_tokens=-1), "max_tokens is -1, it must be at least 0"),
        (asking(max_tokens=1.5), "max_tokens must be a whole number"),
        (asking(max_tokens="2"), "max_tokens must be a whole number"),
        (asking(max_tokens=True), "max_tokens must be a whole number"),
        (asking(temperature=-0.1), "temperature is -0.1"),
        (asking(temperature=2.1), "from 0.0 to 2.0"),
        (asking(temperature="hot"), "temperature must be a number"),
        (asking(n=0), "n is 0"),
        (asking(n=17), "from 1 to 16"),
        (asking(seed=0.5), "seed must be a whole number"),
        (asking(stop=[1]), "stop must be a text or a list of texts"),
        (asking(stop=["a"] * 17), "at most 16 texts"),
        (asking(stop="a" * 257), "256 characters"),
        (asking(echo=1), "echo must be true or false"),
        (asking(prompt=[1], echo=True), "echo needs a prompt that is text"),
        (asking(stream="yes"), "stream must be true or false"),
        (asking(stream=True, stream_options=[]), "stream_options must be an object"),
        (asking(suffix=["a"]), "suffix must be a text"),
        (asking(suffix="b"), "no marks to fill in the middle"),
        (asking(logprobs=0), "logprobs is not supported"),
        (asking(logit_bias={"5": 1}), "logit_bias is not supported"),
        (asking(presence_penalty=0.5), "presence_penalty is not supported"),
        (asking(best_of=3), "best_of above n"),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_in_a_sentence(endpoint, body, words) -> None:
    assert words in refused(endpoint, body)
    assert not endpoint.desk.answering and not endpoint.desk.queued


def test_what_means_nothing_is_accepted(endpoint) -> None:
    neutral = asking(
        logprobs=None, logit_bias={}, presence_penalty=0, best_of=1, user="me", seed=None,
        max_tokens=2**80, temperature=0, stop=None, suffix="", extra={"a": [1]},
        prompt="é\U0001f600",
    )  # fmt: skip
    status, _, answer = post(endpoint, neutral)
    assert status == 200 and answer["usage"]["completion_tokens"] == 50, "most_tokens"
    assert post(endpoint, asking(max_tokens=0, echo=True))[2]["choices"][0] == {
        "index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"
    }  # fmt: skip


def test_bodies_that_are_too_large_are_not_read(endpoint) -> None:
    large = serving_app.MOST_BODY_BYTES + 1
    claimed = {**JSON, "Content-Length": 10**12}
    assert "larger than 1,048,576 bytes" in refused(endpoint, b"{", 413, headers=claimed)
    chunked = {**JSON, "Content-Length": None, "Transfer-Encoding": "chunked"}
    body = b"%x\r\n" % large + b" " * large + b"\r\n0\r\n\r\n"
    assert "larger than" in refused(endpoint, body, 413, headers=chunked)
    still_answers(endpoint)


def test_a_page_in_a_browser_can_make_no_request(endpoint) -> None:
    assert "Content-Type" in refused(endpoint, GOOD, 415, headers={"Content-Type": "text/plain"})
    assert "Content-Type" in refused(endpoint, GOOD, 415, headers={})
    elsewhere = {**JSON, "Host": f"evil.example:{endpoint.port}"}
    assert "this machine alone" in refused(endpoint, GOOD, 403, headers=elsewhere)
    assert "this machine alone" in refused(endpoint, GOOD, 403, headers={**JSON, "Host": ""})
    for host in ("localhost", f"127.0.0.1:{endpoint.port}", "[::1]:80", "[::1]", "LOCALHOST:1"):
        assert post(endpoint, GOOD, {**JSON, "Host": host})[0] == 200, host
    status, headers, _ = post(
        endpoint, b"", {"Origin": "https://evil.example"}, "/v1/models", "GET"
    )
    assert status == 200 and not [name for name in headers if name.startswith("access-control")]


def test_pages_that_are_named_may_ask(serve) -> None:
    endpoint = serve(origins=("https://editor.example",))
    origin = {**JSON, "Origin": "https://editor.example"}
    assert post(endpoint, GOOD, origin)[1]["access-control-allow-origin"] == origin["Origin"]
    asked = {**origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    lines = "".join(f"{n}: {v}\r\n" for n, v in asked.items())
    head = (
        f"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n"
    )
    assert b"access-control-allow-origin: https://editor.example" in raw(endpoint, head.encode())
    other = raw(endpoint, head.replace("editor.example", "evil.example").encode())
    assert other.startswith(b"HTTP/1.1 400") and b"access-control-allow-origin" not in other


def test_the_token_is_asked_of_all_but_those_who_watch_the_service(serve) -> None:
    token = "correct-horse-battery"
    endpoint = serve(access=Access(hashlib.sha256(token.encode()).digest()))
    for given in (None, "", "Bearer", "Bearer ", f"Basic {token}", f"Bearer {token}x", "Bearer é"):
        headers = {**JSON, "Authorization": given, "Host": "anything"}
        assert "Bearer TOKEN" in refused(endpoint, GOOD, 401, headers=headers), given
    assert post(endpoint, GOOD, {**JSON, "Authorization": f"bearer {token}"})[0] == 200
    assert post(endpoint, b"", {}, "/healthz", "GET")[2] == {"status": "ok"}
    assert refused(endpoint, b"", 401, path="/v1/models", method="GET", headers={})


def test_other_addresses_are_told_what_there_is(endpoint) -> None:
    assert "POST /v1/completions" in refused(endpoint, GOOD, 404, path="/v1/chat/completions")
    assert "GET is not for" in refused(endpoint, b"", 405, method="GET", headers={})
    assert refused(endpoint, b"", 404, path="/v1/models/../../etc/passwd", method="GET")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)  # fmt: skip
def test_what_is_no_http_ends_the_connection_and_no_more(endpoint, data) -> None:
    with contextlib.suppress(ConnectionError):  # it may be closed while more is being sent
        assert raw(endpoint, data).startswith(b"HTTP/1.1 4")
    still_answers(endpoint)


def test_a_crowd_is_told_to_come_again_and_nobody_is_forgotten(serve) -> None:
    endpoint = serve(LetterEngine(step_s=0.02), at_once=2, waiting=3)
    body, found = asking(max_tokens=10), []

    def ask() -> None:
        found.append(post(endpoint, body))

    crowd = [threading.Thread(target=ask) for _ in range(12)]
    for one in crowd:
        one.start()
        time.sleep(0.002)
    for one in crowd:
        one.join()
    codes = sorted(status for status, _, _ in found)
    assert codes == [200] * 5 + [429] * 7
    turned = next(answer for answer in found if answer[0] == 429)
    assert turned[1]["retry-after"] == "1" and "try again" in turned[2]["error"]["message"]
    assert turned[2]["error"]["code"] == "rate_limit_exceeded"
    assert endpoint.engine.most_running <= 2
    still_answers(endpoint)


def until(true, seconds=5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_not_worked_for(serve, stream) -> None:
    endpoint = serve(LetterEngine(step_s=0.01), at_once=1, waiting=2)
    body = asking(max_tokens=50, stream=stream)
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head = head.replace("POST /", "POST /v1/completions") + "Content-Type: application/json\r\n\r\n"
    lines = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(3)]
    for line in lines:
        line.sendall(head.encode() + body)
    until(lambda: endpoint.desk.answering == 1 and endpoint.desk.queued == 2)
    for line in lines:
        line.close()
    until(lambda: not (endpoint.desk.answering or endpoint.desk.queued or endpoint.engine.running))
    assert endpoint.engine.steps < 25, "the first was ended, the others never begun"
    still_answers(endpoint)


def test_a_client_that_reads_nothing_does_not_hold_a_place_for_ever(serve, monkeypatch) -> None:
    monkeypatch.setattr(serving_app, "STALL_S", 0.2)
    engine = LetterEngine()
    engine.encode = lambda prompt, **_: [0, 65]
    engine.info = engine.info.model_copy(update={"context_tokens": 10**6})
    endpoint = serve(engine, at_once=1, waiting=0, most_tokens=60_000)
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    line.connect(("127.0.0.1", endpoint.port))
    body = asking(max_tokens=60_000, stream=True)
    line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                 b"application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
    until(lambda: endpoint.desk.answering == 1)
    until(lambda: not endpoint.desk.answering, 20)
    line.close()
    assert post(endpoint, asking(max_tokens=1))[0] == 200


def test_connections_without_a_request_are_given_up(serve, monkeypatch) -> None:
    monkeypatch.setattr(serving, "HEAD_S", 0.2)
    monkeypatch.setattr(serving_app, "BODY_S", 0.2)
    endpoint = serve()
    lines = [socket.create_connection(("127.0.0.1", endpoint.port), 5) for _ in range(20)]
    for line in lines[10:]:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
    for line in lines:
        with pytest.raises(ConnectionError):
            assert line.recv(1) == b"", "closed without an answer"
            raise ConnectionResetError
        line.close()
    slow = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
    )
    assert b"took longer" in raw(endpoint, slow + b"application/json\r\nContent-Length: 9\r\n\r\n{")
    still_answers(endpoint)


def test_a_defect_of_the_model_breaks_a_stream_off_and_is_logged(serve, caplog) -> None:
    engine = LetterEngine()
    whole = engine._pieces

    def breaking(*given):
        yield from list(whole(*given))[:2]
        raise ZeroDivisionError("of the model")

    engine._pieces = breaking
    endpoint = serve(engine)
    body = asking(stream=True, max_tokens=9)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    got = raw(endpoint, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert got.count(b"data: ") == 2 and b"[DONE]" not in got, "not taken for a whole answer"
    assert not got.endswith(b"0\r\n\r\n")
    assert "of the model" in caplog.text
    until(lambda: not endpoint.desk.answering)


def test_a_second_signal_waits_for_nobody() -> None:
    """`close` comes after uvicorn gave up waiting; what is being written must end by itself."""
    engine = LetterEngine(step_s=0.01)

    async def close_in_mid_text() -> None:
        desk, cancel = Desk(engine, 1, 1), threading.Event()
        wanted = read_completion(json.loads(asking(max_tokens=90)), engine.info, 90)
        async with desk.place(cancel):
            begun = await desk.begin(wanted, cancel)
            pieces = desk.write(begun[0], cancel)
            await anext(pieces)
            desk.close()
            await pieces.aclose()

    asyncio.run(close_in_mid_text())
    assert engine.steps < 10 and not engine.running
