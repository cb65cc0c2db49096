Layout = tuple[int | float, ...]  # in the order of LAYOUT in products.c
Cache = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int]

def sets() -> dict[str, int]: ...
def tiles() -> bool: ...
def ways() -> int: ...
def product(
    chosen: int,
    dtype: int,
    x: int,
    weights: int,
    bias: int,
    y: int,
    rows: int,
    outputs: int,
    columns: int,
    stride: int,
    threads: int,
    /,
) -> None: ...
def experts(
    chosen: int,
    layout: Layout,
    bank: int,
    x: int,
    tokens: int,
    top_k: int,
    slots: list[int],
    y: int,
    threads: int,
    /,
) -> None: ...
def many(
    chosen: int,
    layout: Layout,
    bank: int,
    bank_slots: int,
    x: int,
    tokens: int,
    top_k: int,
    slots: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def combine(
    y: int, slots: list[int], weights: int, weights_dtype: int, out: int, dtype: int, tokens: int, hidden: int, /
) -> None: ...
def convert(
    chosen: int,
    kind: int,
    stored: int,
    scales_dtype: int,
    scales: int,
    dtype: int,
    to: int,
    rows: int,
    columns: int,
    to_row: int,
    to_column: int,
    block_rows: int,
    block_columns: int,
    threads: int,
    /,
) -> None: ...
def unpack(
    chosen: int,
    dtype: int,
    numbers: int,
    scales: int,
    coding: tuple[int, int, int, int],
    part: int,
    to: int,
    rows: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def norm(dtype: int, x: int, weights: int, out: int, rows: int, columns: int, eps: float, /) -> None: ...
def attend(
    chosen: int,
    dtype: int,
    q: int,
    keys: int,
    values: int,
    mask: int,
    sinks: int,
    out: int,
    scale: float,
    threads: int,
    cache: Cache,
    /,
) -> None: ...
def block(
    chosen: int,
    shape: tuple[int | float, ...],
    x: int,
    out: int,
    cos: int,
    sin: int,
    positions: int,
    keys: int,
    values: int,
    mask: int,
    threads: int,
    cache: tuple[int, int, int, int, int, int, int, int, int, int],
    /,
) -> None: ...
def layer(
    chosen: int,
    block: tuple[int | float, ...],
    layer: tuple[int | float, ...],
    states: tuple[int, int, int, int, int, int, int, int, int, int],
    cache: tuple[int, ...],
    routing: tuple[int, int, int, int, int, int],
    /,
) -> list[int] | None: ...
def onto(
    chosen: int,
    layout: Layout,
    bank: int,
    x: int,
    tokens: int,
    top_k: int,
    slots: list[int],
    weights: int,
    weights_dtype: int,
    shared: tuple[int, ...] | None,
    middle: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def shared(chosen: int, fields: tuple[int, ...], x: int, tokens: int, out: int, threads: int, /) -> None: ...
