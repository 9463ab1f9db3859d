"""The kept network as an ONNX file of standard operators, for any batch, height and width.

Deformable attention becomes GridSample, which ONNX has since opset 16. onnx and onnxscript are needed here
alone.
"""

import copy
import json
import logging
import warnings
from pathlib import Path

import torch

from .checkpoint import description
from .errors import InputError


def export(net, domains, path, size=None):
    """Write a ParsingNet in eval mode to `path`.

    Input "image" (N, 3, H, W) float32, RGB in [0, 1]; outputs named after the domains, logits (N, Z, H, W).
    In the file's metadata, as JSON: "classes" {domain: [name, ...]}, "colours" {domain: [[r, g, b], ...]} and
    "photos", how they are prepared. domains: {name: LabelDomain}. size: (H, W) that photos are fitted into,
    or None. Raises InputError.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"--export {path}: the folder {path.parent} does not exist; make it first")
    if "image" in domains:
        raise InputError("--export: a label domain is called 'image', as the network's input is; train it "
                         "under another name")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        raise InputError(f"--export needs PyTorch 2.8 or newer, this is {torch.__version__}; run: pip "
                         f"install 'torch>=2.8,<2.14'")
    try:
        import onnx, onnxscript  # noqa: F401, E401
    except ImportError as error:
        raise InputError(f"--export needs the package {error.name}, which is not installed; run: pip install "
                         f"onnx onnxscript") from None
    # At this size windows are padded at every stage where they can be: the traced network has the masks of
    # padding. They do nothing where there is none.
    side = 16 * net.arch.window + 1
    images = torch.zeros(2, 3, side, side + 32)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            copy.deepcopy(net).cpu(), (images,), dynamo=True, opset_version=18, verbose=False,
            input_names=["image"], output_names=list(domains), dynamic_shapes=({0: "N", 2: "H", 3: "W"},))
    # The sides that come out are those that go in. The trace knows them as a formula of padding and cropping.
    N, _, H, W = program.model.graph.inputs[0].shape
    for output in program.model.graph.outputs:
        output.shape = type(output.shape)([N, output.shape[1], H, W])
    classes = {name: domain.classes for name, domain in domains.items()}
    said = {"classes": classes} | description(list(domains.values()), size)
    kept = ("classes", "colours", "photos")
    program.model.metadata_props.update({key: json.dumps(said[key]) for key in kept})
    try:
        program.save(path, external_data=False)
    except OSError as error:
        raise InputError(f"--export {path}: cannot be written ({error.strerror or error}); give a file in a "
                         f"folder of yours") from None
