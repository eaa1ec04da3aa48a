"""Circuits: found, scored, saved."""
