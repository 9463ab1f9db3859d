"""A dataset of people that are drawn, not photographed, so that the body part and the garment of every pixel are known.

A `figure` is one picture with its exact label map in PASCAL-Person-Part, ATR and CIHP; `Figures` is a dataset of them in one
of the three. Training, evaluation, tests and notebooks run on it where no photos are given, and nothing in sst/ needs it.
"""

from .drawing import COVERS, PARTS
from .figures import TABLES, Figure, Figures, figure
