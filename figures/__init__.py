"""People that are drawn: a dataset in which the body part and the garment of every pixel are known.

`figure` draws one picture, which has an exact label map in each of PASCAL-Person-Part, ATR and CIHP, and
`Figures` is a dataset of them in one of these label sets. Training, evaluation, tests and notebooks use it
where no photos are given.
"""

from .drawing import COVERS, PARTS
from .figures import TABLES, Figure, Figures, figure
