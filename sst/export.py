"""The kept network as an ONNX file of standard operators, for any batch, height and width.

Deformable attention becomes GridSample, which ONNX has since opset 16. onnx and onnxscript are needed here
alone, and onnxruntime for 8-bit integers.
"""

import copy
import importlib
import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from .checkpoint import description, written_whole
from .errors import InputError

# The first convolutions stay in float32 where the others are in integers: few channels, whose ranges differ
# by far. They alone changed more of the label maps than all others together (docs/performance.md).
IN_FLOAT = 6


def export(net, domains, path, size=None, canvases=None):
    """Write a ParsingNet in eval mode to `path`, which is whole afterwards or as it was.

    Input "image" (N, 3, H, W) float32, RGB in [0, 1]; outputs named after the domains, logits (N, Z, H, W).
    In the file's metadata, as JSON: "classes" {domain: [name, ...]}, "colours" {domain: [[r, g, b], ...]} and
    "photos", how they are prepared. domains: {name: LabelDomain}. size: (H, W) that photos are fitted into,
    or None. canvases: with them the network's weights and activations become 8-bit integers, in the ranges
    that these photos lead to; (H, W, 3) uint8 each, as the network sees them. Raises InputError.
    """
    check(path, domains, ["onnx", "onnxscript"] + ["onnxruntime"] * (canvases is not None))
    program = traced(net, list(domains))
    classes = {name: domain.classes for name, domain in domains.items()}
    said = {"classes": classes} | description(list(domains.values()), size)
    program.model.metadata_props.update({key: json.dumps(said[key])
                                         for key in ("classes", "colours", "photos")})
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "parser.onnx"
            program.save(file, external_data=False)
            if canvases is not None:
                file = quantized(file, canvases)
            with written_whole(path) as target:
                target.write(file.read_bytes())
    except OSError as error:
        raise InputError(f"--export {path}: cannot be written ({error.strerror or error}); give a file in a "
                         f"folder of yours") from None


def check(path, domains, packages):
    """Raise InputError for what stands in the way of an export."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"--export {path}: the folder {folder} does not exist; make it first")
    if "image" in domains:
        raise InputError("--export: a label domain is called 'image', as the network's input is; train it "
                         "under another name")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        raise InputError(f"--export needs PyTorch 2.8 or newer, this is {torch.__version__}; run: pip "
                         f"install 'torch>=2.8,<2.14'")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"--export needs the package {error.name}, which is not installed; run: pip "
                             f"install {' '.join(packages)}") from None


def traced(net, names):
    """The network as a torch.onnx.ONNXProgram, its outputs called `names`."""
    # At this size windows are padded at every stage where they can be: the traced network has the masks of
    # padding. They do nothing where there is none.
    side = 16 * net.arch.window + 1
    images = torch.zeros(2, 3, side, side + 32)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            copy.deepcopy(net).cpu(), (images,), dynamo=True, opset_version=18, verbose=False,
            input_names=["image"], output_names=names, dynamic_shapes=({0: "N", 2: "H", 3: "W"},))
    # The sides that come out are those that go in. The trace knows them as a formula of padding and cropping.
    N, _, H, W = program.model.graph.inputs[0].shape
    for output in program.model.graph.outputs:
        output.shape = type(output.shape)([N, output.shape[1], H, W])
    return program


def quantized(file, canvases):
    """An ONNX file -> one beside it whose convolutions and products of matrices are in 8-bit integers."""
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(q.CalibrationDataReader):
        inputs = ({"image": c.transpose(2, 0, 1)[None].astype(np.float32) / 255} for c in canvases)

        def get_next(self):
            return next(self.inputs, None)

    small = file.with_name("int8.onnx")
    quant_pre_process(file, small, skip_symbolic_shape=True)
    convolutions = [node.name for node in onnx.load(small).graph.node if node.op_type == "Conv"]
    q.quantize_static(small, small, Photos(), per_channel=True, op_types_to_quantize=["Conv", "MatMul"],
                      activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                      nodes_to_exclude=convolutions[:IN_FLOAT])
    return small
