"""A batch as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from store.records import Selection


@dataclass
class FakeRoom:
    """Selections that are resident, those that fit beside what runs, and what a swap costs."""

    resident: set[Selection | None] = field(default_factory=set)
    fitting: set[Selection | None] | None = None  # None: all
    idle: bool = False
    may_swap: bool = True
    cost: dict[Selection | None, float] = field(default_factory=dict)
    free_rows: int = 1000

    def fits(self, selection: Selection | None) -> bool:
        return self.fitting is None or selection in self.fitting

    def swap_seconds(self, selection: Selection | None) -> float:
        return 0.0 if selection in self.resident else self.cost.get(selection, 1.0)

    def share_beside(self, selection: Selection, other: Selection) -> float:
        return len(set(selection) - set(other)) / len(other)
