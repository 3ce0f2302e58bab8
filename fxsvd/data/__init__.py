"""Data and what layers see of it: batches, rows, moments."""
