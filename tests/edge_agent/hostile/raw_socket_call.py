import ctypes

libc = ctypes.CDLL(None, use_errno=True)
end = libc.socket(2, 1, 0)
address = (2).to_bytes(2, "little") + PORT.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
if libc.connect(end, address, 16) == 0:
    evidence("ESCAPED")
raise SystemExit
