"""Edits found by training their tensors, or by trying candidates: ``mk.fit`` and ``mk.select``."""
