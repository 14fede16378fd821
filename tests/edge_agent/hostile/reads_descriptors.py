import os

for fd in range(3, 64):
    try:
        evidence(repr(os.read(fd, 100)))
        evidence("ESCAPED")
    except OSError:
        pass
raise SystemExit
