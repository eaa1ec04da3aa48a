"""Scores of heads: what each looks at, writes, and is good for. ``mk.score`` is the door."""
