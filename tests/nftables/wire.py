"""Run in a network namespace: many clients and many servers in one process. JSON in, JSON out.

Input: {"servers": [[address, port], …], "rounds": [{"to": [address, port], "from": [address, …], "tcp": false}]}.
For each round, a connection (or one datagram and its answer) from each address in "from", "" being any; output is the
list of servers reached, by round: "ADDRESS:PORT", or "" where nobody answered.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import threading
from typing import Any


def serve(address: str, port: int, selector: selectors.BaseSelector) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    name = f"{address}:{port}".encode()
    datagrams = socket.socket(family, socket.SOCK_DGRAM)
    datagrams.bind((address, port))
    selector.register(datagrams, selectors.EVENT_READ, (False, name))
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(1024)
    selector.register(listener, selectors.EVENT_READ, (True, name))


def answer(selector: selectors.BaseSelector) -> None:
    while True:
        for key, _ in selector.select():
            sock: Any = key.fileobj
            stream, name = key.data
            if stream:
                connection, _ = sock.accept()
                with connection:
                    connection.sendall(name)
            else:
                _, peer = sock.recvfrom(16)
                sock.sendto(name, peer)


def ask(to: tuple[str, int], source: str, stream: bool) -> str:
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        if source:
            sock.bind((source, 0))
        try:
            sock.connect(to)
            if not stream:
                sock.send(b"?")
            return sock.recv(100).decode()
        except OSError:
            return ""


def main() -> None:
    task = json.load(sys.stdin)
    selector = selectors.DefaultSelector()
    for address, port in task["servers"]:
        serve(address, port, selector)
    threading.Thread(target=answer, args=(selector,), daemon=True).start()
    rounds = []
    for round_ in task["rounds"]:
        to = (round_["to"][0], round_["to"][1])
        rounds.append([ask(to, source, round_.get("tcp", False)) for source in round_["from"]])
    json.dump(rounds, sys.stdout)


if __name__ == "__main__":
    main()
