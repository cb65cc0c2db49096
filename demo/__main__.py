"""`python -m demo prepare --store URL`: what `moepager serve` runs before it first serves the bundled model."""

from __future__ import annotations

from demo.commands import group
from engine.before_torch import prepare_process

if __name__ == "__main__":
    prepare_process()
    group()
