"""fxsvd: a compiler for smaller neural networks."""

from fxsvd import passes
from fxsvd.calibrate import calibrate
from fxsvd.capture import capture
from fxsvd.compile import apply, compile, plan
from fxsvd.data.statistics import Statistics
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Assign, Estimate, Left, Part, Plan, Remap, Skip, Substitute
from fxsvd.errors import CaptureError, FxsvdError, PlanError, VerificationError
from fxsvd.evolve import Evolver
from fxsvd.evolving.balance import Balance
from fxsvd.evolving.history import Event, History
from fxsvd.evolving.operators import Residual, residual_spectra
from fxsvd.evolving.policies import Schedule, Spectral
from fxsvd.evolving.sharding import Sharded
from fxsvd.export import export_onnx
from fxsvd.layers import register_layer
from fxsvd.measure import Site
from fxsvd.report import Report
from fxsvd.rules import register_rule
from fxsvd.spaces import Space
from fxsvd.verify import mask, verify

__all__ = [
    "Assign",
    "Balance",
    "CaptureError",
    "Dependencies",
    "Estimate",
    "Event",
    "Evolver",
    "FxsvdError",
    "History",
    "Left",
    "Part",
    "Plan",
    "PlanError",
    "Remap",
    "Report",
    "Residual",
    "Schedule",
    "Sharded",
    "Site",
    "Skip",
    "Space",
    "Spectral",
    "Statistics",
    "Substitute",
    "VerificationError",
    "analyze",
    "apply",
    "calibrate",
    "capture",
    "compile",
    "export_onnx",
    "mask",
    "passes",
    "plan",
    "register_layer",
    "register_rule",
    "residual_spectra",
    "verify",
]
