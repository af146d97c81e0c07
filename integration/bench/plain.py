"""A file through one TCP connection, with nothing around it: what a line carries.

python -m integration.bench.plain send ADDRESS PORT FILE        # says "ready", serves one connection
python -m integration.bench.plain receive ADDRESS PORT FILE     # FILE is there and as long
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

PIECE = 1 << 20


def send(address: str, port: int, path: str) -> None:
    """Wait for who connects, and send the file."""
    with socket.create_server((address, port)) as listener, Path(path).open("rb") as file:
        print("ready", flush=True)
        end, _ = listener.accept()
        with end:
            end.sendfile(file)


def receive(address: str, port: int, path: str) -> None:
    """Write what comes over the file."""
    buffer = memoryview(bytearray(PIECE))
    with socket.create_connection((address, port)) as end, Path(path).open("r+b", buffering=0) as file:
        while length := end.recv_into(buffer):
            os.write(file.fileno(), buffer[:length])


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](sys.argv[2], int(sys.argv[3]), sys.argv[4])
