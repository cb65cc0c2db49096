"""A lock that goes round: who gives it back and wants it again at once comes after all that wait. No tensors."""

from __future__ import annotations

import threading


class Turns:
    """Use as a context, from any thread, not twice in one.

    A plain lock goes to whoever asks at the moment when it is free, which is mostly the thread that just had it: one
    that works in small pieces, so that others get in between, would keep them all out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = 0  # tickets, in the order in which they were asked for
        self._served = 0

    def __enter__(self) -> None:
        with self._changed:
            ticket = self._given
            self._given += 1
            self._changed.wait_for(lambda: self._served == ticket)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()
