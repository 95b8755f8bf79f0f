"""miniproxy: a Kubernetes service proxy that programs the Linux kernel with small transactions."""

__version__ = "0.1.0"
