"""Planners turn a service port and its endpoints into kernel objects: plain data, no I/O."""
