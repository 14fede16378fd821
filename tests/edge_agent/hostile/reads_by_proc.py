import os

for process in ("self", "1", str(PARENT), str(os.getppid())):
    for name in (f"root{SECRET}", f"cwd/../{SECRET}"):
        try:
            with open(f"/proc/{process}/{name}") as file:
                evidence("TAKEN-FILE " + file.read())
        except OSError:
            pass
    for name in ("mem", "environ", "maps"):
        try:
            with open(f"/proc/{process}/{name}", "rb") as file:
                if b"TAKEN-ENVIRONMENT" in file.read(1 << 20):
                    evidence("TAKEN-ENVIRONMENT")
        except (OSError, ValueError, OverflowError):
            pass
raise SystemExit
