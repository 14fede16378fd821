"""Every board file is plausible, and recognises itself and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from profiles import boards as module
from profiles.boards import GIB, Board, load_boards, recognise
from profiles.catalogue import CatalogueError, choose, read_folder, source_of
from profiles.cost import ASSUMED_GPU_FLOPS, LocalWork, round_seconds
from profiles.device import DeviceProfile
from profiles.model import ModelShape
from profiles.models import load_models
from profiles.settings import parse_settings

BOARDS = load_boards()
SHAPE: ModelShape = load_models()["qwen2.5-coder-0.5b"].shape


def visible_bytes(board: Board) -> int:
    return int(board.memory.visible_gib * GIB)


def seconds(profile: DeviceProfile) -> float:
    work = LocalWork(
        precision="nf4", rank=8, parameters_per_rank=549_888, global_rank=32, sequence_tokens=512,
        micro_batch=4, accumulation=1, local_steps=10, checkpointing=True, evaluation_sequences=0,
        evaluates_global=False, slice_bytes=0, update_bytes=0, global_bytes=0,
    )  # fmt: skip
    return round_seconds(SHAPE, profile, work).train_s


# --- each file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOARDS)
def test_figures_are_of_the_size_that_hardware_has(name: str) -> None:
    board = BOARDS[name]
    memory = board.memory
    assert 2 <= memory.label_gib <= 192 and memory.label_gib % 1 == 0
    assert 0.8 * memory.label_gib <= memory.visible_gib < memory.label_gib
    assert 0.2 <= memory.idle_gib <= 0.3 * memory.visible_gib
    assert 10 <= memory.bandwidth_gb_per_s <= 2000
    if board.gpu is not None:
        gpu = board.gpu
        # Tensor cores give 2 to 4 times fp32 on cards, 8 to 32 times on Tegra; none gives 2 times.
        assert 1.9 <= gpu.dense_fp16_tflops / gpu.fp32_tflops <= 33
        assert 0.2 <= gpu.fp32_tflops <= 130
        assert 0.05 <= gpu.utilisation <= 0.5
        assert 5 <= float(gpu.compute_capability) <= 12.1
    if board.cpu is not None:
        assert 5 <= board.cpu.sustained_gflops / board.cpu.cores <= 60
        assert 2 <= board.cpu.cores <= 64
    assert all(mode.watts is None or 4 <= mode.watts <= 600 for mode in board.power_modes)


@pytest.mark.parametrize("name", BOARDS)
def test_a_kind_has_what_it_consists_of(name: str) -> None:
    board = BOARDS[name]
    match board.kind:
        case "jetson":
            assert board.gpu and board.cpu and board.memory.unified and board.power_modes
            assert any(c.startswith("nvidia,p") for c in board.recognise.compatible)
        case "card":
            assert board.gpu and not board.cpu and not board.memory.unified
            assert board.recognise.gpus and not board.recognise.models
        case "computer":
            assert board.cpu and not board.gpu and board.memory.unified


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_from_memory_is_told_as_checked(name: str) -> None:
    for source in BOARDS[name].sources:
        assert ("memory of" in source.source or "from memory" in source.source) == (
            source.status == "unverified"
        ), source


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_recognises_itself_by_each_of_its_compatible_strings_and_cards(name: str) -> None:
    board = BOARDS[name]
    for compatible in board.recognise.compatible:
        assert recognise("", [compatible, "nvidia,tegra999"], "", visible_bytes(board)) == name
    for gpu in board.recognise.gpus:
        assert recognise("", [], gpu, visible_bytes(board)) == name


@pytest.mark.parametrize("name", BOARDS)
def test_a_model_string_names_one_board_of_a_memory_or_leaves_it_to_the_module(name: str) -> None:
    board = BOARDS[name]
    known = board.recognise
    for model in known.models:
        assert recognise(model, known.compatible[:1], "", visible_bytes(board)) == name
        assert recognise(model, [], "", visible_bytes(board)) in (name, "")


@pytest.mark.parametrize("name", BOARDS)
def test_no_other_board_takes_it_for_itself(name: str) -> None:
    board, known = BOARDS[name], BOARDS[name].recognise
    others = {other.name: other for other in BOARDS.values() if other is not board}
    for other in others.values():
        found = recognise(
            *(known.models or ("",))[:1], known.compatible[:1], *(known.gpus or ("",))[:1],
            visible_bytes(other),
        )  # fmt: skip
        # Of another size it may be a variant of the family, never a stranger.
        family = name.split("-")[:2]
        assert found in ("", name) or found.split("-")[:2] == family, (name, found)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_can_be_planned_for_before_it_is_seen(name: str) -> None:
    board = BOARDS[name]
    profile = board.profile()
    assert profile.known_board == name and profile.compute is None and profile.link is None
    assert 0 < profile.trainer_bytes < visible_bytes(board)
    assert board.profile(memory_cap_bytes=10**9).trainer_bytes == 10**9
    assert (profile.gpu is None) == (board.gpu is None)


# --- recognition --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "compatible", "gpu", "memory_gib", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
         ["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"], "Orin",
         7.3, "orin-nano-super-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", [], "Orin", 7.3, "orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", [], "Orin", 3.4, "orin-nano-4gb"),
        ("NVIDIA Orin NX Developer Kit", ["nvidia,tegra234"], "Orin", 15.3, "orin-nx-16gb"),
        ("NVIDIA Orin NX Developer Kit", ["nvidia,tegra234"], "Orin", 7.3, "orin-nx-8gb"),
        ("A carrier of somebody's", ["x,y", "nvidia,p3767-0000", "nvidia,tegra234"], "Orin", 15.3,
         "orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", [], "", 61.4, "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", [], "", 29.9, "agx-orin-32gb"),
        ("", [], "NVIDIA Thor", 122.8, "agx-thor"),
        ("Raspberry Pi 5 Model B Rev 1.0", ["raspberrypi,5-model-b", "brcm,bcm2712"], "", 7.87,
         "raspberry-pi-5-8gb"),
        ("Raspberry Pi 5 Model B Rev 1.7", ["raspberrypi,5-model-b", "brcm,bcm2712"], "", 15.7,
         "raspberry-pi-5-16gb"),
        ("", [], "nvidia geforce  rtx 4090", 23.5, "rtx-4090"),
        ("", [], "GeForce RTX 3060", 11.76, "rtx-3060-12gb"),
    ],
)  # fmt: skip
def test_machines_are_recognised_by_what_they_say(
    model: str, compatible: list[str], gpu: str, memory_gib: float, name: str
) -> None:
    assert recognise(model, compatible, gpu, int(memory_gib * GIB)) == name


@pytest.mark.parametrize(
    ("model", "compatible", "gpu", "memory_gib"),
    [
        ("", [], "", 16),
        ("", ["nvidia,tegra234"], "Orin", 7.3),
        ("", [], "NVIDIA GeForce RTX 4090 Laptop GPU", 15.7),
        ("", [], "NVIDIA GeForce RTX 4060 Ti", 7.6),
        ("", [], "NVIDIA GeForce RTX 4090 D", 23.5),
        ("", [], "NVIDIA GeForce RTX 3060", 7.6),
        ("Raspberry Pi 5 Model B Rev 1.0", ["raspberrypi,5-model-b"], "", 1.9),
        ("Raspberry Pi 4 Model B Rev 1.4", ["raspberrypi,4-model-b"], "", 7.8),
        ("NVIDIA Jetson Xavier NX Developer Kit", [], "", 0),
    ],
)
def test_what_only_resembles_a_known_machine_is_unknown(
    model: str, compatible: list[str], gpu: str, memory_gib: float
) -> None:
    assert recognise(model, compatible, gpu, int(memory_gib * GIB)) == ""


# --- planning with it ---------------------------------------------------------------------------


def test_an_unmeasured_device_is_as_fast_as_its_board_is_assumed_to_be() -> None:
    slow, fast = BOARDS["orin-nano-8gb"], BOARDS["rtx-4090"]
    assert slow.gpu and fast.gpu
    ratio = seconds(slow.profile()) / seconds(fast.profile())
    assert ratio == pytest.approx(fast.gpu.dense_fp16_tflops / slow.gpu.dense_fp16_tflops)
    unknown = dataclasses.replace(slow.profile(), known_board="")
    assert seconds(slow.profile()) / seconds(unknown) == pytest.approx(
        ASSUMED_GPU_FLOPS / slow.gpu.assumed_flops(bf16=True)
    )
    strange = dataclasses.replace(slow.profile(), known_board="of a newer catalogue")
    assert seconds(strange) == seconds(unknown)


def test_a_gpu_without_bf16_counts_with_what_it_does_in_fp32() -> None:
    old = BOARDS["xavier-nx-8gb"]
    assert old.gpu
    new = dataclasses.replace(old.gpu, compute_capability="8.7")
    able = dataclasses.replace(old, gpu=new).profile()
    ratio = old.gpu.dense_fp16_tflops / old.gpu.fp32_tflops
    assert seconds(old.profile()) / seconds(able) == pytest.approx(ratio)


def test_a_processor_counts_by_itself_when_no_gpu_can_be_used() -> None:
    board = BOARDS["agx-orin-64gb"]
    assert board.cpu and board.gpu
    without = dataclasses.replace(board.profile(), gpu=None)
    ratio = board.gpu.assumed_flops(bf16=True) / board.cpu.assumed_flops()
    assert seconds(without) / seconds(board.profile()) == pytest.approx(ratio)
    card = dataclasses.replace(BOARDS["rtx-4090"].profile(), gpu=None)
    assert seconds(card) > 0  # the machine around it, of which nothing is known


# --- files that are wrong -----------------------------------------------------------------------

GOOD = Path(module.__file__).with_name("boards") / "rtx-4060.toml"


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> str:
    text = GOOD.read_text()
    assert old in text
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "rtx-4060.toml").write_text(text.replace(old, new, 1))
    monkeypatch.setattr("profiles.catalogue.resources.files", lambda package: tmp_path)
    with pytest.raises(CatalogueError) as raised:
        read_folder("boards", Board)
    return str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("unified", "unifed", "unknown key 'unifed' in [memory]; did you mean 'unified'?"),
        ("[memory]", "[memry]", "unknown key 'memry' in the top level; did you mean 'memory'?"),
        ("label_gib = 8\n", "", "[memory] lacks 'label_gib'"),
        ("label_gib = 8\n", "label_gib = -8\n", "[memory] label_gib: Input should be greater"),
        ("label_gib = 8\n", "label_gib = nan\n", "[memory] label_gib: Input should be a finite"),
        ("label_gib = 8\n", "label_gib = 'x'\n", "[memory] label_gib: Input should be a valid"),
        ('status = "published"', 'status = "sure"', "[[sources]] 1 status: Input should be"),
        ('  "gpu.fp32_tflops",\n', "", "no source for gpu.fp32_tflops"),
        ('"gpu.dense_fp16_tflops"', '"gpu.dense_fp16_tflops", "gpu.x"', "for gpu.x, not a fact"),
        ('name = "rtx-4060"', 'name = "rtx-4061"', "name the file like the entry"),
        ("[memory]", "[memory", "is not valid TOML"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: str
) -> None:
    said = broken(tmp_path, monkeypatch, old, new)
    assert said.startswith("profiles/boards/rtx-4060.toml") and words in said


def test_every_fact_has_its_narrowest_source() -> None:
    thor = BOARDS["agx-thor"]
    statuses = {
        fact: source.status
        for fact in ("memory.bandwidth_gb_per_s", "memory.visible_gib", "gpu.utilisation")
        if (source := source_of(thor, fact)) is not None
    }
    assert statuses == {
        "memory.bandwidth_gb_per_s": "unverified",
        "memory.visible_gib": "published",
        "gpu.utilisation": "assumed",
    }


@pytest.mark.parametrize(
    ("asked", "near"),
    [("orin-nano", "orin-nano-8gb"), ("rtx-4060-8gb", "rtx-4060"), ("orin-nx-32gb", "orin-nx-16gb"),
     ("4090", "rtx-4090")],
)  # fmt: skip
def test_a_name_that_is_none_brings_those_that_come_near(asked: str, near: str) -> None:
    with pytest.raises(CatalogueError, match=f"there is no board '{asked}'; did you mean .*{near}"):
        choose(asked, BOARDS, "board")
    assert choose(" ORIN-NX-16GB", BOARDS, "board") is BOARDS["orin-nx-16gb"]
    with pytest.raises(CatalogueError, match=r"no board '#'; there are agx-orin-32gb, .*xavier"):
        choose("#", BOARDS, "board")


def test_text_with_lists_of_tables_is_explained_by_number() -> None:
    text = GOOD.read_text().replace('status = "unverified"', 'statuss = "unverified"', 1)
    with pytest.raises(CatalogueError, match=r"'statuss' in \[\[sources\]\] 2; did you mean 'stat"):
        parse_settings(text, "x.toml", Board, CatalogueError)
