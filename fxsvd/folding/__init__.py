"""Layers that others can stand in for: which, and when."""
