"""Options that commands of this room share. Their variables are the service's, so that one environment serves all."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Option(envvar="MOEPAGER_MODEL", help="A folder or hub id. Default: the bundled demo model.")
]
StoreUrl = Annotated[
    str | None, typer.Option("--store", envvar="MOEPAGER_STORE", help="Database URL. Default: the embedded store.")
]
Memory = Annotated[
    str | None, typer.Option(envvar="MOEPAGER_MEMORY", help="Bytes for everything on the device, such as 2GiB.")
]
Embedder = Annotated[
    str, typer.Option(envvar="MOEPAGER_EMBEDDER", help="minilm, hash, or a sentence-transformers name or folder.")
]
Context = Annotated[
    int | None, typer.Option(envvar="MOEPAGER_MAX_CONTEXT", help="Tokens of prompt and response together.")
]
Device = Annotated[str, typer.Option(envvar="MOEPAGER_DEVICE", help="Where the model runs, such as cpu or cuda:0.")]
Dtype = Annotated[str, typer.Option(envvar="MOEPAGER_DTYPE", help="auto, float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(envvar="MOEPAGER_THREADS", help="Threads of the model's arithmetic.")]
