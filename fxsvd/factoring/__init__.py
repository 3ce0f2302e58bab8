"""Layers in several parts: how, of what rank, fitted to what."""
