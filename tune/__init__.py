"""Searches over recipes: spaces, and what is best of what was tried. Sweeps are not built yet."""
