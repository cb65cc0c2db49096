"""`python -m service`: the same as the command `moepager`."""

from __future__ import annotations

from service.cli import main

if __name__ == "__main__":
    main()
