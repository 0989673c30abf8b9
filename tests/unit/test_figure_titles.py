"""Titles of panels end before the next panel begins, whatever the names in them."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from clipgap_ray.reporting import theme

LONG = "gap-combined-with-reference on counteranimal  (n = 19,052 pool images)"


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("title", ["val  (n = 1,200)", LONG, "x" * 40])
def test_titles_reach_neither_into_the_next_panel_nor_out_of_the_figure(columns: int, title: str) -> None:
    with theme.using(theme.LIGHT):
        figure, axes = theme.grid(5, columns=columns)
        for axis in axes:
            axis.set_title(title)
        theme.fit_titles(figure)
        figure.draw_without_rendering()
        for number, axis in enumerate(axes):
            (shown,) = (text for text in axis.findobj(Text) if text.get_text() == axis.get_title("left") != "")
            last = (number + 1) % columns == 0 or number + 1 == len(axes)
            end = figure.bbox.width if last else axes[number + 1].get_window_extent().x0
            assert shown.get_window_extent().x1 <= end
            assert shown.get_fontsize() >= theme.TITLE_SIZES[-1]
            assert axis.get_title("left").replace("\n", "  ") == title
        theme.plt.close(figure)
