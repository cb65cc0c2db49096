"""Which file a descriptor is of, and in which state: so that weights that change under an open model are noticed.

Noticed is what fstat tells: another file in the old one's place, another length, a later time of writing. Linux sets
that time before a write's first byte is visible, so bytes that were read before the identity was compared are either
of the old state or refused. Not noticed are writes within the clock tick (milliseconds) of the write before the header
was read, writers that put the old time back, and later writes through a shared mapping that was dirty by then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from store.errors import CheckpointError, ShardChanged


@dataclass(frozen=True, slots=True)
class Identity:
    """What fstat says: numbers of device and inode, `size` in bytes, `written` in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    written: int

    @classmethod
    def of(cls, descriptor: int) -> Identity:
        """Now. Raises OSError."""
        told = os.fstat(descriptor)
        return cls(told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)

    def check(self, path: Path, descriptor: int) -> None:
        """Raises ShardChanged unless the descriptor, opened at `path`, is of this very file in this very state."""
        now = Identity.of(descriptor)
        if now != self:
            raise ShardChanged(
                f"{path} is not the file any more whose header was read: {self._beside(now)}. Nothing is read from it "
                "now, what is in memory is served on. Open the model again (restart the service) once its files are "
                "at rest; new weights belong into a folder of their own."
            )

    def check_path(self, path: Path) -> None:
        """The same of what is at `path` now. Raises CheckpointError where nothing is."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"Can't open {path}: {error.strerror}. Put the file back, and try again.") from error
        try:
            self.check(path, descriptor)
        finally:
            os.close(descriptor)

    def _beside(self, now: Identity) -> str:
        then, since = self._told(), now._told()
        differing = [name for name in then if then[name] != since[name]]
        return ", ".join(f"{name} was {then[name]} and is {since[name]}" for name in differing)

    def _told(self) -> dict[str, str]:
        at = datetime.fromtimestamp(self.written // 10**9, UTC)
        return {
            "its size": f"{self.size:,} bytes",
            "its time of writing": f"{at:%Y-%m-%d %H:%M:%S}.{self.written % 10**9:09} UTC",
            "its inode": f"{self.inode} on device {self.device}",
        }
