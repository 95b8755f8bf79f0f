"""A client that keeps one UDP flow alive: stream.py ADDRESS PORT. It sends every 20 ms from the same socket, and
prints who answers when that changes, and every second: "ENDPOINT:PORT" or "nobody" (no answer for half a second).
"""

from __future__ import annotations

import socket
import sys
import time


def main(address: str, port: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("", 40053))
        client.settimeout(0.02)
        client.connect((address, int(port)))
        print("ready", flush=True)
        said, said_at, heard_at = "", 0.0, time.monotonic()
        while True:
            now = ""
            try:
                client.send(b"?")
                words = client.recv(200).decode().split()
                now, heard_at = f"{words[0]}:{words[1]}", time.monotonic()
            except OSError:  # silence, or a refusal of an earlier packet
                if time.monotonic() - heard_at > 0.5:
                    now = "nobody"
            if now and (now != said or time.monotonic() - said_at > 1):
                said, said_at = now, time.monotonic()
                print(now, flush=True)
            time.sleep(0.02)


main(*sys.argv[1:])
