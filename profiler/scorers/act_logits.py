"""act_logits: raw logits of a token's pool, without threshold and without f (a baseline of PreMoe v3, 2505.17639)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.scorers.base import per_token
from profiler.statistics import Statistics
from store.records import F64


class ActLogits:
    """`AL_e = (1/T) sum_t z_te [e in top K of z_t]`.

    An expert that is often chosen with negative logits ranks below one that is never chosen: PreMoe's own table has it
    at 0.82 of 80.69 on Qwen3-30B-A3B, and `peu` exists because of it.
    """

    name = "act_logits"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return per_token(statistics, "pool_logits")
