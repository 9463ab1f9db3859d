"""torch.compile on a CPU: the operator and the network give what they give without it,
and a machine without a compiler is told so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sst.deform_attn import deform_attn
from sst.distributed import compiler_fault
from sst.model import ParsingNet

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler():
    if fault := compiler_fault(torch.device("cpu")):
        pytest.skip(f"torch.compile does not work on this machine ({fault})")


def assert_equal_with_gradients(one, two, tensors):
    g = torch.Generator().manual_seed(1)
    G = torch.randn(two.shape, generator=g, dtype=two.dtype)
    gradients_one, gradients_two = torch.autograd.grad(one, tensors, G), torch.autograd.grad(two, tensors, G)
    for a, b in zip([one, *gradients_one], [two, *gradients_two], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


def inputs(B, shapes):
    g = torch.Generator().manual_seed(0)
    value = torch.randn(B, sum(h * w for h, w in shapes), 2, 16, generator=g)
    locations = torch.rand(B, 50, 2, len(shapes), 4, 2, generator=g) * 1.4 - 0.2
    weights = torch.rand(B, 50, 2, len(shapes), 4, generator=g)
    return [t.requires_grad_() for t in (value, locations, weights)]


def test_the_operator_in_one_graph(compiler):
    shapes = [(8, 6), (4, 3)]
    value, locations, weights = inputs(2, shapes)
    compiled = torch.compile(deform_attn, fullgraph=True)
    assert_equal_with_gradients(compiled(value, shapes, locations, weights),
                                deform_attn(value, shapes, locations, weights), (value, locations, weights))
    with torch.no_grad():
        locations[0, 3], locations[1, 4] = torch.nan, 1e30  # nothing outside V may be read for them
    out = compiled(value, shapes, locations, weights)
    assert out[0, 3].isnan().all() and (out[1, 4] == 0).all() and out.isnan().sum() == 32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = compiled(value.bfloat16(), shapes, locations, weights)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), out, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_the_operator_at_any_size(compiler):
    compiled = torch.compile(deform_attn, dynamic=True)
    for B, shapes in ((2, [(8, 6), (4, 3)]), (3, [(5, 7), (3, 4)])):
        value, locations, weights = inputs(B, shapes)
        with torch.no_grad():
            torch.testing.assert_close(compiled(value, shapes, locations, weights),
                                       deform_attn(value, shapes, locations, weights))


def test_the_network(compiler):
    torch.manual_seed(0)
    net = ParsingNet({"pascal": 7}, "small").eval()
    images = torch.rand(2, 3, 64, 96)
    compiled = torch.compile(net.features, dynamic=False)
    for one, two in zip(compiled(images), net.features(images), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_training_without_a_compiler_says_so_and_goes_on(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--mode", "universal", "--compile", "--steps", "2",
               "--batch-size", "3", "--validations", "0", "--out", tmp_path / "run"]
    environment = os.environ | {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("--compile: torch.compile does not work on this machine (") == 1
    assert (tmp_path / "run" / "model.pt").exists()
