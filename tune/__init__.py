"""Searches over recipes: spaces and sweeps. Not built yet; the name is kept for them."""
