"""How a store got its shape, step by step. Run by `store.upgrade`, inside the package, without an alembic.ini."""
