"""The class of the report's figures. Importing this module imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class InlineFigure(Figure):
    """A matplotlib figure that a notebook shows, also where pyplot was never imported.

    Example:
        >>> figure = InlineFigure(figsize=(2, 1))
        >>> "<svg" in figure._repr_svg_()
        True
    """

    def _repr_svg_(self) -> str:
        buffer = io.StringIO()
        self.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]
