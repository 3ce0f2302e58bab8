"""Passes: each proposes edits to a network, one per file, named after what it does.

The folder stands at the top of the repository and imports as ``fxsvd.passes``::

    from fxsvd.passes import Prune
"""

if __name__ != "fxsvd.passes":
    # Under a second name every class here would exist twice, and `isinstance` would fail silently.
    raise ImportError(f"import this package as 'fxsvd.passes', not as {__name__!r}")

from fxsvd.passes.factorize import Factorize
from fxsvd.passes.fold import Fold
from fxsvd.passes.prune import Prune
from fxsvd.passes.rotate import Rotate
from fxsvd.passes.select import Select
from fxsvd.passes.shrink import Shrink
from fxsvd.passes.slice import Slice
from fxsvd.passes.unfactorize import Unfactorize
from fxsvd.passes.widen import Widen

__all__ = [
    "Factorize",
    "Fold",
    "Prune",
    "Rotate",
    "Select",
    "Shrink",
    "Slice",
    "Unfactorize",
    "Widen",
]
