"""What every test may ask for: the fleet of `harness.py`, coroutines as tests, two workers."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import signal
import sys
from pathlib import Path

import pytest

ASYNC_TEST_S = 60

# A shell that starts this in the background has it ignore interrupts, and with it all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Of two workers the first takes what starts fleets: two at once would starve each other.

    With `--dist worksteal` each has half of the list, and who is idle takes from the other's end.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs `async def` tests, each in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**given), ASYNC_TEST_S))
    return True


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """tests/harness.py as a module: a coordinator in this process and devices that play along."""
    name = "sketchfleet_test_harness"
    if name not in sys.modules:
        place = Path(__file__).with_name("harness.py")
        found = importlib.util.spec_from_file_location(name, place)
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        found.loader.exec_module(module)
        module.BASES = tmp_path_factory.mktemp("bases")
    return sys.modules[name]


@pytest.fixture
def impatient(monkeypatch):
    """Links that retry and reconnect at once, so that a test of an outage takes no time."""
    from edge_agent import link

    quick = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
             ("grpc.max_reconnect_backoff_ms", 100)]  # fmt: skip
    named = {name for name, _ in quick}
    kept = [option for option in link._OPTIONS if option[0] not in named]
    monkeypatch.setattr(link, "_OPTIONS", [*kept, *quick])
    monkeypatch.setattr(link.random, "uniform", lambda low, high: 0.05)
