"""A board is what its files say; half of them missing or garbled still leaves the other half."""

from __future__ import annotations

import pytest

from edge_agent.board import find_board, power_mode
from edge_agent.graphics import NvidiaSmi, find_gpu
from edge_agent.machine import Machine, run_tool
from edge_agent.probe import find_machine, host_memory, probe

KERNEL = "6.8.0-generic"
NAMES = ["orin nano", "agx orin", "xavier", "thor", "laptop", "pi 5", "vm"]


@pytest.mark.parametrize(
    ("name", "soc", "capability", "module", "l4t", "jetpack"),
    [
        ("orin nano", "tegra234", "8.7", "p3767-0005", "36.4.3", "6.2"),
        ("agx orin", "tegra234", "8.7", "p3701-0005", "39.2.0", "7.2"),
        ("xavier", "tegra194", "7.2", "p2888-0001", "35.6.4", "5.1.6"),
        ("thor", "tegra264", "11.0", "p3834-0008", "38.2.1", "7.0"),
        ("laptop", "", "", "", "", ""),
        ("pi 5", "", "", "", "", ""),
        ("vm", "", "", "", "", ""),
    ],
)
def test_a_board_is_known_by_its_chip_module_and_release(
    machines, name, soc, capability, module, l4t, jetpack
):
    found = find_board(machines(name), KERNEL)
    assert (found.soc, found.capability, found.module) == (soc, capability, module)
    assert (found.l4t, found.jetpack, found.tegra) == (l4t, jetpack, bool(soc))


def test_what_a_module_is_sold_as(machines):
    assert find_board(machines("orin nano"), KERNEL).module_name == "Orin Nano 8GB developer kit"
    assert find_board(machines("xavier"), KERNEL).module_name == "AGX Xavier"
    assert find_board(machines("pi 5"), KERNEL).module_name == ""


def test_the_release_is_asked_of_the_package_where_the_file_is_missing(machines):
    tools = {"dpkg-query": "36.4.7-20250918154033"}
    without = machines("orin nano", {"/etc/nv_tegra_release": None}, tools)
    assert find_board(without, KERNEL).l4t == "36.4.7"
    assert find_board(machines("vm", tools=tools), KERNEL).l4t == "", "no board, no call"


def test_a_container_without_device_tree_is_known_by_its_kernel(machines):
    found = find_board(machines("vm"), "5.15.148-tegra")
    assert found.tegra and not found.soc


@pytest.mark.parametrize("garbage", [b"", b"\0\0\0", b"\xff\xfe\x00x", b"R36", b"x" * 200_000])
def test_garbage_in_any_file_gives_no_error(machines, garbage):
    paths = ["/proc/device-tree/model", "/proc/device-tree/compatible", "/etc/nv_tegra_release",
             "/usr/local/cuda/version.json", "/proc/swaps"]  # fmt: skip
    for path in paths:
        find_board(machines("orin nano", {path: garbage}), KERNEL)
    machine = machines("orin nano", dict.fromkeys(paths, garbage))
    assert find_machine(machine).board.l4t == ""


def test_cuda_is_read_from_its_version_file_or_its_library(machines):
    assert find_board(machines("orin nano"), KERNEL).cuda == "12.6.11"
    library = {"/usr/local/cuda-11.4/lib64/libcudart.so.11.4.298": ""}
    assert find_board(machines("xavier", library), KERNEL).cuda == "11.4.298"


def test_the_power_mode_is_asked_or_looked_up(machines):
    board = find_board(machines("orin nano"), KERNEL)
    asked = machines("orin nano", tools={"nvpmodel": "NV Power Mode: 25W\n1\n"})
    assert power_mode(asked, board) == "25W"
    written = {"/var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
               "/etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n"
               "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"}  # fmt: skip
    assert power_mode(machines("orin nano", written), board) == "MAXN_SUPER"
    assert power_mode(machines("orin nano"), board) == "", "where it wants root and wrote nothing"
    pc = machines("laptop", tools={"nvpmodel": "NV Power Mode: 25W"})
    assert power_mode(pc, find_board(pc, KERNEL)) == ""


# --- graphics -----------------------------------------------------------------------------------

CARDS = "NVIDIA GeForce RTX 4060, 8188, 7900, 8.9\n"


def smi(answers):
    """A machine whose nvidia-smi answers by the first word of its query."""
    calls = []

    def tool(words, timeout_s):
        calls.append(words)
        return next((a for key, a in answers.items() if key in words[1]), None)

    return tool, calls


def test_a_card_is_found_without_torch(machines, tmp_path):
    tool, _ = smi({"name": CARDS})
    gpu = find_gpu(Machine(tmp_path, tool), find_board(machines("vm"), KERNEL), (1, 1))
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA GeForce RTX 4060", "8.9")
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (8188 * 2**20, 7900 * 2**20)
    assert not gpu.unified_memory


def test_a_jetson_shares_its_memory_with_the_gpu(machines):
    gpu = find_machine(machines("orin nano")).gpu
    assert gpu.unified_memory and gpu.memory_free_bytes == int(5.9e6) * 1024


def test_a_card_that_does_not_tell_its_memory_shares_it(tmp_path, machines):
    tool, _ = smi({"name": "NVIDIA GB10, [N/A], [N/A], 12.1\n"})
    gpu = find_gpu(Machine(tmp_path, tool), find_board(machines("vm"), KERNEL), (100, 70))
    assert gpu.unified_memory and gpu.memory_free_bytes == 70


@pytest.mark.parametrize("text", [None, "", "No devices were found\n", "a, b\n"])
def test_a_driver_that_says_nothing_useful_is_no_gpu(machines, tmp_path, text):
    tool, _ = smi({"name": text})
    assert find_gpu(Machine(tmp_path, tool), find_board(machines("vm"), KERNEL), (1, 1)) is None


def test_the_state_of_all_cards_is_one(tmp_path):
    tool, _ = smi({"temperature": "61, 90.5\n70, [N/A]\n", "compute": "10\n20\n"})
    state = NvidiaSmi(Machine(tmp_path, tool)).read()
    assert (state.temperature_c, state.watts, state.pids) == (70.0, 90.5, (10, 20))


def test_a_tool_that_hangs_is_left_alone_after_three_times(tmp_path):
    tool, calls = smi({})
    asked = NvidiaSmi(Machine(tmp_path, tool))
    for _ in range(10):
        assert asked.read().watts is None
    assert len(calls) == 3


def test_tools_end_in_time_and_never_raise(tmp_path):
    assert run_tool(["no-such-program-here"]) is None
    assert run_tool(["sleep", "30"], 0.1) is None
    assert run_tool(["false"]) is None
    assert run_tool(["echo", "yes"]) == "yes\n"


# --- the whole profile --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_has_a_profile(machines, tmp_path, name):
    found = probe(version="1", state=tmp_path, machine=machines(name))
    assert 0 < found.memory_available_bytes < found.memory_total_bytes
    assert found.board and found.cpu and found.power is not None


def test_a_profile_holds_swap_power_and_the_catalogues_name(machines, tmp_path):
    found = probe(version="1", state=tmp_path, machine=machines(
        "orin nano", tools={"nvpmodel": "NV Power Mode: 15W\n0\n"}))  # fmt: skip
    assert found.swap_bytes == int(3.9e6) * 1024
    assert (found.power.mode, found.power.temperature_c) == ("15W", 54.5)
    assert found.power.on_battery is None and found.known_board == "orin-nano-super-8gb"
    battery = probe(version="1", state=tmp_path, machine=machines("laptop")).power
    assert (battery.on_battery, battery.battery_percent) == (True, 63.0)


def test_zram_is_told_apart_from_a_swap_file(machines):
    assert host_memory(machines("orin nano")).zram_bytes == 650000 * 1024


def test_the_limit_of_the_group_is_found_under_the_same_root(machines, tmp_path):
    files = {"/proc/self/cgroup": "0::/agent.service\n",
             "/sys/fs/cgroup/agent.service/memory.max": "1000000\n"}  # fmt: skip
    found = probe(version="1", state=tmp_path, machine=machines("pi 5", files))
    assert found.memory_cap_bytes == 1000000
