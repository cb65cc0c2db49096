"""The report on one model: what its store holds, drawn and written as one page."""
