"""The dashboard over HTTP: what it answers, to whom, and that it never touches the run."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser

import pytest

from coordinator.config import ConfigError, load_config
from coordinator.web import facts as facts_module
from coordinator.web.access import AccessError, token_hash
from coordinator.web.app import make_app
from coordinator.web.facts import FactReader
from coordinator.web.server import WebError, WebServer, dashboard
from protos.contract import LocalReport
from trials.demo import run_sections
from trials.fleet import LocalFleet, await_listening, free_port

PATHS = ("/", "/devices/laptop", "/rounds", "/rounds/5", "/fairness", "/compression", "/screening")
TOKEN = "a-token-of-twenty-letters"


@pytest.fixture
def serving():
    """Serves an application until the test is over; returns how to ask it."""
    servers = []

    def start(app):
        server = WebServer(app, "127.0.0.1:0")
        servers.append(server)
        port = int(server.start().rpartition(":")[2])

        def ask(path, method="GET", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request(method, path, headers={k.replace("_", "-"): v
                                                      for k, v in headers.items()})  # fmt: skip
            answer = connection.getresponse()
            answer.text = answer.read().decode()
            connection.close()
            return answer

        ask.port = port
        return ask

    yield start
    for server in servers:
        server.stop()


class Elements(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_every_page_is_whole_without_scripts_and_forbids_foreign_ones(make_run, serving):
    ask = serving(make_app(make_run().read))
    for path in PATHS:
        answer = ask(path)
        assert answer.status == 200, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.text.rstrip().endswith("</html>")
        tags = Elements(answer.text).found
        assert [a for t, a in tags if t == "script"] == [{"src": "/static/refresh.js",
                                                         "defer": None}]  # fmt: skip
        assert not [a for t, a in tags if "style" in a or any(k.startswith("on") for k in a)]
        links = [a[k] for _, a in tags for k in ("href", "src") if k in a]
        assert all(link.startswith(("/", "#")) for link in links)


def test_every_link_of_every_page_leads_somewhere(make_run, serving):
    ask, seen, todo = serving(make_app(make_run().read)), set(), ["/"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = ask(path)
        assert answer.status == 200, path
        if answer.headers["Content-Type"].startswith("text/html"):
            todo += [a["href"] for t, a in Elements(answer.text).found
                     if t == "a" and a["href"].startswith("/")]  # fmt: skip
    assert set(PATHS) <= seen


def test_names_of_devices_cannot_break_out_of_a_page(make_run, serving, hostile_fleet):
    ask = serving(make_app(make_run(fleet=hostile_fleet, rounds=2, open_round=False).read))
    pages = [*PATHS[2:3], "/", "/fairness", "/compression", "/screening", "/rounds/1"]
    pages += [
        f"/devices/{name}"
        for name in (
            "%22%3E%3Cscript%3Ealert%281%29%3C%2Fscript%3E%3Cimg%20src%3Dx%20onerror%3Dalert%282"
            "%29%3E%26%7B%7B%207%2A7%20%7D%7D",
            "a%2Fb%3Fc%23d%252e",
            "..%2F..%2Fetc%2Fpasswd",
        )
    ]
    for path in pages:
        answer = ask(path)
        assert answer.status == 200, path
        tags = [t for t, _ in Elements(answer.text).found]
        assert tags.count("script") == 1 and "img" not in tags
        assert "49" not in re.findall(r"\{\{.*?\}\}|&amp;(\d+)", answer.text)
    assert "root:" not in ask("/devices/..%2F..%2Fetc%2Fpasswd").text


def test_what_is_not_there_is_a_page_that_says_so(make_run, serving):
    ask = serving(make_app(make_run().read))
    for path in ("/devices/nobody", "/rounds/99", "/rounds/x", "/static/../app.py", "/nowhere"):
        answer = ask(path)
        assert answer.status == 404, path
        assert "Content-Security-Policy" in answer.headers


def test_nothing_can_be_changed(make_run, serving):
    ask = serving(make_app(make_run().read))
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask("/", method).status == 405
        assert ask("/rounds/1", method).status == 405


def test_a_page_that_did_not_change_is_not_sent_again(make_run, serving):
    ask = serving(make_app(make_run().read))
    first = ask("/")
    again = ask("/", If_None_Match=first.headers["ETag"])
    assert (again.status, again.text) == (304, "")
    assert ask("/rounds", If_None_Match=first.headers["ETag"]).status == 200


def test_only_whoever_shows_the_token_sees_pages_and_metrics(make_run, serving, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    ask = serving(make_app(make_run().read, token_hash(tmp_path / "token")))

    def basic(password):
        return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()

    for path in ("/", "/metrics", "/static/style.css", "/devices/laptop"):
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", basic("no"), "Basic %%%", "Digest x"):
            answer = ask(path, Authorization=wrong)
            assert answer.status == 401, (path, wrong)
            assert answer.headers["WWW-Authenticate"].startswith("Basic")
            assert "laptop" not in answer.text
        for right in (f"Bearer {TOKEN}", basic(TOKEN)):
            assert ask(path, Authorization=right, Host="fleet.example.org").status == 200
    assert ask("/healthz").status == 200


def test_without_a_token_only_names_of_this_machine_are_answered(make_run, serving):
    ask = serving(make_app(make_run().read))
    for host in ("127.0.0.1:9464", "localhost", "[::1]:9464"):
        assert ask("/", Host=host).status == 200, host
    for host in ("rebound.example.org", "127.0.0.1.example.org:9464", "", "[::2]", "10.0.0.1"):
        assert ask("/", Host=host).status == 421, host


def test_a_token_too_short_or_not_there_is_refused(tmp_path):
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(AccessError, match="holds 5 characters; use 16"):
        token_hash(tmp_path / "token")
    with pytest.raises(AccessError, match="cannot be read"):
        token_hash(tmp_path / "nowhere")


def test_a_listener_that_others_can_reach_needs_a_token(tmp_path):
    path = tmp_path / "run.toml"
    base = '[run]\nname = "r"\n[model]\nbase = "b"\n[web]\nlisten = "0.0.0.0:9464"\n'
    path.write_text(base)
    with pytest.raises(ConfigError, match="needs a token_file"):
        load_config(path)
    path.write_text(base + 'token_file = "token"\n')
    assert load_config(path).web.token_file == tmp_path / "token"


def test_health_is_of_the_database_and_tells_nothing_else(make_run, serving):
    run = make_run()
    ask = serving(make_app(run.read))
    answer = ask("/healthz")
    assert answer.status == 200
    assert json.loads(answer.text) == {"status": "ok", "live": True, "database": True}
    run.records.close()
    database = run.folder / "coordinator.sqlite"
    database.rename(database.with_suffix(".gone"))
    for suffix in ("-wal", "-shm"):
        (run.folder / f"coordinator.sqlite{suffix}").unlink(missing_ok=True)
    broken = ask("/healthz")
    assert broken.status == 503
    assert json.loads(broken.text) == {"status": "unavailable", "live": True, "database": False}


def test_a_failing_page_says_so_and_the_next_one_works(make_run, serving):
    run = make_run()
    failures = [RuntimeError("planted")]

    def read():
        if failures:
            raise failures.pop()
        return run.read()

    ask = serving(make_app(read))
    answer = ask("/")
    assert answer.status == 500 and "could not be made" in answer.text
    assert "planted" not in answer.text and "Content-Security-Policy" in answer.headers
    assert ask("/").status == 200


def test_a_slow_database_delays_a_page_and_never_the_loop(make_run, tmp_path):
    run, release = make_run(), threading.Event()

    class SlowReader(FactReader):
        def _read(self):
            release.wait(20)
            return super()._read()

    read = SlowReader(run.records, "demo", lambda: run.live)
    web = run.config.model_copy(update={"web": run.config.web.model_copy(
        update={"listen": "127.0.0.1:0"})})  # fmt: skip

    async def ticks():
        async with dashboard(web, read) as address:
            port = int(address.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            longest, before = 0.0, time.monotonic()
            for _ in range(20):
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)
                before = time.monotonic()
            release.set()
            answer = await reader.read()
            writer.close()
            return longest, answer

    longest, answer = asyncio.run(ticks())
    assert answer.startswith(b"HTTP/1.1 200")
    assert longest < 1.0


def test_stopping_ends_the_thread_even_with_a_reader_that_never_hangs_up(make_run):
    before = threading.active_count()
    server = WebServer(make_app(make_run().read), "127.0.0.1:0")
    port = int(server.start().rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")  # and no end
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 5
    assert not [t for t in threading.enumerate() if t.name == "web"]
    assert threading.active_count() <= before + 1  # an idle worker of anyio may remain


def test_a_port_that_is_taken_is_one_clear_sentence(make_run):
    app = make_app(make_run().read)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(WebError, match=r'cannot be listened on .* set it to ""'):
            WebServer(app, address).start()


def test_an_address_that_nobody_chose_gives_way_and_a_chosen_one_does_not(make_run, caplog):
    run = make_run()

    async def address(chosen):
        fields = {"listen"} if chosen else set()
        web = type(run.config.web).model_construct(fields, listen=taken_at, token_file=None)
        async with dashboard(run.config.model_copy(update={"web": web}), run.read) as found:
            return found

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        taken_at = f"127.0.0.1:{taken.getsockname()[1]}"
        assert asyncio.run(address(chosen=False)) == ""
        assert "no dashboard" in caplog.text and taken_at in caplog.text
        with pytest.raises(WebError, match="cannot be listened on"):
            asyncio.run(address(chosen=True))


def test_a_run_that_nobody_serves_is_shown_by_a_command(make_run):
    folder = make_run().folder
    arguments = [sys.executable, "-m", "coordinator.cli", "dashboard", "demo", "--state",
                 str(folder), "--listen", "127.0.0.1:0"]  # fmt: skip
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as command:
        try:
            port = int(re.search(r":(\d+)/", command.stdout.readline())[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/")
            assert b"Shown from the database alone" in connection.getresponse().read()
        finally:
            command.send_signal(signal.SIGINT)
        assert command.wait(20) == 130


def test_many_readers_share_one_reading_of_the_database(make_run):
    run = make_run()
    read = FactReader(run.records, "demo", lambda: run.live)
    assert read() is read()


def test_what_arrives_is_seen_at_the_next_reading_and_a_very_late_report_in_the_end(
    make_run, monkeypatch
):
    monkeypatch.setattr(facts_module, "LEAST_REST_S", 0)
    monkeypatch.setattr(facts_module, "REST_FACTOR", 0)
    run = make_run()

    def outcome(number, device):
        return next(r.outcome for r in run.read().rows
                    if (r.round, r.device_id) == (number, device))  # fmt: skip

    silent = next(r for r in run.read().rows if r.round == 1 and r.outcome == "nothing heard")
    for number, device in ((6, "laptop"), (1, silent.device_id)):
        run.records.put_report(LocalReport(f"demo.{number}.{device}", "crashed", "planted"))
    assert outcome(6, "laptop") == "crashed"
    assert outcome(1, silent.device_id) == "nothing heard"  # settled long ago
    monkeypatch.setattr(facts_module, "FORGET_S", 0)
    monkeypatch.setattr(run.read, "_forget_at", 0.0)
    assert outcome(1, silent.device_id) == "crashed"


@pytest.mark.e2e
def test_the_coordinator_serves_it_beside_the_run_and_both_end_together(tmp_path):
    sections = run_sections(1)
    with LocalFleet(tmp_path / "fleet", sections, [], web_port=free_port()) as fleet:
        fleet.start_coordinator()
        place = ("127.0.0.1", fleet.web_port)
        await_listening(place, lambda: fleet.check("coordinator"), fleet.log("coordinator"))
        connection = http.client.HTTPConnection(*place, timeout=20)
        connection.request("GET", "/")
        page = connection.getresponse().read().decode()
        assert "Gathering devices for round 0" in page and "No device has enrolled yet" in page
        coordinator = fleet.processes["coordinator"]
        coordinator.terminate()  # with a connection that is kept open
        assert coordinator.wait(20) == 0
        assert (
            f'"dashboard": "http://127.0.0.1:{fleet.web_port}"'
            in fleet.log("coordinator").read_text()
        )
