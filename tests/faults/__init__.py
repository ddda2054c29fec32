"""Seeded faults: one-line mistakes that the tests must catch. ``python -m tests.faults`` tries them all."""
