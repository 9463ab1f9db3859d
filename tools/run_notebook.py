"""Run notebooks without Jupyter: plain Python executes the cells in order and stores their outputs.

    python tools/run_notebook.py notebooks/*.ipynb            refresh the stored outputs
    python tools/run_notebook.py --check notebooks/*.ipynb    only run; the files stay as they are
    python tools/run_notebook.py --unfilled DIR notebooks/*   copies without answers and outputs, for a class

A cell may hold nothing but Python. What it prints is stored, and the value of its last line: as a picture
where the value has `_repr_png_` (a PIL image has), as markdown where it has `_repr_markdown_`, and as text.
The working directory is the notebook's folder, and modules that lie there can be imported, as in Jupyter. An
error names the cell and its line.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import linecache
import os
import re
import sys
import time
from pathlib import Path


def source_of(cell):
    """A cell's source; nbformat allows a string and a list of lines."""
    return "".join(cell["source"])


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook):
    """Run the code cells of a parsed .ipynb in one namespace; put outputs and execution_count into them."""
    namespace = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), 1):
        name, source = f"<cell {count}>", source_of(cell)
        # so that tracebacks and inspect show its lines
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        tree, last = ast.parse(source, name), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, name, "exec"), namespace)
            if last and not source.rstrip().endswith(";"):
                value = eval(compile(last, name, "eval"), namespace)
        cell["execution_count"] = count
        cell["outputs"] = outputs_of(printed.getvalue(), value, count)


def outputs_of(printed, value, count):
    outputs = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # an address would differ every time
        data = {"text/plain": text.splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode()
        if hasattr(value, "_repr_markdown_"):
            data["text/markdown"] = value._repr_markdown_().splitlines(keepends=True)
        outputs.append({"data": data, "execution_count": count, "metadata": {},
                        "output_type": "execute_result"})
    return outputs


def stored(notebook, path):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unfilled(notebook):
    """A notebook without its folded answers and without outputs."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        source = re.sub(r"<details>.*?</details>\n*", "", source_of(cell), flags=re.S)
        cell["source"] = source.splitlines(keepends=True)
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="run only, store nothing")
    parser.add_argument("--unfilled", type=Path, metavar="DIR",
                        help="run nothing; write copies without answers and outputs into DIR")
    args = parser.parse_args()
    start = os.getcwd()
    for path in args.notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if args.unfilled:
            args.unfilled.mkdir(parents=True, exist_ok=True)
            stored(unfilled(notebook), args.unfilled / path.name)
            continue
        began, modules = time.time(), list(sys.path)
        os.chdir(path.parent)
        sys.path.insert(0, "")
        try:
            execute(notebook)
        finally:
            os.chdir(start)
            sys.path[:] = modules
        if not args.check:
            stored(notebook, path)
        print(f"{path}: {len(code_cells(notebook))} cells, {time.time() - began:.1f} s, "
              f"{path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
