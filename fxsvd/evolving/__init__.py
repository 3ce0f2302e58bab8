"""Resizing a network while it trains."""
