"""easy_ep_answers, gate_answers, gate_norm_answers: a sum over the answers' tokens alone (ours)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.scorers.base import Scorer
from profiler.statistics import RESPONSE, Statistics
from store.records import F64


class Answers:
    """The scorer's own formula on the statistics of response tokens.

    Prompts hold most tokens of a task's text, a chat template's among them, and what they are routed to fills a small
    selection that the answers then lack. Where the text has no responses it is the formula on all of it.
    """

    version = "1"
    needs = NOTHING

    def __init__(self, scorer: Scorer) -> None:
        """Only for formulas that read sums which are kept by role."""
        self._scorer = scorer
        self.name = f"{scorer.name}_answers"

    def score(self, statistics: Statistics) -> F64:
        return self._scorer.score(statistics.of_role(RESPONSE) if statistics.tokens[:, RESPONSE].any() else statistics)
