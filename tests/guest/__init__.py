"""Tests: guest."""
