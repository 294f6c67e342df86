"""Whole training recipes; they need the packages of `mmfusion[examples]`."""
