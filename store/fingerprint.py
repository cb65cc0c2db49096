"""What makes two model folders the same model: hashes of config, weights and tokenizer. Reads files, judges nothing.

The weights hash covers, for every safetensors file in name order: its name, its size, its whole header (so every
tensor's name, dtype, shape and place) and its bytes: all up to a size of `WHOLE_FILE`, above that `BLOCKS` evenly
spaced blocks of `BLOCK` bytes, the first and the last included. So it takes about a second for a model of any size;
a change that touches no sampled block of a big file is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from store.errors import CheckpointError
from store.papers import Papers
from store.shard import Shard

WHOLE_FILE = 64 * 2**20
BLOCKS = 32
BLOCK = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Sha256 in hex: of each part, and `whole` of the three together."""

    config: str
    weights: str
    tokenizer: str
    whole: str


def fingerprint(papers: Papers, shards: Iterable[Shard]) -> Fingerprint:
    """Raises ShardChanged where weights changed since their headers were read."""
    parts = (papers.meaning, hash_weights(shards), papers.tokenizer)
    return Fingerprint(*parts, whole=hashlib.sha256(" ".join(parts).encode()).hexdigest())


def hash_weights(shards: Iterable[Shard]) -> str:
    digest = hashlib.sha256()
    for shard in sorted(shards, key=lambda shard: shard.file.name):
        digest.update(f"{shard.file.name} {shard.identity.size}\n".encode())
        try:
            with shard.file.open("rb") as stream:
                digest.update(stream.read(shard.header_bytes))
                for block in _sampled(stream, shard.identity.size):
                    digest.update(block)
                shard.identity.check(shard.file, stream.fileno())
        except OSError as error:
            raise CheckpointError(f"Can't read {shard.file}: {error.strerror}. Make the file readable.") from error
    return digest.hexdigest()


def _sampled(stream: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= WHOLE_FILE:
        stream.seek(0)
        while block := stream.read(2**20):
            yield block
        return
    for index in range(BLOCKS):
        stream.seek((size - BLOCK) * index // (BLOCKS - 1))
        yield stream.read(BLOCK)
