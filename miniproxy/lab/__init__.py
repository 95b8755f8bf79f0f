"""A cluster on one machine, made of network namespaces: to learn Service networking, and to test it.

`Lab` is the whole of it; plan.py says what it consists of, netns.py builds it, state.py removes it (after
crashes too), server.py answers in its pods, probe.py connects from them. Where the kernel lacks what a lab needs,
machine.py has it in user-mode Linux (uml.py).
"""

from .lab import Lab
from .netns import LabError
from .plan import LabSpec
from .probe import Answer, Answers, Place

__all__ = ["Answer", "Answers", "Lab", "LabError", "LabSpec", "Place"]
