"""The lab's own processes: `python -m miniproxy.lab server LAB`, `… watchdog LAB PID STARTED`, `… machine FOLDER`."""

import sys

if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        from .server import main as serve

        serve(*arguments)
    elif role == "machine":
        from .machine import serve as serve_machine

        serve_machine(*arguments)
    else:
        from .watchdog import main as watch

        watch(*arguments)
