"""Every error a person may read. A message says what was wanted, what came, the limit, and the fix.

MoepagerError                 shown as it is: exit code 2 at the command line, `status` over HTTP
├─ InvalidInput               400  a parameter, a file or a text is wrong
├─ Unauthorized               401  no key, or one that nobody knows
├─ Forbidden                  403  a key that may not do this
├─ NotFound                   404  a model, task, profile or job that is not there
│  └─ PartsMissing                 parts of a task's text that nobody has profiled yet
├─ Conflict                   409  it exists already, or another run holds it
│  └─ Held                         a live process is at the same task; it may be tried again later
├─ OffTask                    409  a background request that its guard stops: it may not read what would finish it
├─ MismatchError              409  a profile, index or store that belongs to another model or embedder
├─ CheckpointError            422  a model folder that can't be served: missing, truncated, pickled, unsupported
│  ├─ DiskError               503  the disk stalls or returns an error: what is in memory is served on
│  ├─ ShardChanged            500  a weight file changed under the open model: until it is opened again
│  └─ PapersChanged           500  its config or its tokenizer did
├─ BudgetError                422  a memory budget that can't hold what was asked
├─ TooMany                    429  a key has used up its requests of this minute
├─ Busy                       503  a bounded queue is full, or something is still loading
├─ TimedOut                   504  an answer was not finished in its time
├─ StoreUnreachable           503  the database can't be opened, or was lost
└─ CorruptStore               500  the database or index is damaged
"""

# ruff: noqa: N818 - names that say what happened need no Error at their end

from __future__ import annotations


class MoepagerError(Exception):
    """The root of all errors that are safe and useful to show."""

    status = 500
    code = "internal_error"


class InvalidInput(MoepagerError):
    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class Unauthorized(MoepagerError):
    """No key, or one that nobody knows. The code is the one that OpenAI's clients know."""

    status = 401
    code = "invalid_api_key"


class Forbidden(MoepagerError):
    status = 403
    code = "insufficient_permissions"


class TooMany(MoepagerError):
    """A key has used up its requests; `seconds` until it may ask again."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class NotFound(MoepagerError):
    status = 404
    code = "not_found"


class PartsMissing(NotFound):
    """`parts` are what is still to be run, as "2/4"."""

    code = "parts_missing"

    def __init__(self, message: str, parts: tuple[str, ...]) -> None:
        super().__init__(message)
        self.parts = parts


class Conflict(MoepagerError):
    status = 409
    code = "conflict"


class Held(Conflict):
    code = "held"


class OffTask(MoepagerError):
    """Sent again as it is, it would most likely be refused again."""

    status = 409
    code = "off_task"


class MismatchError(MoepagerError):
    status = 409
    code = "mismatch"


class CheckpointError(MoepagerError):
    status = 422
    code = "bad_checkpoint"


class DiskError(CheckpointError):
    status = 503
    code = "disk_error"


class ShardChanged(CheckpointError):
    """Nobody's request is wrong, and trying again helps nobody until the model is opened again."""

    status = 500
    code = "checkpoint_changed"


class PapersChanged(CheckpointError):
    """As above, of the files that say what the weights mean: config and tokenizer."""

    status = 500
    code = "papers_changed"


class UnsupportedFamily(CheckpointError):
    code = "unsupported_family"


class BudgetError(MoepagerError):
    status = 422
    code = "budget_too_small"


class Busy(MoepagerError):
    status = 503
    code = "busy"


class TimedOut(MoepagerError):
    status = 504
    code = "timeout"


class StoreUnreachable(MoepagerError):
    status = 503
    code = "store_unreachable"


class CorruptStore(MoepagerError):
    code = "corrupt_store"
