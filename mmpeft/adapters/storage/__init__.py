"""Frozen weights kept in few bits: NF4, integer and fp8 grids, and a tensor that reads as if it were whole."""
