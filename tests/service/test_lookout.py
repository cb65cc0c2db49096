from __future__ import annotations

import threading

import pytest

from service.lookout import Lookout


def test_a_look_that_fails_is_logged_and_the_next_one_follows(caplog: pytest.LogCaptureFixture) -> None:
    seen = threading.Event()
    looks: list[int] = []

    def look(_stop: threading.Event) -> bool:
        looks.append(len(looks))
        if len(looks) == 1:
            raise RuntimeError("a bug")
        seen.set()
        return False

    lookout = Lookout("moepager-test", look)
    lookout.wake()
    assert seen.wait(10)
    lookout.close()
    assert "moepager-test: a look failed" in caplog.text
