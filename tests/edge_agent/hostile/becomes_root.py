import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for how in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0])):
    try:
        how()
    except OSError:
        pass
for flags in (0x10000000, 0x10020000, 0x20000, 0x40000000, 0x20000000):
    if libc.unshare(flags) == 0:
        evidence("ESCAPED by unshare")
if libc.mount(b"none", b"/", b"tmpfs", 0, None) == 0:
    evidence("ESCAPED by mount")
try:
    os.mkdir("root")
    os.chroot("root")
    evidence("ESCAPED by chroot")
except OSError:
    pass
if libc.ptrace(16, PARENT, 0, 0) == 0:
    evidence("ESCAPED by ptrace")
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    evidence("ESCAPED the killer of processes")
except OSError:
    pass
raise SystemExit
