"""Patching: the sweep engine and the analyses made of it."""
