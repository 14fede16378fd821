def answer():
    return 0

text = """
