"""`python -m miniproxy` is the command `miniproxy`."""

from .cli import main

if __name__ == "__main__":
    main()
