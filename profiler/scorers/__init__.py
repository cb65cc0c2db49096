"""One file a scorer: what an expert is worth to a task, from one set of statistics."""
