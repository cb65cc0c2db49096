"""What an engine is asked to be: folder, byte budget, device, limits.

Plain values; knows no torch and no environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from store.errors import InvalidInput

DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "own", "torch")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`memory` bounds the bytes on the device, None means that everything fits. `dtype` "auto" is the checkpoint's own.

    `max_context` None takes the model's, at most 2048 tokens: the KV cache is allocated for all of it at open.
    `chunk_tokens` bounds how many tokens go through the model at once (prefill chunks, profiling passes); None takes
    512 under a budget and 4096 without one.

    `read_ahead` bounds how many experts exact mode reads at a time for the layer after the present one, on the word of
    that layer's router run early; 0 reads none.

    `stand_ins` is how many tasks' stand-ins (one vector for each expert of the model) are on the device at once;
    0 serves no selection that has them.

    `kernel` chooses who multiplies few rows by a matrix, which is what decoding does: our own compiled products or
    torch. "auto" takes our own where they were built and fit device and dtype, "own" refuses to open without them.
    """

    model: Path
    memory: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    max_context: int | None = None
    max_batch: int = 8
    threads: int | None = None
    chunk_tokens: int | None = None
    read_ahead: int = 0
    stand_ins: int = 0
    kernel: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Path(self.model))
        if self.dtype not in DTYPES:
            raise InvalidInput(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.", param="dtype")
        if self.kernel not in KERNELS:
            raise InvalidInput(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}.", param="kernel")
        for name in ("memory", "max_context", "max_batch", "threads", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name} must be at least 1, got {value}.", param=name)
        if self.stand_ins < 0:
            raise InvalidInput(f"stand_ins must be at least 0, got {self.stand_ins}.", param="stand_ins")
        if self.read_ahead < 0:
            raise InvalidInput(f"read_ahead must be at least 0, got {self.read_ahead}.", param="read_ahead")
