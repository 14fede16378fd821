import os

for how in (os.symlink, os.link):
    try:
        how(SECRET, "mine")
        with open("mine") as file:
            evidence("TAKEN-FILE " + file.read())
    except OSError:
        pass
    finally:
        if os.path.lexists("mine"):
            os.unlink("mine")
raise SystemExit
