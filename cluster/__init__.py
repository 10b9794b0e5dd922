"""Drivers that run a recipe on a Ray cluster. They know Ray; the library does not."""
