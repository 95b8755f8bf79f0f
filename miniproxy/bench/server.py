"""What answers in the pods: `python -m miniproxy.bench.server PORT`, one process for all their addresses.

Says to every connection which endpoint it came to, and closes it.
"""

from __future__ import annotations

import socket
import sys


def main(port: int) -> None:
    """Serve until killed."""
    with socket.create_server(("0.0.0.0", port), backlog=4096) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            try:
                connection.send(connection.getsockname()[0].encode())
            except OSError:
                pass  # the client has gone
            finally:
                connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
