"""Faults that the tests of `docs/reliability.md` were seen to catch; `python -m tests.planted`."""
