"""The HTTP edge: retrieval, scheduling, API. The composition root."""
