"""The tests; see docs/debugging.md."""
