"""A real agent under a server that misbehaves, by the clock: sudo python -m tests.sources.soak [MINUTES]

The tests do the same in haste; this is how long things really take. In a network namespace, a real `miniproxy run` in
nftables mode follows the server of fake_api.py through four phases, and this prints what came of each:

    abuse     half of all requests go wrong, in every way there is, and something changes each second
    relists   nothing changes, but the server forgets what was, again and again: nothing may be written
    away      no server for a sixth of the time, and then one with another state
    after     the kernel has to hold what the server does
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .broken import endpoint_slice, node, service
from .fake_api import FakeApi, Store, troubled
from .test_kube_source import change_something, kubeconfig

METRICS = "127.0.0.1:10249"
SEED = 20261129
_TICKS = os.sysconf("SC_CLK_TCK")


class Soak:
    def __init__(self, folder: Path, minutes: float) -> None:
        self.minute = minutes / 30 * 60  # seconds
        self.chance = random.Random(SEED)
        self.store = Store()
        for thing in (service("web"), endpoint_slice("web-1"), node("n1")):
            self.store.put(thing)
        self.api = FakeApi(self.store)
        self.api.hold_seconds = 0.2
        self.folder = folder

    @contextmanager
    def agent(self) -> Iterator[subprocess.Popen[bytes]]:
        config = kubeconfig(self.folder / "kubeconfig", self.api.url, {"token": "t"})
        argv = [sys.executable, "-m", "miniproxy", "run", "--kubeconfig", config, "--hostname-override", "n1"]
        argv += ["--proxy-mode", "nftables", "--metrics-bind-address", METRICS, "--conntrack-max-per-core", "0"]
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)

    def run(self) -> bool:
        with self.api, self.agent() as process:
            self.settle(process)
            for phase, seconds in ((self.abuse, 20), (self.relists, 4), (self.away, 5)):
                cpu, writes, start = used(process), transactions(), time.monotonic()
                phase(seconds * self.minute)
                took = time.monotonic() - start
                share = (used(process) - cpu) / took
                print(f"{phase.__name__:8} {took:7.1f} s, {100 * share:.2f} % of a core, "
                      f"{transactions() - writes:.0f} transactions", flush=True)  # fmt: skip
            held = self.settle(process)
            print(f"after    the kernel {'holds' if held else 'does NOT hold'} what the server does")
            return held

    def abuse(self, seconds: float) -> None:
        self.api.trouble = troubled(random.Random(SEED), 0.5)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            change_something(self.store, self.chance)
            if self.chance.random() < 0.02:
                self.api.stop()
                time.sleep(self.chance.random() * 10)
                self.api.start()
            time.sleep(1)
        self.api.trouble = lambda path: ""

    def relists(self, seconds: float) -> None:
        time.sleep(40)  # what went wrong before may be asked for again only now
        before = transactions()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.api.stop()
            self.store.forget()
            self.api.start()
            time.sleep(10)
        print(f"         {transactions() - before:.0f} of its transactions after the first 40 s", flush=True)

    def away(self, seconds: float) -> None:
        self.api.stop()
        time.sleep(seconds)
        for _ in range(20):
            change_something(self.store, self.chance)
        self.api.start()

    def settle(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether the agent comes to hold all that the server does, within two minutes of peace."""
        end = time.monotonic() + 120
        argv = [sys.executable, "-m", "miniproxy", "plan", "--diff", "--proxy-mode", "nftables"]
        argv += ["--kubeconfig", str(self.folder / "kubeconfig"), "--hostname-override", "n1"]
        while time.monotonic() < end and process.poll() is None:
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode == 0 and "add " not in done.stdout and "delete " not in done.stdout:
                return True
            time.sleep(2)
        print((self.folder / "log").read_text()[-3000:], done.stdout[-500:], done.stderr[-500:])
        return False


def used(process: subprocess.Popen[bytes]) -> float:
    """Seconds of CPU, its ended children's included."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def transactions() -> float:
    with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(r"^miniproxy_transaction_duration_seconds_count\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("needs root")
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 30
    if os.environ.get("SOAK_INSIDE") != "1":  # a namespace of its own, gone when this ends
        again = [sys.executable, "-m", "tests.sources.soak", str(minutes)]
        script = 'ip link set lo up && exec "$@"'
        sys.exit(
            subprocess.call(["unshare", "-n", "sh", "-c", script, "sh", *again], env={**os.environ, "SOAK_INSIDE": "1"})
        )
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if Soak(Path(folder), minutes).run() else 1)


if __name__ == "__main__":
    main()
