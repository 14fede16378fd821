"""An engine that needs no model, of the protocol of the real one, behind the real HTTP server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from edge_agent.inference import Piece
from edge_agent.inference_folder import ContextLengthError, ExportInfo, InferenceError, Marks
from edge_agent.serving_access import Access
from edge_agent.serving_adapter import Serving
from edge_agent.serving_app import make_app
from edge_agent.serving_work import Desk
from profiles.model import ModuleShape

MARKS = Marks(prefix=300, suffix=301, middle=302)


class LetterEngine:
    """A token is a letter; writes the prompt's letters in upper case, over and over."""

    def __init__(self, marks: Marks | None = None, step_s: float = 0.0) -> None:
        self.info = ExportInfo(
            base="letters", base_digest="a" * 64, precision="float32", context_tokens=100,
            vocabulary=400, layers=1, key_value_heads=1, head_size=1, separator=0, ends=(0,),
            marks=marks, modules=(ModuleShape("layer", 4, 4),), versions={},
        )  # fmt: skip
        self.step_s, self.adapter = step_s, ""
        self.asked, self.running, self.most_running, self.steps = [], 0, 0, 0
        self._lock = threading.Lock()

    @property
    def adapters(self):
        return (self.adapter,) if self.adapter else ()

    def swap(self, file):
        self.adapter = "" if file is None else file.stem
        return 0.001

    def encode(self, prompt, *, suffix=None, room=None):
        ids = [ord(letter) % 256 for letter in prompt]
        if suffix is None:
            return [0, *ids]
        if self.info.marks is None:
            raise InferenceError("no marks")
        marks, after = self.info.marks, [ord(letter) % 256 for letter in suffix]
        return [0, marks.prefix, *ids, marks.suffix, *after, marks.middle]

    def generate(self, prompt, *, max_tokens, temperature, top_p, stop, seed, cancel):
        self.asked.append({"prompt": list(prompt), "temperature": temperature, "top_p": top_p,
                               "stop": stop, "seed": seed})  # fmt: skip
        left = self.info.context_tokens - len(prompt)
        if left < 1:
            raise ContextLengthError("the prompt fills the context; shorten it")
        if "defect" in "".join(map(chr, prompt)):
            raise ZeroDivisionError("of the model")
        return self._pieces(prompt, min(max_tokens, left), stop, cancel)

    def _pieces(self, prompt, most, stop, cancel):
        letters = [chr(t).upper() for t in prompt if 32 <= t < 256] or ["A"]
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if most == 0:
                yield Piece("", None, "length")
                return
            for count in range(1, most + 1):
                if cancel.is_set():
                    yield Piece("", None, "cancelled")
                    return
                time.sleep(self.step_s)
                self.steps += 1
                letter = letters[(count - 1) % len(letters)]
                if letter in stop:
                    yield Piece("", ord(letter), "stop")
                    return
                yield Piece(letter, ord(letter), "length" if count == most else None)
        finally:
            with self._lock:
                self.running -= 1


class Endpoint:
    """The application on a port of its own, in a thread."""

    def __init__(self, engine, *, at_once=2, waiting=2, **options) -> None:
        from edge_agent.serving import _Protocol

        self.engine = engine
        access = options.pop("access", Access())
        names = options.pop("names", {})
        serving = options.pop("serving", lambda name: names.get(name, Serving(name=name)))
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        ready = threading.Event()

        async def run() -> None:
            self.desk = Desk(engine, at_once, waiting)
            app = make_app(
                self.desk, serving, access,
                most_tokens=options.pop("most_tokens", 50), health=lambda: {"status": "ok"},
                **options,
            )  # fmt: skip
            config = uvicorn.Config(
                app, log_config=None, lifespan="off", ws="none", http=_Protocol, loop="asyncio",
                limit_concurrency=64, timeout_keep_alive=1,
            )  # fmt: skip
            self.server = uvicorn.Server(config)
            task = asyncio.ensure_future(self.server.serve([listener]))
            while not self.server.started:
                await asyncio.sleep(0.005)
            ready.set()
            await task

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def serve():
    """Starts endpoints over an engine: by default one without marks."""
    started = []

    def start(engine=None, **options) -> Endpoint:
        started.append(Endpoint(engine or LetterEngine(), **options))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.stop()
