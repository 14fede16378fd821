import socket
import urllib.request

for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        with socket.socket(socket.AF_INET, kind) as end:
            end.connect(("127.0.0.1", PORT))
            end.send(b"hello")
    except OSError:
        pass
try:
    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=1)
except OSError:
    pass
raise SystemExit
