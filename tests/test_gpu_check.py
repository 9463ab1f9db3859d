"""tools/gpu_check.py: every row of its table, at little sizes on a CPU; and parts that fail."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import gpu_check  # noqa: E402

N = r"\d+(?:\.\d+)?"
COMPARED = rf"{N} ms \({N} x as fast as grid_sample\)"
SPEED = rf"{N} images/s, {N} s a step, of it {N} s waiting for images; peak {N} GiB"
LOSS = rf"loss {N} to {N}"
ROWS = {
    "kernel tests, one, interpreted": rf"1 passed, \d+ deselected in {N}s",
    "operator: embedding_bag, float32": rf"forward {COMPARED}; forward \+ backward {COMPARED}; peak {N} MiB",
    "operator: grid_sample, float32": rf"forward {N} ms; forward \+ backward {N} ms; peak {N} MiB",
    "operator: torch-ms-deform-attn": "left out: the package is not installed",
    "network: small, float32": rf"inference {COMPARED}; training step {COMPARED}",
    "small preset, with SST": SPEED,
    "small preset, without": SPEED,
    "small preset, SST's share": rf"[+-]{N} % time, [+-]{N} % peak memory",
    "torchrun, gloo, float32: universal": LOSS,
    "torchrun, gloo, float32: dedicated, source": LOSS,
    "torchrun, gloo, float32: dedicated, target": LOSS,
    "kill and resume": r"killed after step \d+, went on after step \d+ to step 20",
    "predict.py": rf"4 photos, 28 files, {N} s a photo",
    "--compile": r"left out: torch\.compile does not work on this machine \(.+\)",
}


def table_of(folder):
    """The heading of gpu_check.md, and {what: (result, seconds)}."""
    lines = (folder / "gpu_check.md").read_text().splitlines()
    heading, titles, line, *rows = [line for line in lines if line]
    assert titles == "| what | result | seconds |" and line == "|---|---|---|"
    cells = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]
    return heading, {what: (result, seconds) for what, result, seconds in cells}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="the package triton is not installed")
@pytest.mark.skipif(bool(find_spec("torch_ms_deform_attn")), reason="its rows are not among those expected")
def test_every_row_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    # Without a compiler, because compiling takes minutes on a CPU.
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CXX": "no-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, ROOT / "tools" / "gpu_check.py", "--small", "--out", out],
                         env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == (out / "gpu_check.md").read_text()
    heading, rows = table_of(out)
    assert re.fullmatch(r"# GPU check: GPU none: the CPU, float32, gloo, torch 2\S+, Triton \S+, small sizes",
                        heading)
    assert list(rows) == list(ROWS)
    for what, (result, _) in rows.items():
        assert re.fullmatch(ROWS[what], result), f"{what}: {result}"
    assert sum(float(seconds) > 0 for _, seconds in rows.values() if seconds) == len(gpu_check.PARTS)
    results = json.loads((out / "gpu_check.json").read_text())
    results_of = {row["what"]: row["result"] for row in results["rows"]}
    assert results_of == {what: result for what, (result, _) in rows.items()}
    # The share of SST by hand, from the raw numbers: steps 4 to 6 of 6.
    step, without = (sorted(line["time"]["step"] for line in results["numbers"][name] if line["step"] > 3)[1]
                     for name in ("with-SST", "without-SST"))
    assert rows["small preset, SST's share"][0].startswith(f"{100 * (step / without - 1):+.1f} % time")
    for part in gpu_check.PARTS:
        assert "$ python" in (out / f"{part}.txt").read_text()


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Run the checklist with other parts: its exit status, heading and rows."""
    def run(parts, *flags, gpu=None):
        facts = {"GPU": gpu, "torch": "2.9", "CUDA": None, "Triton": "3.5.0"}
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        monkeypatch.setattr(gpu_check, "about", lambda: facts)
        with pytest.raises(SystemExit) as end:
            gpu_check.main(["--out", str(tmp_path), *flags])
        return end.value.code, *table_of(tmp_path)
    return run


def ends(here):
    code = "import sys; print('step 1', flush=True); sys.exit('train.py: /my/data: a | b is no file')"
    gpu_check.run(here, "-c", code)


def never_ends(here):
    gpu_check.run(here, "-c", "import time; time.sleep(600)")


def has_a_fault(here):
    return {}["triton"]


def works(here):
    printed = gpu_check.run(here, "-c", "print('two is', 1 + 1)")
    return [("arithmetic", printed.splitlines()[-1]), ("more", "fine")]


def test_parts_that_fail_are_rows_and_the_others_go_on(check, tmp_path):
    status, heading, rows = check({"ends": (ends, 60), "late": (never_ends, 0), "fault": (has_a_fault, 60),
                                   "works": (works, 60)}, gpu="H100")
    assert status == 1
    assert heading == "# GPU check: GPU H100, torch 2.9, Triton 3.5.0"
    assert {what: result for what, (result, _) in rows.items()} == {
        "ends": "failed: train.py: data: a / b is no file (exit status 1) (see ends.txt)",
        "late": "failed: not finished after 0 s (see late.txt)",
        "fault": "failed: KeyError('triton') (see fault.txt)",
        "arithmetic": "two is 2", "more": "fine"}
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["failed"] for row in results["rows"]] == [True, True, True, False, False]
    assert "step 1\n" in (tmp_path / "ends.txt").read_text()
    assert "in has_a_fault" in (tmp_path / "fault.txt").read_text()


def test_parts_that_work_and_parts_that_are_chosen(check):
    parts = {"late": (never_ends, 0), "works": (works, 60)}
    status, heading, rows = check(parts, "--small", "--only", "works")
    assert status == 0 and list(rows) == ["arithmetic", "more"]
    assert heading == "# GPU check: GPU none: the CPU, float32, gloo, torch 2.9, Triton 3.5.0, small sizes"


def test_what_it_cannot_do_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "about", lambda: {"GPU": None})
    with pytest.raises(SystemExit, match="PyTorch finds no GPU here; --small runs all on the CPU"):
        gpu_check.main(["--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out .*file: cannot be made .*; give a folder of yours"):
        gpu_check.main(["--out", str(tmp_path / "file"), "--small"])
