"""Several figures as one, below each other."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from .figures import Picture


def stacked(figures: Sequence[Figure], dpi: int = 100) -> Figure:
    """A figure of figures, all as wide as the widest, in their order."""
    from matplotlib.image import imread

    images = []
    for figure in figures:
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=dpi)
            buffer.seek(0)
            images.append(imread(buffer))
    width = max(one.shape[1] for one in images)
    heights = [one.shape[0] for one in images]
    whole = Picture(figsize=(width / dpi, sum(heights) / dpi), dpi=dpi)
    top = 1.0
    for image, height in zip(images, heights, strict=True):
        share = height / sum(heights)
        axes = whole.add_axes((0, top - share, image.shape[1] / width, share))
        axes.imshow(image, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        top -= share
    return whole
