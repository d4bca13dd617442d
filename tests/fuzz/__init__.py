"""Hostile inputs: `mutations` makes them, `surfaces` reads them, `test_fuzz.py` and `python -m tests.fuzz` run both."""
