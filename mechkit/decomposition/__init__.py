"""Contextual decomposition: what part of an activation comes from chosen sources."""
