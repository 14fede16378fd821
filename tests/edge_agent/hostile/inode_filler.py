import os

i = 0
while True:
    try:
        os.mkdir(f"folder{i}")
    except OSError:
        pass
    i += 1
