"""What a task needs of a model: profiles, the selections made of them, and the evidence. Rows in, records out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from store.catalogue import require_model, require_task
from store.changes import note_change
from store.connection import Database
from store.errors import Conflict, InvalidInput, NotFound
from store.growth import inherit
from store.packing import pack_arrays, pack_selection, unpack_arrays, unpack_selection
from store.records import Evaluation, Profile, StoredSelection, Trust
from store.schema import EvaluationRow, ProfileRow, SelectionRow, TrustRow
from store.writing import insert_once, upsert

KEEP_TOLERANCE = 1e-9


class Profiles:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(
        self,
        profile: Profile,
        selections: Sequence[StoredSelection] = (),
        evaluations: Sequence[Evaluation] = (),
        *,
        grown_from: str | None = None,
    ) -> None:
        """Adds the profile with what was made of it, all or nothing. One that is there already stays as it is, but
        that one which nobody had judged takes on the judgement. `grown_from` is a profile that this one has all
        statistics of: what was made of that one is this one's, too.

        Raises NotFound for an unknown model or task, Conflict where the id stands for another calibration.
        """
        statistics = pack_arrays(profile.statistics)  # outside the transaction: compressing takes a while
        with self._database.write() as session:
            require_model(session, profile.model)
            require_task(session, profile.task)
            _put_profile(session, profile, statistics)
            if profile.trust is not None:
                _put_trust(session, profile.id, profile.trust)
            if grown_from is not None:
                inherit(session, grown_from, profile.id)
            for selection in selections:
                _put_selection(session, selection)
            for evaluation in evaluations:
                _put_evaluation(session, evaluation)
            note_change(session)

    def get(self, id: str) -> Profile:  # noqa: A002
        """Raises NotFound, and CorruptStore where its statistics are damaged."""
        with self._database.read() as session:
            row = _require_profile(session, id)
            return _profile(row, session.get(TrustRow, id))

    def latest(self, model: str, task: str, *, proven: bool = False) -> Profile | None:
        """The youngest profile of `task` for the model with this fingerprint; `proven`: one with evidence first."""
        query = _judged().where(ProfileRow.model == model, ProfileRow.task == task)
        if proven:
            made = select(EvaluationRow.id).join(SelectionRow, SelectionRow.id == EvaluationRow.selection)
            query = query.order_by(made.where(SelectionRow.profile == ProfileRow.id).exists().desc())
        with self._database.read() as session:
            found = session.execute(query.order_by(ProfileRow.created.desc(), ProfileRow.id).limit(1)).first()
            return None if found is None else _profile(found[0], found[1])

    def list(self, model: str | None = None, task: str | None = None) -> Sequence[Profile]:
        """By task, the oldest first; all models' without `model`, all tasks' without `task`."""
        query = _judged() if model is None else _judged().where(ProfileRow.model == model)
        query = query if task is None else query.where(ProfileRow.task == task)
        with self._database.read() as session:
            rows = session.execute(query.order_by(ProfileRow.task, ProfileRow.created, ProfileRow.id))
            return [_profile(row, trust) for row, trust in rows]


class Selections:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, selection: StoredSelection) -> None:
        """Adds it; one that is there already stays. Raises NotFound for an unknown profile."""
        with self._database.write() as session:
            _put_selection(session, selection)

    def get(self, id: str) -> StoredSelection:  # noqa: A002
        """Raises NotFound."""
        with self._database.read() as session:
            return _selection(_require_selection(session, id))

    def find(self, profile: str, scorer: str | None = None, keep: float | None = None) -> Sequence[StoredSelection]:
        """Those of a profile, by scorer, the largest first."""
        query = select(SelectionRow).where(SelectionRow.profile == profile)
        if scorer is not None:
            query = query.where(SelectionRow.scorer == scorer)
        if keep is not None:
            query = query.where(SelectionRow.keep.between(keep - KEEP_TOLERANCE, keep + KEEP_TOLERANCE))
        with self._database.read() as session:
            rows = session.scalars(query.order_by(SelectionRow.scorer, SelectionRow.keep.desc(), SelectionRow.id))
            return [_selection(row) for row in rows]


class Evaluations:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, evaluation: Evaluation) -> None:
        """Adds it; one of the same selection and items is replaced. Raises NotFound for an unknown selection."""
        with self._database.write() as session:
            _put_evaluation(session, evaluation)
            note_change(session)

    def find(self, selection: str) -> Evaluation | None:
        """The evaluation added last."""
        query = select(EvaluationRow).where(EvaluationRow.selection == selection).order_by(EvaluationRow.id.desc())
        with self._database.read() as session:
            row = session.scalars(query.limit(1)).first()
            return None if row is None else _evaluation(row)

    def newest_text(self, profile: str) -> str | None:
        """The hash of the items of the evaluation that was added last; None where there is no evaluation."""
        query = select(EvaluationRow.evaluation_hash).join(SelectionRow, SelectionRow.id == EvaluationRow.selection)
        query = query.where(SelectionRow.profile == profile).order_by(EvaluationRow.id.desc())
        with self._database.read() as session:
            return session.scalars(query.limit(1)).first()

    def list(self, profile: str) -> Sequence[tuple[StoredSelection, Evaluation]]:
        """Every evaluation of a profile's selections, by scorer, the largest selection first."""
        query = select(SelectionRow, EvaluationRow).join(EvaluationRow, EvaluationRow.selection == SelectionRow.id)
        query = query.where(SelectionRow.profile == profile)
        query = query.order_by(SelectionRow.scorer, SelectionRow.keep.desc(), SelectionRow.id, EvaluationRow.id)
        with self._database.read() as session:
            return [(_selection(made), _evaluation(row)) for made, row in session.execute(query)]


def _require_profile(session: Session, id: str) -> ProfileRow:  # noqa: A002
    if row := session.get(ProfileRow, id):
        return row
    raise NotFound(f"No profile {id} is in the store. Profile the task first: moepager profile.")


def _require_selection(session: Session, id: str) -> SelectionRow:  # noqa: A002
    if row := session.get(SelectionRow, id):
        return row
    raise NotFound(f"No selection {id} is in the store. Profile the task first: moepager profile.")


def _put_profile(session: Session, profile: Profile, statistics: bytes) -> None:
    values = {
        "id": profile.id,
        "model": profile.model,
        "task": profile.task,
        "tokens": profile.tokens,
        "calibration_hash": profile.calibration_hash,
        "calibration_items": sorted(profile.calibration_items),
        "scorers": dict(profile.scorers),
        "statistics": statistics,
        "created": profile.created,
    }
    if insert_once(session, ProfileRow, values):
        return
    row = _require_profile(session, profile.id)
    same = ("model", "task", "tokens", "calibration_hash")
    if any(getattr(row, name) != values[name] for name in same):
        raise Conflict(
            f"Profile {profile.id} is stored already, of {row.tokens} tokens of task {row.task!r}; this one is of "
            f"{profile.tokens} tokens of {profile.task!r}. An id stands for one calibration: give the new one its own."
        )


def _put_trust(session: Session, profile: str, trust: Trust) -> None:
    if not all(math.isfinite(figure) for figure in trust.figures.values() if figure is not None):
        raise InvalidInput(f"A judgement of numbers that are not finite says nothing: {trust}. Profile the task again.")
    insert_once(session, TrustRow, {"profile": profile, **trust.figures, "doubts": list(trust.doubts)})


def _put_selection(session: Session, selection: StoredSelection) -> None:
    for name, share in (("keep", selection.keep), ("active", selection.active)):
        if not 0 < share <= 1:
            raise InvalidInput(f"A selection's {name} is a share above 0, up to 1; got {share}.", param=name)
    _require_profile(session, selection.profile)
    width, bitmap = pack_selection(selection.selection)
    values = {
        "id": selection.id,
        "profile": selection.profile,
        "scorer": selection.scorer,
        "allocator": selection.allocator,
        "keep": selection.keep,
        "layers": len(selection.selection.experts),
        "width": width,
        "bitmap": bitmap,
        "stand_in": selection.stand_in,
        "calls": None if selection.selection.calls is None else list(selection.selection.calls),
        "active": selection.active,
        "calls_by": selection.calls_by,
    }
    if insert_once(session, SelectionRow, values):
        return
    row = _require_selection(session, selection.id)
    if any(
        getattr(row, name) != values[name] for name in ("profile", "layers", "width", "bitmap", "stand_in", "calls")
    ):
        raise Conflict(
            f"Selection {selection.id} is stored already with other experts or of another profile ({row.profile}). "
            "An id stands for one set of experts: give the new one its own."
        )


def _put_evaluation(session: Session, evaluation: Evaluation) -> None:
    figures = (evaluation.nll, evaluation.coverage, evaluation.accuracy or 0.0, evaluation.full_accuracy or 0.0)
    if not all(map(math.isfinite, (*figures, *evaluation.levels))):
        raise InvalidInput(
            f"An evaluation of numbers that are not finite is no evidence: {evaluation}. Evaluate again."
        )
    _require_selection(session, evaluation.selection)
    values = {field: getattr(evaluation, field) for field in Evaluation.__slots__}
    values["levels"] = sorted(evaluation.levels)
    key = ("selection", "evaluation_hash")
    upsert(session, EvaluationRow, values, update=[name for name in values if name not in key], key=key)


def _judged() -> Select[ProfileRow, TrustRow]:
    """Every profile with its judgement, or None for the profiles of old, which have none."""
    return select(ProfileRow, TrustRow).outerjoin(TrustRow, TrustRow.profile == ProfileRow.id)


def _profile(row: ProfileRow, trust: TrustRow | None) -> Profile:
    return Profile(
        id=row.id,
        model=row.model,
        task=row.task,
        statistics=unpack_arrays(row.statistics, f"profile {row.id}"),
        tokens=row.tokens,
        calibration_hash=row.calibration_hash,
        calibration_items=frozenset(row.calibration_items),
        scorers=row.scorers,
        created=row.created,
        trust=None if trust is None else _trust(trust),
    )


def _trust(row: TrustRow) -> Trust:
    values = {field: getattr(row, field) for field in Trust.__slots__}
    return Trust(**values | {"doubts": tuple(row.doubts)})


def _selection(row: SelectionRow) -> StoredSelection:
    selection = unpack_selection(row.layers, row.width, row.bitmap, row.id)
    if row.calls is not None:
        selection = replace(selection, calls=tuple(row.calls))
    figures = {name: getattr(row, name) for name in ("scorer", "allocator", "keep", "stand_in", "active", "calls_by")}
    return StoredSelection(row.id, row.profile, selection=selection, **figures)


def _evaluation(row: EvaluationRow) -> Evaluation:
    values = {field: getattr(row, field) for field in Evaluation.__slots__}
    return Evaluation(**values | {"levels": tuple(row.levels or ())})
