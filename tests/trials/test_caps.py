"""Limits that the kernel enforces: on whoever enters, on what it starts, and on nobody else."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from trials.caps import CapError, KernelCap

ALLOCATE = "x = bytearray({}); x[::4096] = b'1' * len(x[::4096]); print('had it')"


def run(cap, code):
    command = cap.wrap([sys.executable, "-c", code])
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def cap():
    made = KernelCap("sketchfleet-test", 200 * 2**20)
    yield made
    made.close()


def test_memory_up_to_the_cap_is_had_and_beyond_is_not(cap):
    assert run(cap, ALLOCATE.format(100 * 2**20)).stdout == "had it\n"
    assert run(cap, ALLOCATE.format(400 * 2**20)).returncode != 0


def test_the_kernel_counts_whom_it_killed(cap):
    if cap.means == "rlimit":
        pytest.skip("memory is refused, nobody is killed")
    before = cap.kills
    run(cap, ALLOCATE.format(400 * 2**20))
    assert cap.kills == before + 1


def test_what_a_process_starts_is_inside_too(cap):
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', " \
            f"{ALLOCATE.format(400 * 2**20)!r}]))"  # fmt: skip
    assert run(cap, child).returncode != 0


def test_processors_are_limited_where_groups_can_be_made():
    try:
        cap = KernelCap("sketchfleet-test-cpu", 200 * 2**20, cpus=0.2)
    except CapError:
        pytest.skip("no control groups here")
    try:
        began = time.monotonic()
        run(cap, "import time\nwhile time.process_time() < 0.4: pass")
        assert time.monotonic() - began > 1.0
    finally:
        cap.close()


def test_groups_are_gone_afterwards():
    cap = KernelCap("sketchfleet-test", 200 * 2**20)
    groups = list(cap._groups)
    cap.close()
    assert not any(group.exists() for group in groups)


def test_without_control_groups_the_data_segment_is_limited(tmp_path):
    cap = KernelCap("x", 300 * 2**20, root=tmp_path)
    assert cap.means == "rlimit"
    assert run(cap, ALLOCATE.format(100 * 2**20)).stdout == "had it\n"
    assert "MemoryError" in run(cap, ALLOCATE.format(600 * 2**20)).stderr
    with pytest.raises(CapError, match="control groups only"):
        KernelCap("x", 300 * 2**20, cpus=1.0, root=tmp_path)
