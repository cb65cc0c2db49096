"""How the rows of a window come and go, in one decoder layer: the same for columns and for running states."""

from __future__ import annotations

from collections.abc import Sequence


class Window:
    """`batch_size` neighbouring rows of the pool, from `first` on."""

    first: int
    batch_size: int

    def keep(self, order: Sequence[int]) -> None:
        """Only these rows go on, in this order. A row may only take the place of one that goes: nothing is swapped."""
        assert all(row == place or row >= len(order) for place, row in enumerate(order)), order
        for place, row in enumerate(order):
            if row != place:
                self._bring(self, row, place)
        self.batch_size = len(order)

    def absorb(self, other: Window) -> None:
        """The rows of `other`, a window further down and no longer than this one, become its last, ends aligned."""
        assert other.first >= self.first + self.batch_size, (other.first, self.first, self.batch_size)
        for row in range(other.batch_size):
            self._bring(other, row, self.batch_size)
            self.batch_size += 1

    def fork(self, sources: Sequence[int]) -> None:
        """Copies of the rows `sources` become the last ones, in this order."""
        for row in sources:
            self._bring(self, row, self.batch_size)
            self.batch_size += 1

    def _bring(self, source: Window, row: int, place: int) -> None:
        """What row `row` of `source` holds to row `place` of this one."""
        raise NotImplementedError
