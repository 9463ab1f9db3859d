"""The exported file agrees with PyTorch at any size, and holds standard operators alone."""

import json
import sys

import numpy as np
import pytest
import torch
from test_model import far_quarter_correlation, on_canvas, smooth_photo

import predict
from figures import Figures
from sst.checkpoint import load_model, model_content, save
from sst.domains import builtin_domain
from sst.model import Arch, ParsingNet

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OLD, reason="the export needs PyTorch 2.8 or newer")]
REASON = "the export needs optional packages: pip install onnx onnxruntime onnxscript"
onnx = pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

DOMAINS = [builtin_domain("pascal"), builtin_domain("ccp-fine")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network whose weights and statistics are all random, and its ONNX file."""
    torch.manual_seed(0)
    net = ParsingNet(DOMAINS, Arch(blocks=(1, 2, 1, 1), width=8, dim=64, heads=2, layers=2, ffn=32, window=4))
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and name not in ("mean", "std"):
                tensor.add_(0.1 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp("exported")
    save(model_content(net, DOMAINS, (64, 48)), folder / "model.pt")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["predict.py", str(folder), "--export", str(folder / "parser.onnx")])
        predict.main()
    return load_model(folder / "model.pt")[0], folder / "parser.onnx"


def shapes(values):
    """[(name, shape), ...] of a graph's inputs or outputs."""
    return [(value.name, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim])
            for value in values]


def test_the_graph_holds_standard_operators_and_no_loops(exported):
    model = onnx.load(exported[1])
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version >= 18) for opset in model.opset_import] == [("", True)]
    assert not model.functions
    operators = {node.op_type for node in model.graph.node}
    assert not [op for op in operators if op in ("Loop", "Scan", "If") or "Sequence" in op]
    assert {"GridSample", "Conv", "Softmax"} <= operators
    assert shapes(model.graph.input) == [("image", ["N", 3, "H", "W"])]
    assert shapes(model.graph.output) == [("pascal", ["N", 7, "H", "W"]), ("ccp-fine", ["N", 27, "H", "W"])]
    said = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert said["classes"] == {domain.name: list(domain.classes) for domain in DOMAINS}
    assert said["colours"]["pascal"] == DOMAINS[0].palette().tolist() and said["photos"]["size"] == [64, 48]


@pytest.fixture(scope="module")
def session(exported):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(exported[1], options, providers=["CPUExecutionProvider"])


# 64x128 needs no padding of windows at any stage, the others do, and the network is traced with padding.
@pytest.mark.parametrize("N, size", [
    (1, (96, 96)), (1, (131, 87)), (1, (200, 150)), (1, (64, 128)), (3, (33, 50)), (1, (16, 16))], ids=str)
def test_the_file_agrees_with_pytorch(exported, session, N, size):
    net = exported[0]
    figures = Figures(DOMAINS[0], 0, N, size)
    images = [torch.from_numpy(figures.load(i)[0].copy()).permute(2, 0, 1) for i in range(N)]
    images = torch.stack(images).float() / 255
    assert images.shape == (N, 3, *size)
    with torch.no_grad():
        expected = net(images)
    found = dict(zip(expected, session.run(list(expected), {"image": images.numpy()}), strict=True))
    for name, logits in expected.items():
        onnx_logits = torch.from_numpy(found[name])
        assert onnx_logits.shape == logits.shape == (N, len(logits[0]), *size)
        assert (onnx_logits.softmax(1) - logits.softmax(1)).abs().max() < 1e-4
        same = (onnx_logits.argmax(1) == logits.argmax(1)).float().mean()
        assert same >= 0.9999 and (len(np.unique(logits.argmax(1))) > 1 or size == (16, 16))


def test_the_file_keeps_the_maps_in_register_too(session):
    """As tests/test_model.py asks of the network, at a size that 32 divides in neither direction."""
    photo = smooth_photo(113, 97, seed=2)
    alone, on_the_canvas = (torch.from_numpy(session.run(["pascal"], {"image": x.numpy()})[0][0])
                            for x in (photo, on_canvas(photo)))
    assert far_quarter_correlation(alone, on_the_canvas, 113, 97) >= 0.97
