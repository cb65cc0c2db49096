"""From a task's text to a packed model: statistics, recipe, checkpoint, and what is left of the model, on its card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from profiler.batches import encode_corpus
from profiler.corpus import Corpus, refuse_overlap
from profiler.evaluate import evaluate
from profiler.job import gather_profile
from profiler.options import Options
from profiler.pack import write_pack
from profiler.pack_folder import refuse_existing
from profiler.pack_ways import Pack, make_recipe
from profiler.progress import Progress, Report
from profiler.quantise import quantise_model
from profiler.statistics import Statistics
from store.database import Store
from store.records import TaskRecord


def pack_task(
    config: EngineConfig,
    store: Store,
    task: TaskRecord,
    texts: tuple[Corpus, Corpus | None],
    pack: Pack,
    folder: Path,
    options: Options,
    report: Report,
) -> dict[str, Any]:
    """The pack's card. The profile that it is made from is stored, or was; an interrupted pass goes on.

    With evaluation text the card says what the whole model and the pack do on it. Raises what `write_pack` and a
    profile raise; a folder that is there is refused before anything is run.
    """
    refuse_existing(folder)
    calibration, held_out = texts
    if held_out is not None:
        refuse_overlap(calibration, held_out)
    wanted = replace(options, scorers=[pack.scorer], extras=options.extras | pack.needs)
    with Engine.open(config) as engine:
        profile = gather_profile(engine, store, task, calibration, wanted, report)
        statistics = Statistics.from_arrays(profile.statistics)
        recipe = make_recipe(engine, statistics, pack, encode_corpus(engine, calibration), options.rows)
        said = {"profile": profile.id, "task": task.name, "calibration": calibration.content_hash}
        whole = None if held_out is None else measured(engine, held_out, options.rows)

        def finish(made: Path) -> dict[str, Any]:
            report(Progress(task.name, "evaluate", 0, 1))
            return {**said, "evaluation": _evaluation(config, made, held_out, whole, options.rows)}

        return write_pack(engine, recipe, folder, finish)


def quantise_and_measure(
    config: EngineConfig, held_out: Corpus | None, folder: Path, way: str, rows: int, report: Report
) -> dict[str, Any]:
    """The card of a copy of the model in FP8, INT4 or MXFP4; with evaluation text it says what both do on it."""
    whole = None
    refuse_existing(folder)
    if held_out is not None:
        report(Progress("model", "evaluate", 0, 1))
        with Engine.open(config) as engine:
            whole = measured(engine, held_out, rows)

    def finish(made: Path) -> dict[str, Any]:
        return {"evaluation": _evaluation(config, made, held_out, whole, rows)}

    return quantise_model(config.model, folder, way, finish, report)


def _evaluation(
    config: EngineConfig, made: Path, held_out: Corpus | None, whole: dict[str, Any] | None, rows: int
) -> dict[str, Any] | None:
    """Opening the pack is a check of its own, evaluation text or none."""
    with Engine.open(replace(config, model=made, memory=None)) as packed:
        if held_out is None:
            return None
        return {"text": held_out.content_hash, "pack": measured(packed, held_out, rows), "whole": whole}


def measured(engine: Engine, held_out: Corpus, rows: int) -> dict[str, Any]:
    """What the whole model does on a text."""
    found = evaluate(engine, encode_corpus(engine, held_out), None, rows)
    return {"items": found.items, "accuracy": found.accuracy, "nll": found.nll}
