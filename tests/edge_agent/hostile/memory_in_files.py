import os
import time

for where in ("/dev/shm", "/tmp", "/run", OUTSIDE):
    try:
        with open(f"{where}/held", "wb") as file:
            file.write(b"x" * 1000)
        evidence("ESCAPED")
    except OSError:
        pass
try:
    os.memfd_create("held")
    evidence("memfd")
except OSError:
    pass
time.sleep(1000)
