"""Texts and token windows: what calibration and evaluation read.

`read_text` opens a text, `cut_windows` and `draw_windows` make windows of its tokens.
"""

from gpmetric.data.documents import draw_windows
from gpmetric.data.regime import leading_bos, left_out
from gpmetric.data.sources import STDIN, read_text
from gpmetric.data.text import Text, split_text
from gpmetric.data.windows import Windows, check_disjoint, cut_windows, overlap

__all__ = [
    "STDIN", "Text", "Windows", "check_disjoint", "cut_windows", "draw_windows", "leading_bos", "left_out", "overlap",
    "read_text", "split_text",
]  # fmt: skip
