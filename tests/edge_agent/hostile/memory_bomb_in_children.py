import os
import time

while True:  # each within its own limit
    try:
        if os.fork() == 0:
            held = bytearray(b"x" * 60_000_000)
            time.sleep(1000)
    except (OSError, MemoryError):
        time.sleep(0.01)
