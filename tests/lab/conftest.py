"""Labs for tests: each has a name of its own, so that test processes side by side never meet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest

from miniproxy.lab import Lab, LabSpec

_numbers = count()


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    """These tests build network namespaces."""
    if os.geteuid() != 0:
        pytest.fail("the lab's tests need root: run them with sudo")


def new_name() -> str:
    """A lab name nobody else has."""
    return f"t{os.getpid()}x{next(_numbers)}"


@pytest.fixture
def name() -> str:
    return new_name()


@pytest.fixture(scope="module", params=["host-gw", "vxlan"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab without agents, in both overlays."""
    spec = LabSpec(name=new_name(), pods_per_node=2, overlay=request.param)
    with Lab(spec) as built:
        yield built
