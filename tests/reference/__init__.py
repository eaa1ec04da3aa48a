"""The slow literal forms of what mechkit does quickly: one whole forward pass a cell, nothing shared."""
