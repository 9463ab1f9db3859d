"""How programs behave beside their work: Ctrl-C, pipes, other files in a folder, what they print and log."""

import os
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train import SHORT, TINY, lines, run

import predict
import train
from sst import checkpoint, errors, files, inference, model
from sst.errors import InputError, run_program
from sst.labels import read_png

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(model.ARCHS, "small", TINY)
    monkeypatch.setattr(train.Figures, "__len__", lambda self: 4)


def test_ctrl_c_during_validation_is_obeyed_between_photos(tmp_path, monkeypatch, capsys):
    """What was trained is saved, the validation is due, and --resume makes it."""
    seen, photo_labels = [], inference.photo_labels

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return photo_labels(*args, **kwargs)

    monkeypatch.setattr(inference, "photo_labels", interrupted)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *SHORT, "--steps", 2, "--validations", 1, "--out", tmp_path / "run")
    assert end.value.code == 130 and len(seen) == 2
    assert "step 2 is saved, --resume" in capsys.readouterr().out
    assert not [line for line in lines(tmp_path / "run") if line["kind"] == "val"]
    assert checkpoint.load(tmp_path / "run/last.pt", "run")["pending"]
    monkeypatch.setattr(inference, "photo_labels", photo_labels)
    run(monkeypatch, "--resume", tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "val"] == [2]


def test_ctrl_c_elsewhere_is_one_line_and_status_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_program(main, "predict.py")
    assert end.value.code == 130 and capsys.readouterr().err == "predict.py: interrupted\n"


def test_under_torchrun_the_first_process_speaks_first(monkeypatch):
    def main():
        raise InputError("no such folder")

    waited = []
    monkeypatch.setattr(errors, "time", types.SimpleNamespace(sleep=waited.append))
    for rank, wanted in (("0", []), ("3", [errors.PATIENCE])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="train.py: no such folder"):
            run_program(main, "train.py")
        assert waited == wanted


def test_a_pipe_or_a_folder_is_no_photo_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "pipe.png", tmp_path / "folder.png"):
        for read in (files.read_image, files.pixels, read_png):
            with pytest.raises(InputError, match="not a readable .*a folder, a pipe or a device, not a file"):
                read(path)
        assert files.orientation(path) == 1


def test_other_pictures_in_a_folder_are_named(tmp_path, capsys):
    for name in ("a.jpg", "b.gif", "c.gif", "d.HEIC", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    assert [path.name for path in predict.search(tmp_path, tmp_path / "out")] == ["a.jpg"]
    assert capsys.readouterr().err.startswith(f"{tmp_path}: skipped 2 .gif, 1 .heic; photos are .jpg")


def test_what_is_printed_of_a_run(tmp_path, monkeypatch, capsys):
    flags = ["--mode", "dedicated", *SHORT, "--steps", 1, "--source-steps", 1, "--validations", 0]
    run(monkeypatch, *flags, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("Next: look at") == 1 and f"{tmp_path}/run/model.pt" in printed
    run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--out", tmp_path / "drawn")
    assert "  figures " in capsys.readouterr().out
    run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--preset", "small", "--data", "atr=figures",
        "--out", tmp_path / "data")
    assert "  figures " not in capsys.readouterr().out


def test_a_log_for_tensorboard(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *entry):
            written.append(entry)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(train, "finish", lambda *args: None)
    flags = [*SHORT, "--steps", 2, "--validations", 0, "--log-to", "tensorboard", "--out", tmp_path / "run"]
    with monkeypatch.context() as m:
        m.setattr("sst.config.find_spec", lambda name: None)
        with pytest.raises(InputError, match="--log-to tensorboard: needs the package tensorboard, which is"):
            run(monkeypatch, *flags)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("sst.config.find_spec", lambda name: name)
    run(monkeypatch, *flags)
    assert written[0] == tmp_path / "run/tensorboard"
    log = [line for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert ("train/loss/total", log[-1]["loss"]["total"], 2) in written
    assert ("train/lr", log[0]["lr"], 1) in written


def test_names_of_another_script_are_drawn_or_numbered():
    from sst.plots import overlay, written
    from sst.domains import LabelDomain
    assert [written(name, 1) for name in ("Юбка", "été", "帽子")] == ["Юбка", "été", "class 1"]
    domain = LabelDomain("mine", ("background", "帽子"))
    assert overlay(np.zeros((40, 30, 3), np.uint8), np.ones((40, 30), np.uint8), domain).shape[0] >= 40


@pytest.mark.slow
def test_ctrl_c_of_a_program(tmp_path):
    """predict.py with many photos: 130 and one line, no traceback."""
    for n in range(200):
        Image.new("RGB", (400, 600), (n, 80, 90)).save(tmp_path / f"{n}.png")
    command = [sys.executable, ROOT / "predict.py", tmp_path, "--out", tmp_path / "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell in the background hands down a SIGINT that is ignored.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as program:
        while not program.stdout.readline().startswith("1/200"):
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 130 and said == "predict.py: interrupted\n"
