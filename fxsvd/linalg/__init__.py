"""Linear algebra of compression: tensors in, float64 tensors out, no graph in sight.

Import from the submodules.
"""
