"""A small real Mixture-of-Experts trained here, its tasks, and the script that trained it."""
