"""The parser by torch.hub: torch.hub.load("OWNER/sst", "parser"), or of a clone, offline:

    parser = torch.hub.load("FOLDER OF THE CLONE", "parser", source="local")
    masks = parser("photo.jpg")
"""

from sst import load as parser  # noqa: F401  torch.hub finds it by name

dependencies = ["torch", "numpy", "PIL"]
