"""Passes: each proposes edits to a network, one per file, named after what it does.

The folder stands at the top of the repository and imports as ``fxsvd.passes``::

    from fxsvd.passes import Prune
"""

if __name__ != "fxsvd.passes":
    # Under a second name every class here would exist twice, and `isinstance` would fail silently.
    raise ImportError(f"import this package as 'fxsvd.passes', not as {__name__!r}")

from fxsvd.passes.prune import Prune
from fxsvd.passes.select import Select

__all__ = ["Prune", "Select"]
