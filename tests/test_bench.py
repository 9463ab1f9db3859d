"""bench.py at sizes that take seconds: every table is printed, and --json is one object with its numbers."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from sst.errors import InputError

ROOT = Path(bench.__file__).parent


def not_here(*_):
    raise InputError("it would take a minute")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "compiler_fault", lambda device: "it would take a minute")
    monkeypatch.setattr(bench, "peak_memory", lambda name, dtype: 1.0)
    monkeypatch.setattr(bench, "peers", dict)
    monkeypatch.setattr(bench, "PHOTO", [(4, 4), (2, 2), (1, 1)])
    monkeypatch.setattr(bench, "SIDE", 64)
    monkeypatch.setattr(bench, "NETWORKS", ("small",))
    monkeypatch.setattr(bench, "STEPS", {"demo": ("small", 3, 64)})
    monkeypatch.setattr(bench, "export", not_here)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1", *flags])
        bench.main()
    return run


def test_every_table_is_printed(tiny, capsys):
    tiny()
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split()[0] for line in lines if line.endswith(("MiB", "step ms", "ratio"))]
    assert titles == ["operator", "network", "step", "parser", "photo"]
    for row in ("embedding_bag, float32", "grid_sample, float32", "small, float32", "demo: small, 3 x 64x64",
                "sst, PyTorch", "label domains: 3"):
        numbers = [line.removeprefix(row).split() for line in lines if line.startswith(row)]
        assert len(numbers) == 1 and float(numbers[0][0]) > 0, row


def test_json_is_one_object(tiny, capsys):
    tiny("--json", "--only", "step")
    results = json.loads(capsys.readouterr().out)
    assert set(results) == {"about", "step"}
    row = results["step"]["demo: small, 3 x 64x64"]
    for name in ("SST", "L_cross"):
        assert row[f"{name} ratio"] == pytest.approx(row[f"with {name} ms"] / row["without SST ms"])


def test_the_network_is_measured_in_every_dtype_of_a_gpu(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench, "dtypes", lambda device: ("float32", "bfloat16"))
    seen, L_seg = [], bench.L_seg
    monkeypatch.setattr(bench, "L_seg", lambda A, label: seen.append(A.dtype) or L_seg(A, label))
    monkeypatch.setattr(bench, "NETWORKS", ("small", "r50"))
    tiny("--json", "--only", "network", "--networks", "small")
    rows = json.loads(capsys.readouterr().out)["network"]
    assert list(rows) == ["small, float32", "small, bfloat16"]
    assert all(value > 0 for row in rows.values() for value in row.values())
    assert set(seen) == {torch.float32, torch.bfloat16}


def test_the_tables_leave_a_dash_where_nothing_is_measured():
    printed = bench.table("network", {"peer": {"inference ms": 1.5, "training step ms": None}})
    assert printed.splitlines()[-1].split() == ["peer", "1.50", "-"]


PAGE_FAULTS = """
import resource
import torch
from sst.distributed import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [torch.ones(4 * 2 ** 20) for _ in range(4)]  # 64 MiB
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc",
                    reason="keep_memory sets two thresholds of glibc, which other C libraries lack")
def test_the_memory_of_a_step_serves_the_next_one():
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, cwd=ROOT,
                          env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")})
    before, after = map(int, done.stdout.split())
    # Each 4 KiB page that comes back costs a fault, and each 2 MiB page where the system has those.
    assert after < 50 and before > 200, done.stderr
