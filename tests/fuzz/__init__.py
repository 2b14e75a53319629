"""Fuzzing: one table of targets, used by pytest with Hypothesis, by atheris, and by a mutation loop of our own."""
