import os
import resource

for process in (PARENT, os.getppid(), 1):
    try:
        resource.prlimit(process, resource.RLIMIT_CPU, (1, 1))
        if process == PARENT:
            evidence("ESCAPED")
    except OSError:
        pass
for process in (PARENT, 1):
    try:
        os.setpriority(os.PRIO_PROCESS, process, 19)
        evidence("slowed")
    except OSError:
        pass
raise SystemExit
