"""`sketchfleet-agent bundle`: all that a platform needs goes in, and never half of it.

pip is real, with a folder of made-up wheels in the place of an index.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution

import pytest

from edge_agent import bundle, cli, own_wheel
from edge_agent.bundle import BundleError, make, wanted
from edge_agent.bundle_wheels import WheelError, collect, read_pins
from edge_agent.own_wheel import OwnWheelError, packed_again
from edge_agent.platforms import PLATFORMS

JETPACK6 = PLATFORMS["jetpack6"]


def write_wheel(folder, name, version="1.0", *, needs=(), tag="py3-none-any", extras=()):
    """A wheel without code."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    told = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    told += [f"Provides-Extra: {extra}" for extra in extras]
    told += [f"Requires-Dist: {need}" for need in needs]
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(told) + "\n")
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The folder that pip takes wheels from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def own(tmp_path):
    """A wheel in the place of Sketchfleet's."""
    return write_wheel(
        tmp_path / "own", "sketchfleet", "0.1.0", extras=("agent", "serve"),
        needs=("wire>=1", 'agent-part; extra == "agent"', 'serve-part[fast]; extra == "serve"'),
    )  # fmt: skip


def names(paths):
    return sorted(path.name.split("-")[0] for path in paths)


# --- which wheels -------------------------------------------------------------------------------


def test_markers_are_those_of_the_platform_and_not_of_this_machine(index, own, tmp_path):
    write_wheel(index, "wire", needs=(
        "old; python_version < '3.11'", "new; python_version >= '3.11'",
        "arm; platform_machine == 'aarch64'", "intel; platform_machine == 'x86_64'",
    ))  # fmt: skip
    for name in ("old", "new", "intel", "agent_part"):
        write_wheel(index, name)
    write_wheel(index, "arm", tag="cp310-cp310-manylinux_2_28_aarch64")
    pins = dict.fromkeys(("wire", "old", "new", "arm", "intel", "agent-part"), "1.0")
    found = collect(own, ["agent"], JETPACK6, "3.10", pins, tmp_path)
    assert names(found) == ["agent_part", "arm", "old", "wire"]


def test_an_extra_that_is_asked_for_later_is_heard(index, own, tmp_path):
    write_wheel(index, "wire", needs=("serve-part",))
    write_wheel(index, "serve_part", extras=("fast",), needs=('quick; extra == "fast"',))
    write_wheel(index, "quick", needs=("wire",))
    pins = dict.fromkeys(("wire", "serve-part", "quick"), "1.0")
    assert names(collect(own, ["serve"], JETPACK6, "3.10", pins, tmp_path)) == [
        "quick", "serve_part", "wire",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tag",
    [
        "cp312-cp312-manylinux_2_28_aarch64",
        "cp310-cp310-manylinux_2_39_aarch64",
        "cp310-cp310-manylinux_2_28_x86_64",
    ],
)
def test_a_wheel_for_another_machine_is_a_missing_wheel(index, own, tmp_path, tag):
    write_wheel(index, "wire", tag=tag)
    with pytest.raises(WheelError, match=r"wheel of wire==1.0 for jetpack6 \(Python 3.10, aarch64"):
        collect(own, [], JETPACK6, "3.10", {"wire": "1.0"}, tmp_path)


def test_a_build_that_lacks_the_boards_gpu_is_not_taken(index, tmp_path):
    own = write_wheel(tmp_path / "own", "sketchfleet", needs=("torch",))
    write_wheel(index, "torch", "2.8.0", tag="cp310-cp310-manylinux_2_28_aarch64")
    pins = {"torch": "2.8.0"}
    with pytest.raises(WheelError, match=r"head of constraints/jetpack6\.txt"):
        collect(own, [], JETPACK6, "3.10", pins, tmp_path)
    write_wheel(index, "torch", "2.8.0", tag="cp310-cp310-linux_aarch64")
    assert names(collect(own, [], JETPACK6, "3.10", pins, tmp_path)) == ["torch"]


def test_without_a_gpu_the_build_for_cpus_is_taken(index, tmp_path):
    own = write_wheel(tmp_path / "own", "sketchfleet", needs=("torch>=2",))
    for version in ("2.13.0", "2.13.0+cpu"):
        write_wheel(index, "torch", version, tag="cp312-cp312-manylinux_2_28_x86_64")
    found = collect(own, [], PLATFORMS["x86-cpu"], "3.12", {"torch": "2.13.0"}, tmp_path)
    assert [path.name.split("-")[1] for path in found] == ["2.13.0+cpu"]


@pytest.mark.parametrize(("pins", "said"), [({}, "pins none"), ({"wire": "0.9"}, "pins 0.9")])
def test_pins_that_do_not_fit_are_named(index, own, tmp_path, pins, said):
    with pytest.raises(WheelError, match=f"sketchfleet asks for wire>=1, .*{said}"):
        collect(own, [], JETPACK6, "3.10", pins, tmp_path)


def test_every_platforms_pins_can_be_read():
    for name in PLATFORMS:
        assert "grpcio" in read_pins(bundle.shipped(f"constraints/{name}.txt"))


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture
def complete(index, own, tmp_path, monkeypatch):
    """A wish that can be fulfilled."""
    for name in ("wire", "agent_part"):
        write_wheel(index, name)
    pins = tmp_path / "pins.txt"
    pins.write_text("# pins\nwire==1.0\nagent-part==1.0\n")
    real = bundle.shipped
    monkeypatch.setattr(
        bundle, "shipped", lambda name: pins if name.startswith("constraints") else real(name)
    )
    monkeypatch.setattr(bundle, "own_wheel", lambda folder: own.rename(folder / own.name))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "blob").write_bytes(b"weights")
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "a.safetensors").symlink_to(tmp_path / "snapshots" / "blob")
    (tmp_path / "agent.toml").write_text('[data]\ninclude = ["/code"]\n')
    return wanted("jetpack6", None, "agent", tmp_path / "model", tmp_path / "agent.toml", None)


@pytest.fixture
def out(tmp_path):
    """A folder of its own, so that what is left behind shows."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle.tar"


def test_a_bundle_holds_everything_and_says_so_itself(complete, out):
    manifest = make(complete, out)
    with tarfile.open(out) as archive:
        archive.extractall(out.parent / "there", filter="data")
        assert all(member.isfile() and member.uid == 0 for member in archive)
    (top,) = (out.parent / "there").iterdir()
    assert top.name == "sketchfleet-0.1.0-jetpack6"
    files = {path.relative_to(top).as_posix(): path for path in top.rglob("*") if path.is_file()}
    assert {"install.sh", "systemd/sketchfleet-agent.service", "agent.toml", "constraints.txt",
            "model/config.json", "model/deep/a.safetensors", "wheels/wire-1.0-py3-none-any.whl",
            "wheels/sketchfleet-0.1.0-py3-none-any.whl"} <= set(files)  # fmt: skip
    assert "join" not in files
    assert files["model/deep/a.safetensors"].read_bytes() == b"weights", "links are followed"
    assert files["install.sh"].stat().st_mode & 0o111
    assert [files[name].read_text() for name in ("EXTRAS", "PYTHON", "MACHINE")] == [
        "agent\n", "3.10\n", "aarch64\n",
    ]  # fmt: skip
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=top, check=True)
    told = json.loads(files["manifest.json"].read_text())
    assert told == manifest
    assert told["files"].keys() == files.keys() - {"manifest.json", "SHA256SUMS"}
    for name, facts in told["files"].items():
        content = files[name].read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    listed = (top / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in listed} == files.keys() - {"SHA256SUMS"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle.tar", "there"]


def test_a_bundle_with_a_join_file_is_its_owners_alone(complete, out, tmp_path):
    (tmp_path / "join").write_text("secret")
    make(bundle.Wanted(**{**vars(complete), "join": tmp_path / "join"}), out)
    assert out.stat().st_mode & 0o777 == 0o600
    with tarfile.open(out) as archive:
        (join,) = [member for member in archive if member.name.endswith("/join")]
        assert archive.extractfile(join).read() == b"secret"
        assert join.mode == 0o600


def test_what_is_there_is_not_written_over(complete, out):
    out.write_text("mine")
    with pytest.raises(BundleError, match="is there already"):
        make(complete, out)
    assert out.read_text() == "mine"


def nothing_left(out):
    return list(out.parent.iterdir()) == []


def test_without_room_nothing_is_left(complete, out, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(BundleError, match="make room there"):
        make(complete, out)
    assert nothing_left(out)


@pytest.mark.parametrize("at", ["collect", "sha256_of"])
def test_interrupted_nothing_is_left(complete, out, monkeypatch, at):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(complete, out)
    assert nothing_left(out)


def test_a_disk_that_fills_while_the_tar_is_written_leaves_nothing(complete, out, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "bundle.tar")

    monkeypatch.setattr(bundle.tarfile.TarFile, "add", full)
    with pytest.raises(OSError, match="No space"):
        make(complete, out)
    assert nothing_left(out)


def test_an_unknown_extra_is_refused(complete, out):
    with pytest.raises(BundleError, match="no extra 'agents'; choose from agent, serve"):
        make(bundle.Wanted(**{**vars(complete), "extras": ("agents",)}), out)
    assert nothing_left(out)


def test_a_name_that_no_list_of_sums_can_hold_is_refused(complete, out):
    (complete.model / "a\nb").write_text("")
    with pytest.raises(BundleError, match="rename it"):
        make(complete, out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jetpack5"], "choose from jetpack6, jetpack7, x86-cuda, x86-cpu"),
        (["jetpack6", "--python", "3.12"], "jetpack6 has Python 3.10, not 3.12"),
        (["x86-cpu", "--model", "gone"], "gone is no folder"),
        (["x86-cpu", "--join", "gone"], "gone is no file"),
        (["x86-cpu", "--config", "gone"], "gone cannot be read"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_fetched(words, said, capsys, out, index):
    assert cli.main(["bundle", *words, "--out", str(out)]) not in (0, None)
    assert said in capsys.readouterr().err
    assert nothing_left(out)


# --- our own wheel ------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path):
    """An installation as pip leaves it: (distribution, folder)."""
    site = tmp_path / "site-packages"
    files = {"edge_agent/a.py": b"A = 1\n", "edge_agent/shipped/x.txt": b"x",
             "sketchfleet-0.1.0.dist-info/METADATA": b"Name: sketchfleet\nVersion: 0.1.0\n",
             "sketchfleet-0.1.0.dist-info/INSTALLER": b"pip\n"}  # fmt: skip
    lines = []
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        lines.append(f"{name},sha256={digest},{len(content)}")
    lines += [
        "edge_agent/__pycache__/a.cpython-310.pyc,,",
        "../../../bin/sketchfleet-agent,sha256=x,1",
    ]
    info = site / "sketchfleet-0.1.0.dist-info"
    (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/RECORD,,", ""]))
    return PathDistribution(info), site


def test_an_installation_becomes_a_wheel_again(installed, tmp_path):
    wheel = packed_again(installed[0], tmp_path)
    assert wheel.name == "sketchfleet-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == [
            "edge_agent/a.py", "edge_agent/shipped/x.txt",
            "sketchfleet-0.1.0.dist-info/METADATA", "sketchfleet-0.1.0.dist-info/RECORD",
        ]  # fmt: skip
        assert archive.read("edge_agent/a.py") == b"A = 1\n"
        recorded = archive.read("sketchfleet-0.1.0.dist-info/RECORD").decode()
    assert recorded.count("sha256=") == 3
    assert "bin/" not in recorded


def test_a_changed_installation_is_not_handed_on(installed, tmp_path):
    (installed[1] / "edge_agent" / "a.py").write_text("A = 2\n")
    with pytest.raises(OwnWheelError, match=r"edge_agent/a.py .* was changed since"):
        packed_again(installed[0], tmp_path)


def test_what_is_neither_installed_nor_sources_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(own_wheel, "__file__", str(tmp_path / "edge_agent" / "own_wheel.py"))
    monkeypatch.setattr(own_wheel, "NAME", "sketchfleet-that-nobody-installed")
    with pytest.raises(OwnWheelError, match="install it with pip"):
        own_wheel.own_wheel(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jetpack6", "jetpack7"])
def test_a_real_bundle_is_all_that_a_resolver_asks_for_there(name, tmp_path):
    """Wheels of the index for the board's tags; then the resolver has nothing but them."""
    platform, out = PLATFORMS[name], tmp_path / "bundle.tar"
    try:
        make(wanted(name, None, "agent,serve", None, None, None), out)
    except WheelError as error:
        pytest.skip(f"no package index answers from here: {error}")
    with tarfile.open(out) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    (top,) = (tmp_path / "there").iterdir()
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=top, check=True)
    (tmp_path / "asked").write_text("sketchfleet[agent,serve]")
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "--quiet", str(tmp_path / "asked"),
         "--no-index", "--find-links", str(top / "wheels"), "--no-header", "--no-annotate",
         "--python-platform", f"{platform.machine}-manylinux_2_{platform.glibc}",
         "--python-version", platform.pythons[0], "--no-python-downloads"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    resolved = {line.split("==")[0].replace("-", "_") for line in done.stdout.split()}
    assert resolved == {path.name.split("-")[0].lower() for path in (top / "wheels").iterdir()}
