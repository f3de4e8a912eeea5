"""Okabe and Ito's palette, which most eyes tell apart.

Black is for what others are compared with.
"""

PALETTE = ("black", "#0072B2", "#CC79A7", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#999999")
