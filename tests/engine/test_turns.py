"""A lock that goes round."""

from __future__ import annotations

import threading

from waiting import wait_for

from engine.turns import Turns


def test_who_takes_turns_again_and_again_lets_the_one_that_waits_in_between() -> None:
    turns, order = Turns(), []
    asks, ended = threading.Event(), threading.Event()

    def piecework() -> None:
        for piece in range(50):
            with turns:
                order.append(piece)
                if not piece:
                    asks.wait(10)
                    wait_for(lambda: turns._given == 2)
                    assert not ended.wait(0.02)
                    order.append("alone")

    def query() -> None:
        asks.set()
        with turns:
            order.append("query")
        ended.set()

    threads = [threading.Thread(target=piecework), threading.Thread(target=query)]
    threads[0].start()
    wait_for(lambda: order)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert order[:3] == [0, "alone", "query"]


def test_what_fails_in_its_turn_gives_it_back() -> None:
    turns = Turns()
    try:
        with turns:
            raise ValueError
    except ValueError:
        pass
    with turns:
        pass
