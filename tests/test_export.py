"""The exported file agrees with PyTorch at any size, and holds standard operators alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import far_quarter_correlation, on_canvas, smooth_photo

import predict
import sst
from figures import Figures
from sst.checkpoint import load_model, model_content, save
from sst.domains import builtin_domain
from sst.model import Arch, ParsingNet
from sst.onnx_parser import OnnxParser

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


def test_the_parser_without_pytorch_gives_the_same_masks(exported, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = np.asarray(Image.fromarray(image).resize((83, 131), Image.Resampling.BICUBIC))
    Image.fromarray(image).save(tmp_path / "photo.png")
    folder = exported[1].parent
    for options in ({}, {"size": (96, 64)}, {"max_side": 100}):
        with_torch, without = sst.load(folder, **options), OnnxParser(exported[1], threads=1, **options)
        wanted, found = with_torch(image), without(tmp_path / "photo.png")
        assert wanted.keys() == found.keys()
        for name in wanted:
            assert found[name].shape == (131, 83) and found[name].dtype == np.uint8
            assert (wanted[name] == found[name]).mean() >= 0.999 and len(np.unique(found[name])) > 1
    p = without([image], ["pascal"], probabilities=True)[0]
    np.testing.assert_allclose(p["pascal"], with_torch(image, ["pascal"], True)["pascal"], atol=1e-3)
    assert without.legend() == with_torch.legend()
    text = "ccp-fine: dress, skirt | pascal: torso"
    assert (without.mask(found, text) == with_torch.mask(found, text)).all()


def test_the_parser_without_pytorch_runs_alone(exported, tmp_path):
    """Copied into an empty folder, where no torch and no sst can be imported."""
    for name in ("onnx_parser.py", "expression.py"):
        shutil.copy(Path(sst.__file__).parent / name, tmp_path)
    Image.new("RGB", (40, 50)).save(tmp_path / "photo.png")
    code = f"""if True:
        import sys
        sys.modules["torch"] = sys.modules["sst"] = None
        from onnx_parser import OnnxParser
        parser = OnnxParser({str(exported[1])!r})
        print(parser("photo.png")["pascal"].shape, parser.mask("photo.png", "pascal: torso").shape)
        for wrong in (lambda: parser("none.png"), lambda: OnnxParser("photo.png"),
                      lambda: parser.mask("photo.png", "pascal: toro")):
            try:
                wrong()
            except ValueError as error:
                print(error)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    printed = done.stdout.splitlines()
    assert done.returncode == 0 and printed[0] == "(50, 40) (50, 40)", done.stderr
    for line, words in zip(printed[1:], ("none.png: not a readable photo", "photo.png: not a parser",
                                         "'toro' is no class of pascal, which has torso"), strict=True):
        assert words in line


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
