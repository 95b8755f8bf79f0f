"""The lab's own processes: `python -m miniproxy.lab server LAB` and `… watchdog LAB PID STARTED`."""

import sys

if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        from .server import main as serve

        serve(*arguments)
    else:
        from .watchdog import main as watch

        watch(*arguments)
