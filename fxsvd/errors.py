"""The exceptions that fxsvd raises on purpose: messages say what was met, where, what to do."""


class FxsvdError(Exception):
    """Base class: `except FxsvdError` catches everything that fxsvd itself raises."""


class CaptureError(FxsvdError):
    """The model could not be turned into a graph; the message names the module and the line."""


class VerificationError(FxsvdError):
    """A compiled model does not compute what its plan promises; the message names the space."""


class PlanError(FxsvdError):
    """A plan does not fit the model it is applied to, or asks for the impossible."""
