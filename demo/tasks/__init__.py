"""The demo's ten tasks: each a vocabulary of its own, several ways to ask, and one exact answer."""
