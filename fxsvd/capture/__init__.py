"""From any nn.Module to an fx.GraphModule, by running it once on tensors without data.

The model's own Python runs, so branches on shapes, dictionaries and Hugging Face outputs work.
Standard layers stay the original instances under their original names; the rest appears as torch
calls. Dimension 0 of the inputs is symbolic: the graph works for any batch size.

`entry` is the whole in one page. `run` traces the model once, on `fakes`, into a `record`; `modes`
merges the traces of eval and train mode; `assemble` makes the `module`; `check` compares it.
"""

from fxsvd.capture.batch import BATCH_HINT, concrete
from fxsvd.capture.entry import capture
from fxsvd.capture.function import CustomFunction
from fxsvd.capture.inputs import normalize_inputs
from fxsvd.capture.leaves import LEAF_TYPES, is_leaf
from fxsvd.capture.module import CapturedModule
from fxsvd.capture.switch import Switch

__all__ = [
    "BATCH_HINT",
    "LEAF_TYPES",
    "CapturedModule",
    "CustomFunction",
    "Switch",
    "capture",
    "concrete",
    "is_leaf",
    "normalize_inputs",
]
