"""The notebooks: stored as they should be (fast), and running from top to bottom (slow),
each in a Python of its own."""

import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = [sys.executable, str(ROOT / "tools" / "run_notebook.py")]
MACHINE_PATH = re.compile(
    r"(?:^|[\s'\"=(:,>])"
    r"(?:/(?:home|root|tmp|work|usr|opt|mnt|var|srv|Users|content|workspace)/|[A-Za-z]:\\\\?Users)", re.M)


def text(source):
    """nbformat allows a string and a list of lines."""
    return source if isinstance(source, str) else "".join(source)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def faults(path):
    """What is wrong with a stored notebook: a list of sentences."""
    found = []
    if path.stat().st_size > 1.5e6:
        found.append(f"has {path.stat().st_size:,} bytes; the limit is 1,500,000")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if (notebook.get("nbformat"), notebook.get("nbformat_minor")) != (4, 5):
        found.append("is not of nbformat 4.5")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("does not ask for the kernel python3")
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        found.append("has cells without an id of their own")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"was stored out of order: its cells ran as {counts}")
    if not any(cell["outputs"] for cell in code):
        found.append("has no stored output")
    for n, cell in enumerate(code, 1):
        source = text(cell["source"])
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a magic, too, is no Python
            found.append(f"cell {n} is not plain Python")
            continue
        modules = {name.split(".")[0] for name in imports(tree)}
        served = modules & {"IPython", "ipywidgets", "google"}
        if served or "get_ipython" in source:
            found.append(f"cell {n} needs a notebook server: {', '.join(sorted(served))}")
        written = [source]
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"cell {n} has stored an error: {output.get('ename')}")
            written.append(text(output.get("text", "")))
            data = output.get("data", {})
            written += [text(value) for kind, value in data.items() if kind.startswith("text/")]
        if any("Traceback (most recent call last)" in part for part in written[1:]):
            found.append(f"cell {n} has stored a traceback")
        if any(MACHINE_PATH.search(part) for part in written):
            found.append(f"cell {n} names a path of one machine")
    return found


def run(*paths):
    # One thread: two that wait for each other on a busy machine can take ten times as long.
    return subprocess.run([*RUN, "--check", *map(str, paths)], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_in_order_and_without_faults(path):
    assert faults(path) == []


def test_notebooks_open_in_colab_where_pyproject_names_the_repository():
    """Without a public address there is nothing that a badge could open."""
    project = (ROOT / "pyproject.toml").read_text()
    named = re.search(r'^Repository = "https://github.com/([^"]+)"', project, re.M)
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        place = f"{named[1]}/blob/main/notebooks/{path.name}" if named else ""
        badge = f"https://colab.research.google.com/github/{place}"
        clone = named and f"git clone https://github.com/{named[1]}"
        code = next(text(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        if named:
            assert badge in text(cells[0]["source"]), f"{path.name}: its first cell needs a badge to {badge}"
            assert clone in code, f"{path.name}: its first code cell must run {clone!r} where sst is missing"
        else:
            assert "colab" not in path.read_text(encoding="utf-8"), path.name


def test_every_cell_has_a_slide_type():
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert "slide_type" in cell["metadata"].get("slideshow", {}), (path.name, cell["id"])


def test_a_class_gets_copies_without_answers(tmp_path):
    subprocess.run([*RUN, "--unfilled", tmp_path, *map(str, NOTEBOOKS)], check=True)
    for path in NOTEBOOKS:
        before, after = (json.loads((folder / path.name).read_text(encoding="utf-8"))["cells"]
                         for folder in (path.parent, tmp_path))
        assert [cell["id"] for cell in before] == [cell["id"] for cell in after]
        assert not any("<details>" in text(cell["source"]) or cell.get("outputs") for cell in after)
        assert any("<details>" in text(cell["source"]) for cell in before)
        assert any("mplement this" in text(cell["source"]) for cell in after), "the exercise itself stays"


NAMES = """
from math import sqrt
import numpy as np, torch
from sst.deform_attn import deform_attn
from sst.domains import builtin_domain
from sst.losses import L_u
from sst.modules import masked_attention
"""  # which the notebooks have imported where their exercises stand


def test_the_folded_answers_pass_their_assertions():
    asserted = 0
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for answer in re.findall(r"```python\n(.*?)```", text(cell["source"]), re.S):
                if cell["cell_type"] == "markdown":
                    exec(NAMES + answer, {})
                    asserted += answer.count("assert ")
    assert asserted >= 8, asserted


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_from_top_to_bottom(path):
    before = path.read_bytes()
    result = run(path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert path.read_bytes() == before
    print(result.stdout)


# The checks themselves

def code(source, count, *outputs):
    return {"cell_type": "code", "id": f"cell-{count}-{len(source)}", "metadata": {},
            "execution_count": count, "outputs": list(outputs), "source": source.splitlines(keepends=True)}


def stream(words):
    return {"output_type": "stream", "name": "stdout", "text": [words]}


def written(folder, *cells):
    path = folder / "n.ipynb"
    metadata = {"kernelspec": {"name": "python3"}}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": list(cells)}
    path.write_text(json.dumps(notebook))
    return path


def test_a_good_notebook_has_no_fault(tmp_path):
    assert faults(written(tmp_path, code("x = 1\nprint(x)", 1, stream("1\n")), code("x + 1", 2))) == []


@pytest.mark.parametrize("cells, fault", [
    ([code("1", 2, stream("1")), code("2", 1)], "out of order: its cells ran as [2, 1]"),
    ([code("1", None, stream("1"))], "out of order"),
    ([code("%matplotlib inline", 1, stream("1"))], "cell 1 is not plain Python"),
    ([code("!ls", 1, stream("1"))], "cell 1 is not plain Python"),
    ([code("from IPython.display import display", 1, stream("1"))], "needs a notebook server: IPython"),
    ([code("get_ipython()", 1, stream("1"))], "needs a notebook server"),
    ([code("1", 1, {"output_type": "error", "ename": "KeyError", "evalue": "", "traceback": []})],
     "stored an error: KeyError"),
    ([code("1", 1, stream("Traceback (most recent call last):\n"))], "stored a traceback"),
    ([code("1", 1, stream("saved to /home/me/model.pt\n"))], "path of one machine"),
    ([code("open('/tmp/x')", 1, stream("1"))], "path of one machine"),
    ([code("1", 1)], "no stored output"),
    ([code("x = 1", 1, stream("x" * 1_500_000))], "the limit is 1,500,000"),
])
def test_a_fault_is_found(tmp_path, cells, fault):
    assert any(fault in found for found in faults(written(tmp_path, *cells)))


def test_running_fails_on_an_error_and_names_cell_and_line(tmp_path):
    result = run(written(tmp_path, code("x = 1", 1), code("y = x\nprint(y / 0)", 2)))
    assert result.returncode != 0
    assert 'File "<cell 2>", line 2' in result.stderr and "ZeroDivisionError" in result.stderr


def test_a_notebook_imports_a_module_that_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("x = 3\n")
    result = run(written(tmp_path, code("from beside import x\nassert x == 3", 1)))
    assert result.returncode == 0, result.stderr


def test_running_goes_in_order_and_stores_text_pictures_and_counts(tmp_path):
    path = written(tmp_path, code("from PIL import Image\nprint('a', 1)\nx = 20", 7), code("x + 1", 3),
                   code("Image.new('RGB', (x, 9))", None), code("x", 1), code("f = lambda: 3;", 1))
    subprocess.run([*RUN, str(path)], check=True, capture_output=True)
    cells = json.loads(path.read_text())["cells"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4, 5]
    assert cells[0]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["a 1\n"]}]
    assert cells[1]["outputs"][0]["data"] == {"text/plain": ["21"]} and cells[4]["outputs"] == []
    shown = cells[2]["outputs"][0]["data"]
    assert Image.open(io.BytesIO(base64.b64decode(shown["image/png"]))).size == (20, 9)
    assert " at 0x" not in text(shown["text/plain"])
