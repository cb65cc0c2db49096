"""Reasons not to trust a profile, read from its statistics: little text, routing like chance, halves that differ, a
text that the model finds no likelier than noise.

Judged once, when the profile is made: the store keeps figures and words, and everybody shows those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from profiler.scorers.frequency import Frequency
from profiler.stability import split_half_overlap
from profiler.statistics import Statistics
from store.records import F64, Profile, Trust

# Of an expert on the average, not of the median one: where a task has experts of its own, most others get next to
# nothing however much text there is, and that is no fault of the text.
FEW_TOKENS = 30
LITTLE_SKEW = 2.0  # times what chance alone does
LITTLE_AGREEMENT = 0.6  # half of all experts agree on a half by chance


def judged(profile: Profile, parts: Sequence[Profile] = ()) -> Profile:
    """With a judgement; one that has one keeps it. `parts` are the profiles that it is the mean of, if it is one."""
    if profile.trust is not None:
        return profile
    trust = judge(Statistics.from_arrays(profile.statistics), profile.tokens)
    if doubted := sum(1 for part in parts if judged(part).doubts):
        # Without their names: whoever may use the generalist need not know which tasks there are.
        also = f"It is the mean of {len(parts)} profiles, of which {doubted} are doubted themselves; see their tasks."
        trust = replace(trust, doubts=(*trust.doubts, also))
    return replace(profile, trust=trust)


def judge(statistics: Statistics, tokens: int) -> Trust:
    """`tokens` is what the text had: a mean over tasks has forgotten it."""
    routed = statistics.total("selected") * (tokens / max(statistics.token_count, np.finfo(np.float64).tiny))
    found = skew(routed, tokens, statistics.top_k)
    figures = Trust(
        tokens_per_expert=float(routed.mean()),
        unseen=float((routed == 0).mean()),
        skew=float(np.median(found)),
        least_skew=float(found.min()),
        agreement=split_half_overlap(statistics, Frequency(), 0.5),
        surprise=surprise(statistics),
    )
    return replace(figures, doubts=tuple(_doubts(figures)))


def surprise(statistics: Statistics) -> float | None:
    """Nats a token by which the model finds the text less likely than even odds over its vocabulary would: far below 0
    for any model that knows the language. None where nothing was heard.
    """
    tokens, nats = statistics.total("heard")
    return float(nats / tokens) if tokens else None


def skew(routed: F64, tokens: int, top_k: int) -> F64:
    """How unevenly each layer's experts are used, f64 `[L]`: 1 is what a uniform router does by chance.

    `sum_e (n_e - m)^2 / m`, m = T K / E, over its mean E - K when every token draws K of E experts at random. Tokens of
    real text are not drawn one by one, so this is a scale, not a test.
    """
    experts = routed.shape[1]
    mean = tokens * top_k / experts
    if experts == top_k or mean == 0:
        return np.ones(len(routed))
    spread: F64 = ((routed - mean) ** 2).sum(axis=1) / mean / (experts - top_k)
    return spread


def _doubts(trust: Trust) -> list[str]:
    found = []
    if trust.tokens_per_expert < FEW_TOKENS:
        found.append(
            f"The text gave an expert {trust.tokens_per_expert:.0f} tokens on the average, fewer than {FEW_TOKENS}, "
            "so few tokens decide which experts stay: give more calibration text."
        )
    if trust.skew < LITTLE_SKEW:
        found.append(
            f"Routing differs from chance only {trust.skew:.1f} times as much as chance does: this text has no "
            "experts of its own, and any selection is about as good as a random one."
        )
    if trust.agreement is not None and trust.agreement < LITTLE_AGREEMENT:
        found.append(
            f"Two halves of the text share {trust.agreement:.0%} of the experts that they use most, chance alone "
            "gives 50%: give more text of one kind."
        )
    if trust.surprise is not None and trust.surprise >= 0:
        found.append(
            f"The model finds this text no likelier than tokens drawn at random ({trust.surprise:+.1f} nats a token "
            "against even odds): the tokenizer belongs to another model, or the weights are untrained or damaged. "
            "Compare the folder's files with the model's source."
        )
    return found
