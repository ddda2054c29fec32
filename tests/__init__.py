"""Tests of hf_fastattn. A package, so that ``python -m tests.faults`` finds the seeded faults beside them."""
