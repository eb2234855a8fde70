"""Circuits: which parts of a model do a task, found by patching."""
