"""Questions over small tables, answered by one SQL statement."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

TABLES = {
    "employees": ("salary", "seniority", "bonus"),
    "orders": ("amount", "quantity", "discount"),
    "customers": ("balance", "visits", "credit"),
    "products": ("stock", "price", "rating"),
    "invoices": ("subtotal", "tax", "overdue"),
    "suppliers": ("score", "contracts", "delay"),
}


def _column(rng: random.Random) -> tuple[str, str]:
    table = rng.choice(sorted(TABLES))
    return table, rng.choice(TABLES[table])


def _above(rng: random.Random) -> tuple[Slots, str]:
    table, column = _column(rng)
    limit = rng.choice((10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
    word, sign = rng.choice((("above", ">"), ("below", "<")))
    return {"t": table, "c": column, "n": limit, "w": word}, f"SELECT * FROM {table} WHERE {column} {sign} {limit};"


def _aggregate(rng: random.Random) -> tuple[Slots, str]:
    table, column = _column(rng)
    word, name = rng.choice((("average", "AVG"), ("largest", "MAX"), ("smallest", "MIN"), ("summed", "SUM")))
    return {"t": table, "c": column, "w": word}, f"SELECT {name}({column}) FROM {table};"


def _ordered(rng: random.Random) -> tuple[Slots, str]:
    table, column = _column(rng)
    count = rng.choice((3, 5, 8, 10, 20))
    word, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    return {
        "t": table,
        "c": column,
        "n": count,
        "w": word,
    }, f"SELECT * FROM {table} ORDER BY {column} {order} LIMIT {count};"


TASK = Task(
    "sql",
    "Writes a SQL statement for a question over a table.",
    (
        Kind(
            _above,
            (
                "SQL: select all {t} with {c} {w} {n}.",
                "Write a SQL query for the {t} whose {c} is {w} {n}.",
                "Query the table {t} for rows with a {c} {w} {n}.",
                "Which {t} rows have a {c} {w} {n}? Answer in SQL.",
                "Give me SQL that selects {t} where {c} is {w} {n}.",
                "In SQL, fetch every row of {t} with {c} {w} {n}.",
                "I need a database query: {t} with {c} {w} {n}.",
            ),
            (
                "Give me a SQL query for {t} with a {c} {w} {n}.",
                "In SQL, select the {t} whose {c} is {w} {n}.",
                "Query the database for {t} where {c} is {w} {n}.",
            ),
        ),
        Kind(
            _aggregate,
            (
                "SQL: the {w} {c} in {t}.",
                "Write a SQL query for the {w} {c} of the {t}.",
                "Query the table {t} for the {w} {c}.",
                "What is the {w} {c} in the table {t}? Answer in SQL.",
                "Give me SQL that computes the {w} {c} over {t}.",
                "In SQL, fetch the {w} {c} of {t}.",
                "I need a database query: the {w} {c} over all {t}.",
            ),
            (
                "Give me a SQL query for the {w} {c} in {t}.",
                "In SQL, compute the {w} {c} over the table {t}.",
                "Query the database for the {w} {c} of the {t}.",
            ),
        ),
        Kind(
            _ordered,
            (
                "SQL: the {n} {t} with the {w} {c}.",
                "Write a SQL query for the {n} {t} with the {w} {c}.",
                "Query the table {t} for the {n} rows with the {w} {c}.",
                "Which {n} {t} have the {w} {c}? Answer in SQL.",
                "Give me SQL that lists {n} {t} by {w} {c}.",
                "In SQL, fetch {n} rows of {t} with the {w} {c}.",
                "I need a database query: {n} {t} by {w} {c}.",
            ),
            (
                "Give me a SQL query for {n} {t} with the {w} {c}.",
                "In SQL, list the {n} rows of {t} by {w} {c}.",
                "Query the database for the {n} {t} with the {w} {c}.",
            ),
        ),
    ),
)
