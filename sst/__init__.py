"""Scalable Semantic Transfer (SST) for human parsing over multiple label domains."""

__version__ = "0.1.0"


def load(path=None, size=None, max_side=None, device=None, half=False):
    """A trained parser, `parser(image)` -> {domain: (h, w) uint8 label map}; see sst.inference.Parser.

    path: a run's folder or a file of weights; by default the weights that the package carries.
    """
    from .inference import Parser  # here, so that importing a part of the library does not import the rest
    return Parser(path, size, max_side, device, half)
