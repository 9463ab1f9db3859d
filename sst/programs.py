"""The programs of the root as modules: sst.programs.train, sst.programs.evaluate, sst.programs.predict.

An installed package has them in the folder programs/ beside this file, where pyproject.toml puts them. Beside
sst/ itself, `evaluate` would be in the way of a well-known package of that name. A clone has them in the
root.
"""

from pathlib import Path

folder = Path(__file__).with_suffix("")
__path__ = [str(folder if folder.is_dir() else Path(__file__).parents[1])]  # where their import looks
