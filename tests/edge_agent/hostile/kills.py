import os
import signal

for process in (PARENT, os.getppid(), 1, -1, 0):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP):
        try:
            os.kill(process, number)
        except OSError:
            pass
