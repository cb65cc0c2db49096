"""Scores of the channels inside experts, and the statistics that they need."""
