"""The way of one query up to the engine: retrieve its task, choose what serves it; and the receipt of what came back.

`prepare` may block (embedding, SQL) and refuses all that can be refused; it runs in a thread. After it nothing of the
store is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from threading import Event

from engine.requests import FinishedEvent, GenerationRequest, Sampling
from service.bounds import require_swap_within
from service.callers import ANYBODY, Caller
from service.parts import Parts
from service.receipt import Receipt
from service.retrieval import Retrieval, pinned, untold
from service.sampling import seed_of
from service.serving import Serving, Wish, choose_serving
from service.tracing import tracer
from store.errors import InvalidInput, StoreUnreachable
from store.records import Decision, Mode


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt in the service's own words. `text` is what retrieval reads, None where only a named task will do;
    `field` is what the client calls it."""

    id: str
    field: str
    text: str | None
    prompt: tuple[int, ...]
    wish: Wish
    sampling: Sampling
    ignored: tuple[str, ...] = ()
    caller: Caller = ANYBODY
    whole: bool = False  # nobody reads the answer before its end


@dataclass(frozen=True, slots=True)
class Prepared:
    """What may be submitted as it is: nothing about it is left to refuse but a full queue."""

    model: str
    question: Question
    serving: Serving
    request: GenerationRequest


def prepare(question: Question, parts: Parts) -> Prepared:
    with tracer.start_as_current_span("retrieve"):
        retrieval = retrieve(question, parts)
    if retrieval.task is None and retrieval.reason != "no-text":
        parts.metrics.abstained()
    mode: Mode = question.wish.mode or parts.policy.mode
    chosen: Serving | None = None
    try:
        chosen = serving = choose_serving(question.wish, retrieval, parts.catalogue, parts.policy)
        mode = serving.mode
    finally:  # a refusal is a decision too
        write_down(decision(question.id, question.text, retrieval, mode, parts, question.caller, chosen), parts)
        if question.caller.priority == "normal":  # a client's own chores are no task
            parts.discovery.asked(question.text, retrieval)
    request = GenerationRequest(
        question.prompt,
        serving.selection,
        serving.mode,
        question.sampling,
        priority=question.caller.priority,
        session=question.caller.conversation,
        guard=serving.guard,
        restarts=serving.guard is not None and question.whole,
    )
    parts.engine.admission.check(request)
    if question.wish.max_swap_ms is not None:
        require_swap_within(question.wish.max_swap_ms, parts.engine.admission.predict(request))
    return Prepared(parts.model_id, question, serving, request)


def retrieve(question: Question, parts: Parts) -> Retrieval:
    task = question.wish.task
    if task is not None:
        parts.sessions.note(question.caller, parts.catalogue.named(task).name)
        return pinned(task, parts.retriever.threshold)
    if question.text is None or not question.text.strip():
        if question.wish.mode == "exact":
            return untold(parts.retriever.threshold)
        raise InvalidInput(
            f"The task is retrieved by the text of `{question.field}` (of messages, the last one by the user), "
            "and there is none. Write one, name the task, or ask for mode exact.",
            param=question.field,
        )
    found = parts.retriever.decide(question.text)
    return parts.sessions.decide(question.caller, found, parts.catalogue.retrievable)


def write_down(made: Decision, parts: Parts) -> None:
    """Raises StoreUnreachable: no query is answered whose decision is not in the audit."""
    try:
        parts.store.decisions.add(made)
    except StoreUnreachable as error:
        raise StoreUnreachable(
            f"The query was not answered, for how its task was chosen could not be written to the audit. {error} "
            "Send it again once GET /readyz answers 200."
        ) from error


def decision(
    request: str,
    text: str | None,
    retrieval: Retrieval,
    mode: Mode,
    parts: Parts,
    caller: Caller,
    serving: Serving | None,
) -> Decision:
    """What was decided, who asked, and what was to serve it: None where it was refused."""
    return Decision(
        request=request,
        query_hash=hashlib.sha256((text or "").encode()).hexdigest(),
        task=retrieval.task,
        nearest=retrieval.nearest,
        similarity=retrieval.similarity,
        threshold=retrieval.threshold,
        reason=retrieval.reason,
        mode=mode,
        created=datetime.now(UTC),
        model=parts.catalogue.model,
        key=caller.owner or None,
        profile=serving.profile_id if serving else None,
        keep=serving.keep if serving else None,
        active=serving.active if serving else None,
    )


def spread(questions: Sequence[Question], count: int, parts: Parts) -> list[Prepared]:
    """`count` rows of each question, which is retrieved once; each row has a seed and an end of its own."""
    rows, places = len(questions) * count, parts.settings.queue_size
    if rows > places:
        raise InvalidInput(
            f"{len(questions)} prompts with {count} answers each are {rows} rows; the queue holds {places}. Send "
            "fewer, or serve with a larger MOEPAGER_QUEUE_SIZE.",
            param="n" if count > 1 else questions[0].field,
        )
    return [
        _row(one, number) for one in [prepare(question, parts) for question in questions] for number in range(count)
    ]


def _row(prepared: Prepared, number: int) -> Prepared:
    if not number:
        return prepared
    sampling = prepared.request.sampling
    sampling = replace(sampling, seed=seed_of(sampling.seed, number))
    return replace(prepared, request=replace(prepared.request, sampling=sampling, cancelled=Event()))


def make_receipt(prepared: Prepared, finished: FinishedEvent) -> Receipt:
    served, serving, retrieval = finished.served, prepared.serving, prepared.serving.retrieval
    return Receipt(
        task=retrieval.task,
        similarity=retrieval.similarity,
        mode=served.mode,
        keep=serving.keep,
        coverage=served.coverage,
        level=served.level,
        guard=serving.guard,
        escalated=served.escalated,
        experts=served.experts,
        experts_paged=served.experts_paged,
        bytes_paged=served.bytes_paged,
        swap_ms=served.swap_ms,
        predicted_bytes=None if served.predicted is None else served.predicted.bytes,
        predicted_swap_ms=None if served.predicted is None else 1000 * served.predicted.seconds,
        ttft_ms=served.ttft_ms,
        queue_ms=served.queue_ms,
        resident_bytes=served.resident_bytes,
        model=prepared.model,
        profile_id=serving.profile_id,
        reason=retrieval.reason,
        served_task=serving.served_task,
        scorer=serving.scorer,
        stand_in=serving.stand_in,
        active=serving.active,
        calls=serving.calls,
        selection=serving.selection.digest if serving.selection else None,
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        priority=prepared.request.priority,
        ignored=prepared.question.ignored,
        doubts=serving.doubts,
    )
