import os
import subprocess

for command in (["/bin/sh", "-c", "echo ESCAPED"], ["/usr/bin/id"], ["/usr/bin/python3", "-V"]):
    try:
        if subprocess.run(command, capture_output=True).returncode == 0:
            evidence("ESCAPED")
    except OSError:
        pass
try:
    os.execv("/bin/sh", ["sh", "-c", "echo ESCAPED"])
except OSError:
    pass
raise SystemExit
