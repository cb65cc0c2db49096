"""Notices that config or tokenizer files of the served model are changed while it is served.

What runs is in memory and goes on as it was; but what starts next (a profiling job, this service again) would open
another model. So the operator is told; a job compares fingerprints for itself, and fails.
"""

from __future__ import annotations

import asyncio
import logging

from service.context import Opening
from store.papers import Papers, State

log = logging.getLogger("moepager.service")


class PapersWatch:
    """Compares contents only where a file looks other from outside than at the last look."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self.changed: tuple[str, ...] = ()  # names of files that say something else than when the model was opened

    def look(self, papers: Papers) -> None:
        states = dict(papers.states())
        if states == self._states:
            return
        before, self.changed, self._states = self.changed, papers.changed(), states
        if self.changed and self.changed != before:
            log.warning("%s", _told(papers, self.changed))
        elif before and not self.changed:
            log.info("The model's files in %s say again what they said when it was opened.", papers.folder)


def _told(papers: Papers, changed: tuple[str, ...]) -> str:
    return (
        f"{', '.join(changed)} in {papers.folder} changed since the model was opened. It is served on as it was then; "
        "what starts now opens another model, so jobs fail. Put the old files back, or restart the service and its "
        "workers, and profile the tasks again."
    )


async def watch_papers(opening: Opening, watch: PapersWatch) -> None:
    """Look again and again. Ends only by being cancelled."""
    while True:
        await asyncio.sleep(opening.interval)
        if opening.ready:
            try:
                await asyncio.to_thread(watch.look, opening.current().engine.checkpoint.papers)
            except Exception:  # as of a folder that went away in mid look; the next look tells
                log.exception("the model's files could not be compared")
