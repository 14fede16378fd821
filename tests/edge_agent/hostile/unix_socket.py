import socket

for address in (SOCKET, ABSTRACT, "/run/docker.sock", "/run/dbus/system_bus_socket"):
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(address)
            end.send(b"hello")
    except OSError:
        pass
raise SystemExit
