"""`pip install .`: what it installs, and that the programs run from there, without the clone."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PROGRAMS = ("train", "evaluate", "predict")


@pytest.fixture(scope="module")
def tracked():
    """Paths of the files that git tracks, relative to the root."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def installed(tracked, tmp_path_factory):
    """A folder with the installed package. It is built from a copy, because a build leaves folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # Nothing is downloaded: setuptools 70.1 or newer is there, PyTorch 2.13 brings it.
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", target, source],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(installed, folder, *command):
    """Run a command in a folder, with the installed package on the path and nothing else."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=300)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_clone_has_the_programs_as_modules_too(program):
    assert importlib.util.find_spec(f"sst.programs.{program}").origin == str(ROOT / f"{program}.py")


@pytest.mark.slow
def test_library_figures_programs_and_data_are_installed_and_nothing_else(installed, tracked):
    files = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    files = {path.as_posix() for path in files if path.parts[0] != "bin" and "__pycache__" not in path.parts
             and not path.parts[0].endswith(".dist-info")}
    packages = [name for name in tracked if name.startswith(("sst/", "figures/"))]
    origin = {name: name for name in packages}  # of every installed file
    origin |= {f"sst/programs/{name}.py": f"{name}.py" for name in PROGRAMS}
    assert files == set(origin)
    assert {"sst/label_vectors.npz", "sst/builtin/cihp.json", "sst/builtin/ccp_val_id.txt"} <= files
    for name in files:
        assert (installed / name).read_bytes() == (ROOT / origin[name]).read_bytes(), name
    assert {path.name for path in (installed / "bin").glob("*")} == {f"sst-{name}" for name in PROGRAMS}


@pytest.mark.slow
def test_an_installed_package_trains_evaluates_and_predicts(installed, tmp_path):
    train, evaluate, predict = (installed / "bin" / f"sst-{name}" for name in PROGRAMS)
    short = ["--steps", 2, "--size", "64x64", "--crop", "64x64", "--batch-size", 3, "--workers", 0,
             "--validations", 1]
    done = run(installed, tmp_path, train, "--mode", "universal", *short, "--out", "run")
    assert done.returncode == 0, done.stderr
    for name in ("model.pt", "best.pt", "last.pt", "config.json", "log.jsonl", "curves.png", "samples.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name

    done = run(installed, tmp_path, evaluate, "run", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"pascal", "atr", "cihp"}
    assert len(list((tmp_path / "run").glob("confusion.*.png"))) == 3

    Image.new("RGB", (40, 60), (200, 120, 60)).save(tmp_path / "photo.png")
    done = run(installed, tmp_path, predict, "run", "photo.png", "--out", "out")
    assert done.returncode == 0, done.stderr
    results = {f"photo.{domain}.{kind}" for domain in ("pascal", "atr", "cihp")
               for kind in ("png", "overlay.jpg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == results | {"photo.all.jpg"}
    assert Image.open(tmp_path / "out" / "photo.cihp.png").size == (40, 60)


@pytest.mark.slow
@pytest.mark.parametrize("program, arguments, sentence", [
    ("train", ["--data", "pascal=nowhere"],
     "pascal=nowhere: no such folder; give the folder that holds the dataset"),
    ("evaluate", ["nowhere"], "nowhere: no such file; give a model.pt or best.pt that train.py wrote"),
    ("predict", ["nowhere"], "nothing to do; give photos or folders of photos, or --export FILE.onnx"),
])
def test_installed_programs_end_bad_input_in_one_sentence(installed, tmp_path, program, arguments, sentence):
    console = [installed / "bin" / f"sst-{program}"]
    module = [sys.executable, "-m", f"sst.programs.{program}"]
    for command in (console, module):
        done = run(installed, tmp_path, *command, *arguments)
        assert (done.returncode, done.stderr) == (1, f"{program}.py: {sentence}\n")
