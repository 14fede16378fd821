import os
import shutil

for path in (OUTSIDE, os.path.dirname(SECRET), "/usr", "/lib", "/"):
    shutil.rmtree(path, ignore_errors=True)
for path in (SECRET,):
    for how in (os.unlink, lambda p: os.truncate(p, 0), lambda p: os.rename(p, "mine"),
                lambda p: os.chmod(p, 0), lambda p: os.utime(p, (0, 0))):  # fmt: skip
        try:
            how(path)
        except OSError:
            pass
raise SystemExit
