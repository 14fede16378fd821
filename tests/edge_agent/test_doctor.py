"""Each ailment that can be seen beforehand is seen, named and given a remedy."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import grpc
import pytest

from edge_agent import doctor
from edge_agent.checks import fleet, machine, trainer
from edge_agent.checks.finding import Finding, fail, ok, render, warn
from edge_agent.config import AgentConfig
from edge_agent.link import Link
from edge_agent.probe import find_machine
from protos.contract import Reason
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import status_of

CARD = {"nvidia-smi": "NVIDIA GeForce RTX 4060, 8188, 7900, 8.9\n"}


def is_(finding: Finding, state, *words):
    """Whether a finding is in this state and says these words."""
    text = f"{finding.found} {finding.mend}"
    assert finding.state == state, finding
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    if state == "fail":
        assert finding.mend, "what fails is no use without a remedy"
    return True


# --- the machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["orin nano", "agx orin", "xavier", "thor", "laptop", "pi 5", "vm"]
)
def test_every_machine_can_be_examined(machines, tmp_path, name):
    made = machines(name)
    found = machine.examine(made, find_machine(made), tmp_path, None, None)
    assert all(f.found and f.state in ("ok", "warn", "fail", "skip") for f in found)


def test_an_old_python_is_told():
    assert is_(machine.python((3, 10)), "fail", "3.10", "3.11")
    assert is_(machine.python((3, 12)), "ok")


@pytest.mark.parametrize(
    ("name", "state", "word"),
    [("orin nano", "ok", "JetPack 6.2"), ("xavier", "warn", "legacy"), ("vm", "ok", "measured")],
)
def test_boards_are_named(machines, name, state, word):
    assert is_(machine.board(find_machine(machines(name))), state, word)


def test_a_tegra_that_is_not_known_is_told(machines):
    new = machines("orin nano", {"/proc/device-tree/compatible": "nvidia,tegra999\0"})
    assert is_(machine.board(find_machine(new)), "warn", "not known")


def memory_of(made, cap=None, base=None):
    return machine.memory(made, find_machine(made), cap, base)


def test_memory_is_held_against_what_the_base_needs(machines):
    made = machines("orin nano")
    assert is_(memory_of(made, None, 2 * 10**9), "ok", "6.0 of 8.0 GB available")
    assert is_(memory_of(made, None, 6 * 10**9), "fail", "needs about 7.7 GB")
    assert is_(memory_of(made, 10**9, None), "fail", "[limits] memory_mb allows 1.0 GB")
    files = {"/proc/self/cgroup": "0::/agent\n", "/sys/fs/cgroup/agent/memory.max": "1000000000"}
    assert is_(
        memory_of(machines("laptop", files)), "fail", "control group allows 1.0", "MemoryMax"
    )


def test_a_cards_memory_is_its_own(machines):
    assert is_(memory_of(machines("laptop", tools=CARD), None, 5 * 10**9), "ok", "8.3 GB on the")
    assert is_(memory_of(machines("laptop", tools=CARD), None, 9 * 10**9), "fail", "free the card")


def test_zram_takes_what_the_gpu_could_use(machines):
    made = machines("orin nano")
    assert is_(machine.swap(made, find_machine(made)), "warn", "zram", "nvzramconfig")
    made = machines("agx orin")
    assert is_(machine.swap(made, find_machine(made)), "warn", "swap file")
    made = machines("laptop")
    assert is_(machine.swap(made, find_machine(made)), "ok")


def test_a_full_disk_is_told(monkeypatch, tmp_path):
    for free, state in ((10**8, "fail"), (3 * 10**9, "warn"), (10**11, "ok")):
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, u=usage: u)
        assert is_(machine.disk(tmp_path / "not" / "there"), state)


def test_a_clock_is_synchronised_or_not_or_unknown(machines, monkeypatch):
    synced = machines("vm", {"/run/systemd/timesync/synchronized": ""})
    assert is_(machine.clock(synced), "ok", "timesyncd")
    for answer, state in ((0, "ok"), (5, "warn"), (None, "skip")):
        monkeypatch.setattr(machine, "_kernel_clock", lambda a=answer: a)
        assert is_(machine.clock(machines("vm")), state)


def driver_of(made):
    return machine.driver(made, find_machine(made))


def test_missing_device_files_are_told(machines):
    assert is_(driver_of(machines("orin nano")), "ok", "/dev/nvmap")
    hidden = machines("orin nano", {"/dev/nvmap": None})
    assert is_(driver_of(hidden), "fail", "PrivateDevices", "--runtime nvidia")
    assert is_(driver_of(machines("thor")), "ok", "/dev/nvidiactl")
    assert is_(driver_of(machines("laptop", tools=CARD)), "fail", "/dev/nvidiactl is not")
    assert is_(driver_of(machines("vm")), "skip")


def test_a_driver_whose_tool_hangs_is_told(machines):
    files = {"/dev/nvidiactl": "", "/proc/driver/nvidia/version": "NVRM version: 595\n"}
    assert is_(driver_of(machines("laptop", files)), "warn", "does not answer in time")


def test_a_device_file_that_may_not_be_opened_is_told(machines, monkeypatch):
    made = machines("orin nano")
    facts, opens = find_machine(made), Path.open

    def guarded(path, *mode):
        if path.name == "nvmap":
            raise PermissionError(13, "Permission denied")
        return opens(path, *mode)

    monkeypatch.setattr(Path, "open", guarded)
    assert is_(machine.driver(made, facts), "fail", "groups video and render")


def test_a_machine_near_its_limit_is_told(machines):
    assert is_(machine.heat(machines("orin nano")), "ok", "54 °C", "44 °C below")
    hot = machines("orin nano", {"/sys/class/thermal/thermal_zone0/temp": "95000"})
    assert is_(machine.heat(hot), "warn", "fan")
    assert is_(machine.heat(machines("vm")), "skip")


@pytest.mark.parametrize("sign", [sign for sign, _, _ in machine.SIGNATURES])
def test_failures_of_earlier_rounds_are_recognised(tmp_path, sign):
    log = tmp_path / "trainer.log"
    log.write_text("x" * 400_000 + f"\nRuntimeError: {sign} and so on\n")
    finding = machine.trainer_log(log)
    assert is_(finding, "warn") and finding.mend


def test_a_log_without_known_failures_is_well(tmp_path):
    assert is_(machine.trainer_log(tmp_path / "none"), "skip")
    (tmp_path / "log").write_bytes(b"\xff\xfe all well")
    assert is_(machine.trainer_log(tmp_path / "log"), "ok")


# --- the trainer --------------------------------------------------------------------------------

GOOD = (
    {"stage": "python", "version": "3.12.1", "executable": "/opt/python"},
    *({"stage": "import", "package": p, "version": "1"} for p in
      ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "accelerate")),
    {"stage": "cuda", "built": "13.2", "available": True, "name": "Orin", "capability": "8.7",
     "architectures": ["sm_80", "sm_90", "compute_120"], "unified": True},
    {"stage": "matmul", "relative_error": 0.003, "seconds": 0.1},
    {"stage": "nf4", "relative_error": 0.09, "seconds": 0.1},
)  # fmt: skip


def told(*changes, without=(), ended=""):
    """The facts of a good trainer with these stages replaced or left out."""
    replaced = {(c["stage"], c.get("package")): c for c in changes}
    facts = [replaced.get((f["stage"], f.get("package")), f) for f in GOOD
             if f["stage"] not in without]  # fmt: skip
    return trainer.read("\n".join(map(json.dumps, facts)).encode(), ended)


def judged(machines, check, name="orin nano", environment=None, groups=("video", "render"),
           tools=None):  # fmt: skip
    facts = find_machine(machines(name, tools=tools))
    return {f.name: f for f in trainer.judge(check, facts, environment or {}, groups)}


def test_a_good_trainer_is_well(machines):
    assert {f.state for f in judged(machines, told()).values()} == {"ok"}


def test_an_interpreter_that_is_not_there_is_told(machines):
    found = judged(machines, trainer.ask("/no/such/python"))
    assert list(found) == ["trainer"]
    assert is_(found["trainer"], "fail", "cannot be started", "[trainer] python")


def test_an_interpreter_that_hangs_or_dies_tells_where(machines, tmp_path):
    script = tmp_path / "python"
    begun = '{"stage":"python","version":"3.12"}\n{"stage":"begin","what":"import torch"}'
    for rest, words in (
        ("kill -11 $$", "exit code -11"),
        ("exec sleep 60", "no answer within 1 s"),
    ):
        script.write_text(f"#!/bin/sh\necho '{begun}'\n{rest}\n")
        script.chmod(0o755)
        found = judged(machines, trainer.ask(str(script), 1.0))
        assert is_(found["trainer"], "fail", words, "import torch")
        assert found["bf16 matmul"].state == "skip"


def test_missing_packages_are_told(machines):
    error = "ModuleNotFoundError: No module named 'peft'"
    found = judged(machines, told({"stage": "import", "package": "peft", "error": error}))
    assert is_(found["packages"], "fail", "peft", "sketchfleet[train]")
    found = judged(machines, told({"stage": "import", "package": "bitsandbytes", "error": "x"}))
    assert is_(found["bitsandbytes"], "fail", "Jetson AI Lab")


def test_a_wheel_without_cuda_on_a_board_with_a_gpu_is_told(machines):
    cpu = told({"stage": "cuda", "built": None, "available": False})
    assert is_(judged(machines, cpu)["cuda"], "fail", "built for CPUs only", "jp6/cu126")
    assert is_(judged(machines, cpu, "pi 5")["cuda"], "ok", "no GPU here")
    assert is_(judged(machines, cpu, "laptop", tools=CARD)["cuda"], "fail", "RTX 4060")


def blind(built, why="RuntimeError: no CUDA-capable device is detected"):
    return told({"stage": "cuda", "built": built, "available": False, "why": why})


def test_a_user_outside_the_groups_is_told(machines):
    found = judged(machines, blind("12.6"), groups=("users",))["cuda"]
    assert is_(found, "fail", "groups video and render", "PrivateDevices")
    assert is_(judged(machines, blind("12.6"), groups=("video",))["cuda"], "fail", "groups render")


def test_a_cuda_newer_than_the_jetpack_is_told(machines):
    assert is_(judged(machines, blind("13.0"))["cuda"], "fail", "JetPack 6.2", "AI Lab wheel")
    assert is_(judged(machines, blind("13.2"), "agx orin")["cuda"], "fail", "driver")


def test_a_container_that_hides_sys_from_thor_is_told(machines):
    found = judged(machines, blind("13.0", "RuntimeError: error 801"), "thor")["cuda"]
    assert is_(found, "fail", "read access to /sys")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("8.7", ["sm_80", "sm_90"], True), ("8.7", ["sm_87"], True), ("8.7", ["sm_89"], False),
        ("8.7", ["sm_90", "compute_90"], False), ("8.7", ["compute_80"], True),
        ("11.0", ["sm_100", "sm_120", "compute_120"], False), ("11.0", ["sm_110"], True),
        ("12.1", ["sm_120"], True), ("9.0", ["sm_90a"], True), ("7.2", ["sm_75", "sm_80"], False),
        ("", ["sm_80"], True), ("8.7", ["nonsense", "sm_"], False),
    ],
)  # fmt: skip
def test_code_runs_on_its_own_architecture_and_close_kin(capability, architectures, runs):
    assert (trainer.lacks_architecture(capability, architectures) == "") is runs


def test_a_wheel_without_code_for_the_board_is_told(machines):
    facts = next(f for f in GOOD if f["stage"] == "cuda")
    thor = told({**facts, "capability": "11.0", "architectures": ["sm_90", "sm_120"]})
    assert is_(judged(machines, thor, "thor")["cuda"], "warn", "no code for it", "sm_90")


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_allocators_that_fail_on_tegra_are_told(machines, setting):
    environment = {"PYTORCH_CUDA_ALLOC_CONF": setting}
    assert is_(judged(machines, told(), environment=environment)["allocator"], "warn", "remove it")
    pc = judged(machines, told(), "laptop", environment)["allocator"]
    assert is_(pc, "ok", setting)


def test_attempts_that_fail_or_are_wrong_are_told(machines):
    error = {"stage": "nf4", "error": "RuntimeError: named symbol not found"}
    assert is_(judged(machines, told(error))["4-bit"], "fail", "build it for the board")
    wrong = {"stage": "matmul", "relative_error": float("nan"), "seconds": 0.1}
    assert is_(judged(machines, told(wrong))["bf16 matmul"], "fail", "wrong")
    assert judged(machines, told(without=("nf4",)))["4-bit"].state == "skip"


# --- the fleet ----------------------------------------------------------------------------------


def test_a_state_folder_is_writable_and_private(tmp_path):
    assert is_(fleet.state_folder(tmp_path / "new"), "ok", "will be made")
    (tmp_path / "open").mkdir(mode=0o755)
    assert is_(fleet.state_folder(tmp_path / "open"), "warn", "chmod 700")
    (tmp_path / "shut").mkdir(mode=0o700)
    assert is_(fleet.state_folder(tmp_path / "shut"), "ok")
    (tmp_path / "file").write_text("")
    assert is_(fleet.state_folder(tmp_path / "file" / "x"), "fail")


@pytest.fixture
def config(tmp_path):
    """An agent's configuration; `sections` are added."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("print('a')\n" * 20)

    def with_these(address="127.0.0.1:1", **sections):
        return AgentConfig.model_validate({
            "data": {"include": [str(tmp_path / "code")]}, "device": {"name": "ash"},
            "coordinator": {"address": address, "plain_text": True,
                            "token_file": str(tmp_path / "token")},
            "state": {"folder": str(tmp_path / "state")}, **sections,
        })  # fmt: skip

    return with_these


def keep(folder, text, mode=0o600):
    folder.mkdir(exist_ok=True)
    (folder / "credential.json").write_text(text)
    (folder / "credential.json").chmod(mode)


def test_a_credential_is_there_fresh_and_private(config, tmp_path):
    settings = config()
    assert is_(fleet.credential(settings, 0.0)[0], "fail", "no join token", "token_file")
    (tmp_path / "token").write_text("t")
    assert is_(fleet.credential(settings, 0.0)[0], "ok", "will get one")
    kept = json.dumps({"credential": "c", "renew_at": 100 * 86400.0})
    keep(tmp_path / "state", kept)
    finding, credential = fleet.credential(settings, 98 * 86400.0)
    assert is_(finding, "ok", "renewed in 2.0 days") and credential == "c"
    assert is_(fleet.credential(settings, 101 * 86400.0)[0], "warn", "due for renewal for 1.0 days")
    keep(tmp_path / "state", kept, 0o644)
    assert is_(fleet.credential(settings, 0.0)[0], "warn", "chmod 600")
    keep(tmp_path / "state", "{")
    assert is_(fleet.credential(settings, 0.0)[0], "warn", "damaged")


def test_a_name_that_cannot_be_resolved_is_told(monkeypatch):
    def fails(*words, **more):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(fleet.socket, "getaddrinfo", fails)
    (finding,) = fleet.coordinator("fleet.lab:8470", lambda: Link("fleet.lab:8470"), False)
    assert is_(finding, "fail", "fleet.lab cannot be resolved", "DNS")


def test_a_closed_port_and_a_stranger_are_told():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        found = fleet.coordinator(address, lambda: Link(address), False)
        assert is_(found[-1], "fail", "refuses connections")
        listening.listen()
        found = fleet.coordinator(address, lambda: Link(address), False, 0.5)
        assert is_(found[-1], "fail", "is no coordinator")


class Known(rpc.FleetServiceServicer):
    """Lets one credential in."""

    async def Probe(self, request_iterator, context):
        if dict(context.invocation_metadata())["authorization"] != "Bearer right":
            await context.abort_with_status(status_of(Reason.BAD_CREDENTIAL, "not known"))
        async for message in request_iterator:
            if message.last:
                yield pb.ProbeResponse(timed_bytes=0, timed_s=1.0)


@pytest.mark.parametrize(
    ("kept", "state", "words"),
    [("right", "ok", "answers in"), ("", "ok", "not joined yet"), ("old", "warn", "enrols again")],
)
async def test_a_coordinator_answers_those_it_knows_and_those_it_does_not(kept, state, words):
    server = grpc.aio.server()
    rpc.add_FleetServiceServicer_to_server(Known(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        link = Link(f"127.0.0.1:{port}")
        link.credential = kept
        found = await fleet.answers(link, bool(kept), 5.0)
    finally:
        await server.stop(0)
    assert is_(found, state, words)


def base(folder):
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"w")
    return str(folder)


def test_a_base_is_read_and_held_against_the_last_runs(tmp_path):
    assert fleet.base_model("", "", False)[0].state == "skip"
    where = base(tmp_path / "base")
    finding, size = fleet.base_model(where, "", False)
    assert is_(finding, "ok", "digest") and size > 0
    assert is_(fleet.base_model(where, "f" * 64, False)[0], "warn", "ffffffffffff")
    assert is_(fleet.base_model(str(tmp_path / "gone"), "", False)[0], "fail", "does not exist")


def test_everything_is_examined_in_one_go(config, machines, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.trainer, "ask", lambda python: told())
    settings = config(model={"base": base(tmp_path / "base")})
    found = doctor.examine(settings, here=machines("orin nano"))
    names = [finding.name for finding in found]
    assert len(names) == len(set(names)) and {"python", "4-bit", "port", "model"} <= set(names)
    states = {finding.name: finding.state for finding in found}
    assert (states["data"], states["model"], states["port"]) == ("ok", "ok", "fail")
    (tmp_path / "code" / "a.py").unlink()
    found = doctor.examine(settings, here=machines("orin nano"))
    assert is_(next(f for f in found if f.name == "data"), "fail", "[data]")


def test_findings_are_shown_with_their_remedies_and_their_sum():
    text = render(
        [ok("a", "well"), warn("b", "so so", "could be better"), fail("c", "bad", "do x")]
    )
    assert text.splitlines()[0] == "ok   a             well"
    assert "-> could be better" in text and text.endswith("1 to mend, 1 to consider")
    assert render([ok("a", "well")]).endswith("all is well")


# --- the trainer's own side ---------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="starts the interpreter that runs the tests")
def test_this_very_interpreter_passes_its_check(machines):
    pytest.importorskip("torch")
    begun = time.monotonic()
    check = trainer.ask("")
    assert not check.ended, check.ended
    found = judged(machines, check, "vm")
    assert found["trainer"].state == found["packages"].state == "ok"
    assert found["bf16 matmul"].state == "ok" and time.monotonic() - begun < 120
