"""What the Linux kernel offers to keep a program in, by the C library: nothing but system calls.

Namespaces, mounts, capabilities, Landlock (landlock(7)) and a seccomp filter (seccomp(2)), for
x86-64 and aarch64. Knows no policy: `sandbox_jail` decides what is applied. Imports only what the
standard library has, since the jail starts an interpreter without any package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ANY_NAMESPACE = 0x7E020000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP = 1, 4, 21, 22
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 24, 36, 38
SECCOMP_MODE_FILTER = 2
LAST_CAPABILITY = 63

MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
LANDLOCK_WRITE_FILE, LANDLOCK_READ_FILE, LANDLOCK_READ_DIR = 1 << 1, 1 << 2, 1 << 3
LANDLOCK_TRUNCATE = 1 << 14
# Remove folders and files; make folders, files, pipes and links, but no sockets or devices.
LANDLOCK_MAKES = 0b1010110110000
LANDLOCK_TCP, LANDLOCK_SCOPES = 0b11, 0b11

# Numbers on x86-64 and aarch64. What can reach other processes, the network, the kernel's insides
# or memory that no limit counts.
DENIED: dict[str, tuple[int, int]] = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "kexec_load": (246, 104), "open_by_handle_at": (304, 265), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "personality": (135, 92),
    "kcmp": (312, 272), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "mq_open": (240, 180), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
}  # fmt: skip
# Where a process sees others of its user: what could stop, slow or starve them.
DENIED_AMONG_OTHERS: dict[str, tuple[int, int]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
CLONE, CLONE3, PRLIMIT64 = (56, 220), (435, 435), (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def _done(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leaves the named namespaces for new ones. Raises `OSError`."""
    _done(libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Attaches a file system or, with MS_BIND, another folder. Raises `OSError`."""
    words = [word.encode() or None for word in (source, target, kind, data)]
    result = libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _done(result, f"mount {target}")


def make_read_only(target: str) -> None:
    """Makes a mount and all below it read-only, without set-user-id files or devices."""
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, 32) == 0:
        return
    # Before Linux 5.12; what is mounted already must not lose the flags it has.
    kept = os.statvfs(target).f_flag & 0xFF
    flags = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept
    mount("", target, "", flags)


def change_root(folder: str) -> None:
    """Makes a mounted folder the root, and lets go of the old one."""
    os.chdir(folder)
    _done(libc.pivot_root(b".", b"."), "pivot_root")
    _done(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def prctl(option: int, value: int = 0) -> int:
    """Asks the kernel for something with one value; -1 when it refuses."""
    word = ctypes.c_ulong
    return int(libc.prctl(option, word(value), word(0), word(0), word(0)))


def drop_capabilities() -> None:
    """Gives up every capability, for itself and for whatever it executes."""
    for capability in range(LAST_CAPABILITY + 1):
        prctl(PR_CAPBSET_DROP, capability)  # fails beyond the last that this kernel knows
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    _done(libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def landlock_version() -> int:
    """The version of Landlock's interface; 0 where the kernel has none."""
    return max(0, int(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)))


def apply_landlock(readable: Sequence[str], writable: Sequence[str]) -> None:
    """From now on only these paths, and what is below them: nothing is executed, none connected.

    Where the kernel knows them: no TCP, no signals and no abstract sockets to other processes.
    Raises `OSError`.
    """
    version = landlock_version()
    every = _rights(version)
    attributes = struct.pack("QQQ", every, LANDLOCK_TCP, LANDLOCK_SCOPES)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _done(
        libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0), "Landlock ruleset"
    )
    reads = LANDLOCK_READ_FILE | LANDLOCK_READ_DIR
    changes = (reads | LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE | LANDLOCK_MAKES) & every
    for paths, rights in ((readable, reads), (writable, changes)):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # then there is nothing to allow
                _allow(rules, path, rights)
    _done(libc.syscall(LANDLOCK_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


def _rights(version: int) -> int:
    """What there is to restrict in the file system, by the version of the interface."""
    bits = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    return (1 << bits) - 1


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):  # noqa: PTH112 - no more than what is needed is imported
            rights &= LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE
        rule = struct.pack("=Qi", rights, place)
        _done(libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0), f"Landlock rule for {path}")
    finally:
        os.close(place)


def has_seccomp() -> bool:
    """Whether a filter can be set here."""
    return platform.machine() in ARCHITECTURES and prctl(PR_GET_SECCOMP) >= 0


def apply_seccomp(among_others: bool) -> None:
    """From now on the denied calls fail with EPERM. Raises `OSError`.

    among_others: also deny what reaches other processes of the same user.
    """
    program = b"".join(_filter(among_others))
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    place = ctypes.create_string_buffer(head)
    null = ctypes.c_ulong(0)
    result = libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), place, null, null)
    _done(result, "seccomp")


def _filter(among_others: bool) -> list[bytes]:
    """Classic BPF over seccomp_data: call number at 0, architecture at 4, arguments at 16."""
    column, architecture = ARCHITECTURES[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, unknown, allow = 0x80000000, 0x50000 | EPERM, 0x50000 | ENOSYS, 0x7FFF0000

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    steps = [step(load, 4), step(equal, architecture, 1, 0), step(answer, kill), step(load, 0)]
    # The x32 interface has the same calls under other numbers.
    steps += [step(at_least, 0x40000000, 0, 1), step(answer, refuse)]
    denied = {**DENIED, **DENIED_AMONG_OTHERS} if among_others else DENIED
    for numbers in denied.values():
        steps += [step(equal, numbers[column], 0, 1), step(answer, refuse)]
    # The C library falls back to clone, whose flags a filter can read.
    steps += [step(equal, CLONE3[column], 0, 1), step(answer, unknown)]
    steps += [step(equal, CLONE[column], 0, 4), step(load, 16)]
    steps += [step(any_bit, ANY_NAMESPACE, 0, 1), step(answer, refuse), step(answer, allow)]
    # Its own limits may be lowered, nobody else's be touched.
    steps += [step(equal, PRLIMIT64[column], 0, 3), step(load, 16)]
    steps += [step(equal, 0, 1, 0), step(answer, refuse)]
    return [*steps, step(answer, allow)]
