"""Exports: which stored selection is meant, and its file, read back before it is there under its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.card import STRIPS
from profiler.exports.base import Form, Shape, Subject
from profiler.exports.plain import Plain
from store.database import Store
from store.errors import InvalidInput, MismatchError, NotFound
from store.records import StoredSelection
from store.stand_ins import NOTHING

OWN = Plain.name
SHOWN = 12  # selections in a message


def subject_of(
    store: Store, shape: Shape, task: str, keep: float | None, scorer: str | None, allocator: str | None
) -> Subject:
    """The one selection of the task's profile that fits what was said; one of fewer calls has to be named by its id.
    Raises NotFound, or InvalidInput with those that there are, where it is none or several."""
    profile = store.profiles.latest(shape.fingerprint, task, proven=True)
    if profile is None:
        raise NotFound(f"The store has no profile of task {task!r} for {shape.folder}. Make one: moepager profile.")
    found = store.selections.find(profile.id, scorer, keep)
    fitting = [one for one in found if allocator in (None, one.allocator) and one.active == 1]
    if len(fitting) != 1:
        raise InvalidInput(
            f"{len(fitting)} selections of {profile.id} fit; one is wanted. Name it by --keep, --scorer and "
            f"--allocator, or by its id with --selection: {_listed(fitting or store.selections.find(profile.id))}."
        )
    return Subject(shape, task, fitting[0], store.evaluations.find(fitting[0].id))


def subject_by_id(store: Store, shape: Shape, selection: str) -> Subject:
    """Raises NotFound, and MismatchError for a selection of another model."""
    stored = store.selections.get(selection)
    profile = store.profiles.get(stored.profile)
    if profile.model != shape.fingerprint:
        raise MismatchError(
            f"The selection {selection} belongs to the model {profile.model[:16]}, {shape.folder} is "
            f"{shape.fingerprint[:16]}. Name the model that it was made for: --model."
        )
    return Subject(shape, profile.task, stored, store.evaluations.find(selection))


def export(subject: Subject, form: Form, file: Path) -> None:
    """Write `file`, which must not be there yet: whole, and only if that engine reads in it what was meant."""
    stored = subject.stored
    if stored.stand_in != NOTHING and form.name != OWN:
        raise InvalidInput(
            f"In the selection {stored.id} mean outputs ({stored.stand_in}) stand in for the others, which no other "
            f"engine knows: {form.name} would serve something else. Export a selection without.",
            param="selection",
        )
    if stored.selection.calls is not None and form.name != OWN:
        raise InvalidInput(
            f"In the selection {stored.id} a token calls {stored.active:g} of the model's experts, which the form "
            f"{form.name} can't say: that engine would call all. Export a selection that calls all.",
            param="selection",
        )
    if subject.shape.config.get(STRIPS, 1) != 1 and form.name != OWN:
        raise InvalidInput(
            f"{subject.shape.folder} has its experts in strips, of which a token finds those of its selection. Another "
            f"engine takes each for an expert and would choose others in place of the missing ones: {form.name} would "
            "serve something else. Export a selection of the unsplit model.",
            param="selection",
        )
    if file.exists():
        raise InvalidInput(f"{file} is there already. Name another file, or remove it.", param="out")
    content = form.write(subject)
    assert form.read(content, subject) == subject.experts, (form.name, stored.id)
    partial = file.with_name(f"{file.name}.part")
    partial.write_bytes(content)
    partial.replace(file)


def _listed(selections: Sequence[StoredSelection]) -> str:
    named = [one.id for one in sorted(selections, key=_order)[:SHOWN]]
    return ", ".join(named) + (", ..." if len(selections) > SHOWN else "")


def _order(stored: StoredSelection) -> tuple[float, str]:
    return -stored.keep, stored.id
