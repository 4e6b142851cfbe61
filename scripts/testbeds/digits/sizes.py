"""What each family's model of digits is shown, and how large: pixels, patches, tiles, frames."""

from __future__ import annotations


PATCH, GLYPH, CELL = 14, 28, 7  # pixels: a vision patch, a digit's side, the lattice on which things are placed
FRAMES = 6
KINDS = {
    "llava": ("image",),
    "llava_next": ("image",),
    "llava_onevision": ("images", "video"),
}
TILE = {"llava": 168, "llava_next": 112, "llava_onevision": 112}  # side, in pixels
# Rows and columns of tiles of a LLaVA-NeXT image: tall ones, so that left and right are the same in a tile and in the
# image. With columns of tiles a language model this small did not learn, in this time, the order of digits
# (docs/results/testbed.md).
GRIDS = ((2, 1), (3, 1))
GRID_SHARES = (0.6, 0.4)
