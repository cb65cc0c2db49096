"""`python -m demo prepare --store URL`: what `moepager serve` runs before it first serves the bundled model."""

from __future__ import annotations

from demo.commands import group
from engine.huge_pages import use_huge_pages
from engine.openmp import wait_passively

if __name__ == "__main__":
    wait_passively()
    use_huge_pages()
    group()
