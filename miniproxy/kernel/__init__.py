"""The only rooms that touch the system: each reads and writes one kind of kernel state."""
