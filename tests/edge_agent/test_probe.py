"""A machine is told by what its kernel says, and not at all by what it does not say."""

from __future__ import annotations

import platform

import pytest

from edge_agent import probe as module
from edge_agent.probe import board_name, cgroup_limit_bytes, cpu_name, own_cgroup_files, probe
from profiles.link import LinkProfile

PC = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) N100
processor\t: 1
model name\t: another
"""
PI = """processor\t: 0
BogoMIPS\t: 108.00
CPU part\t: 0xd0b

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
JETSON = "processor\t: 0\nmodel name\t:\nCPU implementer\t: 0x41\n"


@pytest.fixture
def file(tmp_path):
    """A file of the kernel's with this content."""

    def with_content(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return with_content


def test_a_board_is_named_by_its_device_tree(file):
    name = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert board_name(file(name.encode() + b"\0")) == name


def test_a_device_tree_of_odd_bytes_still_gives_a_name(file):
    assert board_name(file(b"Board \xff\0\0")) == "Board \N{REPLACEMENT CHARACTER}"


def test_a_machine_without_device_tree_is_named_by_its_architecture(tmp_path):
    assert board_name(tmp_path / "none") == f"{platform.machine()} computer"


def test_a_processor_is_named_as_the_kernel_names_it(file):
    assert cpu_name(file(PC)) == "Intel(R) N100"
    assert cpu_name(file(PI)) == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_processor_the_kernel_does_not_name_still_has_a_name(file, tmp_path):
    for path in (file(JETSON), file(b"\xff\xfe"), tmp_path / "none"):
        assert cpu_name(path), "an empty name helps nobody"


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("2147483648\n", 2147483648),
        ("max\n", None),
        ("9223372036854771712\n", None),  # version 1 of control groups says "none" like this
        ("", None),
        ("-1\n", None),
        ("1e9", None),
    ],
)
def test_the_limit_of_the_control_group_is_read(file, text, limit):
    assert cgroup_limit_bytes((file(text),)) == limit


def test_the_second_place_is_tried_when_the_first_says_nothing(file, tmp_path):
    old = file("1000000", "memory.limit_in_bytes")
    assert cgroup_limit_bytes((tmp_path / "none", old)) == 1000000
    assert cgroup_limit_bytes((file("max", "memory.max"), old)) == 1000000
    assert cgroup_limit_bytes((tmp_path / "none",)) is None


def test_the_limit_of_a_service_is_found_where_its_group_lies(tmp_path):
    table, root = tmp_path / "cgroup", tmp_path / "fs"
    table.write_text("4:cpu,memory:/box\n0::/system.slice/agent.service\n")
    unit = root / "system.slice" / "agent.service"
    unit.mkdir(parents=True)
    (unit / "memory.max").write_text("700\n")
    (root / "system.slice" / "memory.max").write_text("900\n")
    (root / "memory" / "box").mkdir(parents=True)
    (root / "memory" / "box" / "memory.limit_in_bytes").write_text("800\n")
    files = own_cgroup_files(table, root)
    assert cgroup_limit_bytes(files) == 700, "the lowest of the groups above it holds too"
    assert own_cgroup_files(tmp_path / "none", root)[0] == root / "memory.max"


@pytest.mark.parametrize(
    ("owner", "group", "cap"),
    [(None, None, None), (500, None, 500), (None, 300, 300), (500, 300, 300), (200, 300, 200)],
)
def test_the_tighter_of_the_two_caps_counts(monkeypatch, tmp_path, owner, group, cap):
    monkeypatch.setattr(module, "cgroup_limit_bytes", lambda files: group)
    assert probe(version="1", state=tmp_path, memory_cap_bytes=owner).memory_cap_bytes == cap


def test_a_profile_holds_what_was_measured_and_none_for_what_was_not(tmp_path):
    found = probe(version="1.2", state=tmp_path / "not" / "yet" / "made", board="my board")
    assert (found.board, found.agent_version) == ("my board", "1.2")
    assert 0 < found.memory_available_bytes <= found.memory_total_bytes
    assert found.cores >= 1 and found.disk_free_bytes > 0 and found.cpu
    assert found.gpu is None and found.compute is None and found.link is None
    link = LinkProfile(1e6, 2e6, 0.01)
    assert probe(version="1", state=tmp_path, link=link).link == link
