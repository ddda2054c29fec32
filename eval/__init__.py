"""Measurements: one command per question, see the README. Never part of the tests, never imported by the package."""
