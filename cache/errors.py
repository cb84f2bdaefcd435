"""The one tree of exceptions. A message says what was found, what was expected, and what to do."""


class HiddenlakeError(Exception):
    """Base of every error that hiddenlake raises on purpose."""


class UnknownNameError(HiddenlakeError, ValueError):
    """A site, layer, position, task, model family or column that does not exist."""


class BadInputError(HiddenlakeError, ValueError):
    """A file or an argument that cannot be used, named by its line or field."""


class IdentityError(HiddenlakeError):
    """A capture folder holds activations of another value identity or coverage."""


class CorruptError(HiddenlakeError):
    """Stored bytes differ from what was committed. Names the file and the offset."""


class StoreError(HiddenlakeError):
    """The store cannot be read or written: absent, full, claimed, or of an unknown version."""


class CaptureError(HiddenlakeError):
    """Activations could not be captured: no canary, an unsupported engine, a ring that is too small."""


class ProbeError(HiddenlakeError, ValueError):
    """Probes cannot be fitted on these samples: too few, one class only, folds that do not fit."""
