import os

for path in (f"{OUTSIDE}/escaped", "/escaped", "/tmp/escaped", "/var/tmp/escaped", "../escaped"):
    for flags in (os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        try:
            os.write(os.open(path, flags), b"x")
            evidence(f"ESCAPED {path}")
        except OSError:
            pass
try:
    with open(SECRET, "a") as file:
        file.write("x")
except OSError:
    pass
raise SystemExit
