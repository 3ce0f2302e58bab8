"""What a calibration saw: the moments of layers, and whether they are enough."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from fxsvd.data.moments import Moment


class Statistics(dict[str, Moment]):
    """The moments of layers by path.

    Attributes:
        samples: how many samples were seen.

    >>> import torch
    >>> seen = Statistics({"fc": Moment(200, torch.zeros(1, 30))}, samples=50)
    >>> print(seen)
    50 samples
    fc: 200 rows of 30
    """

    def __init__(self, moments: Mapping[str, Moment], samples: int) -> None:
        super().__init__(moments)
        self.samples = samples

    def __str__(self) -> str:
        """The samples, and per layer the rows, and where there are too few of them."""
        lines = [f"{self.samples} samples"]
        few = self.few()
        for name, moment in self.items():
            size = "nothing" if moment.mean is None else f"{moment.count} rows of {_size(moment)}"
            lines.append(f"{name}: {size}" + (" (too few)" if name in few else ""))
        return "\n".join(lines)

    def few(self) -> dict[str, int]:
        """The layers that saw fewer rows than a row has entries, and the samples they need.

        >>> import torch
        >>> Statistics({"fc": Moment(100, torch.zeros(1, 300))}, samples=50).few()
        {'fc': 150}
        """
        return {
            name: math.ceil(_size(m) * self.samples / m.count)
            for name, m in self.items()
            if 0 < m.count < _size(m)
        }


def _size(moment: Moment) -> int:
    return 0 if moment.mean is None else moment.mean.shape[-1]


def warned(found: Statistics) -> Statistics:
    """The statistics themselves, after a warning where they are too few.

    Warns:
        UserWarning: a layer saw fewer rows than a row has entries.

    >>> warned(Statistics({}, samples=5)).samples
    5
    """
    few = found.few()
    if few:
        name = max(few, key=lambda n: few[n])
        others = f" ({len(few) - 1} further layers saw too few as well)" if len(few) > 1 else ""
        warnings.warn(
            f"{name} saw {found[name].count} rows, fewer than the {_size(found[name])} entries of "
            f"each{others}: what is fitted to them may not generalise; give at least "
            f"{few[name]} samples, or more positions of each",
            UserWarning,
            stacklevel=3,
        )
    return found
