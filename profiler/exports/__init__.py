"""A stored selection in the words of other engines: one file a form."""
