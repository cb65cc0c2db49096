"""What selections cost, in accuracy and bytes. Rows in, records out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sqlalchemy import select

from store.changes import note_change
from store.connection import Database
from store.errors import CorruptStore, InvalidInput, NotFound
from store.records import Price
from store.schema import PriceRow, SelectionRow
from store.writing import upsert

KEY = ("selection", "text", "evaluation_hash")


class Prices:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, price: Price) -> None:
        """Adds it; one of the same selection and items is replaced. Raises NotFound for an unknown selection."""
        measured = [
            figure for figure in (price.accuracy, price.full_accuracy, price.low, price.high) if figure is not None
        ]
        drawn = [figure for draw in price.draws for figure in draw if figure is not None]
        if not all(map(math.isfinite, (price.nll, *measured, *drawn))):
            raise InvalidInput(f"A price of numbers that are not finite is no evidence: {price}. Evaluate again.")
        values = {field: getattr(price, field) for field in Price.__slots__}
        values["draws"] = [list(draw) for draw in price.draws]
        with self._database.write() as session:
            if session.get(SelectionRow, price.selection) is None:
                raise NotFound(f"No selection {price.selection} is in the store. Profile the task: moepager profile.")
            upsert(session, PriceRow, values, update=[name for name in values if name not in KEY], key=KEY)
            note_change(session)

    def list(self, profile: str) -> Sequence[Price]:
        """Those of a profile's selections, the largest selection first, the task's own items before others'."""
        query = select(PriceRow).join(SelectionRow, PriceRow.selection == SelectionRow.id)
        query = query.where(SelectionRow.profile == profile)
        query = query.order_by(SelectionRow.keep.desc(), SelectionRow.id, PriceRow.text.desc(), PriceRow.id)
        with self._database.read() as session:
            return [_price(row) for row in session.scalars(query)]


def _price(row: PriceRow) -> Price:
    values = {field: getattr(row, field) for field in Price.__slots__}
    draws = []
    for draw in row.draws:
        if len(draw) != 2 or draw[1] is None:
            raise CorruptStore(f"A price of selection {row.selection} holds a damaged draw. Profile the task again.")
        draws.append((draw[0], draw[1]))
    return Price(**values | {"draws": tuple(draws)})
