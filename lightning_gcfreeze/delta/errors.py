"""What can be wrong with a delta. Whenever one of these is raised, nothing has been written to the model."""


class DeltaError(ValueError):
    """Something is wrong with a delta, or with what it was to be applied to."""


class CorruptFileError(DeltaError):
    """The file is no delta, is cut off, or some of its bytes have changed."""


class MismatchError(DeltaError):
    """The delta has other names, shapes, dtypes or places than the model or the mask that it was given with."""


class WrongBaseError(DeltaError):
    """An element that the delta leaves unchanged has other bits in the model."""


class ChainError(DeltaError):
    """An update does not follow the one that was applied last."""


class ConflictError(DeltaError):
    """Two deltas write different bits to one place."""
