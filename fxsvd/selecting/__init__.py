"""Choosing channels and refitting what reads them."""
