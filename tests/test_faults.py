"""Steps that are not finite, files that break during a run, and flags beside --resume, in one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import SHORT, TINY, lines, run

import train
from sst import model, runs, scenarios
from sst.crops import Crops
from sst.data import Photos
from sst.domains import builtin_domain
from sst.distributed import StepStatistics
from sst.errors import InputError
from sst.optim import Muon


FINISH = train.finish


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tiny network, and no pictures."""
    monkeypatch.setitem(model.ARCHS, "small", TINY)
    monkeypatch.setattr(train, "finish", lambda *args: None)


def spoil(monkeypatch, when, what=float("nan")):
    """L_seg is `what` for ATR's images in those calls (one a step here):
    a loss that depends on labels alone goes wrong."""
    calls, L_seg = [0], scenarios.L_seg

    def spoiled(logits, labels, balance):
        loss = L_seg(logits, labels, balance)
        if logits.shape[1] == 18:  # ATR
            calls[0] += 1
            if calls[0] in when:
                return loss * what
        return loss

    monkeypatch.setattr(scenarios, "L_seg", spoiled)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_named_and_counted(tmp_path, monkeypatch, capsys, what):
    """Step 3 of 4 changes nothing: weights, running statistics and optimiser are those after step 2."""
    spoil(monkeypatch, {3}, what)
    run(monkeypatch, *SHORT, "--steps", 4, "--validations", 0, "--save-every", 1, "--out", tmp_path / "run")
    log = lines(tmp_path / "run")
    train_, skipped = ([line for line in log if line["kind"] == kind] for kind in ("train", "skipped"))
    assert [line["step"] for line in train_] == [1, 2, 4]
    assert train_[-1]["skipped"] == {"steps": 1, "files": 0}
    (line,) = skipped
    assert line["step"] == 3
    assert [name for name, value in line["loss"].items() if value is None] == ["seg/atr", "total"]
    assert len(line["files"]) == 3 and all("figure" in name for name in line["files"])
    assert "step 3 skipped: not finite: seg/atr, total; images: " in capsys.readouterr().out
    written = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in written and "Infinity" not in written


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4})
    run(monkeypatch, *SHORT, "--steps", 4, "--validations", 0, "--save-every", 2, "--out", tmp_path / "run")
    before, after = (torch.load(tmp_path / "run" / name, weights_only=True)
                     for name in ("previous.pt", "last.pt"))
    assert (before["step"], after["step"]) == (2, 4)
    assert all(torch.equal(before["weights"][key], after["weights"][key]) for key in before["weights"])
    for key, state in before["optimizer"]["state"].items():
        assert all(torch.equal(state[name], after["optimizer"]["state"][key][name]) for name in state)
    assert after["counts"] == {"skipped_steps": 2, "skipped_in_a_row": 2, "skipped_files": 0}


def test_only_a_gradient_that_is_not_finite(tmp_path, monkeypatch, capsys):
    """A loss may be finite where its gradient is not: sqrt at 0."""
    L_seg = scenarios.L_seg
    monkeypatch.setattr(scenarios, "L_seg", lambda logits, labels, balance: (
        L_seg(logits, labels, balance) + (logits * 0).sum().sqrt()))
    run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--out", tmp_path / "run")
    assert "step 1 skipped: not finite: the gradient; images: " in capsys.readouterr().out


def test_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 4, 5, 6})
    flags = [*SHORT, "--steps", 9, "--validations", 0, "--max-skips", 3, "--out", tmp_path / "run"]
    with pytest.raises(InputError, match="step 6: seg/atr, total not finite for 3 steps in a row: "
                                         "training has diverged; lower --lr 0.01 or"):
        run(monkeypatch, *flags)


def test_clipping_shortens_the_gradient(tmp_path, monkeypatch):
    norms, step = [], Muon.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Muon, "step", spy)
    for flags in ([], ["--clip", "0.5"]):
        out = tmp_path / f"run{len(flags)}"
        run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--out", out, *flags)
    assert norms[0] > 5 and norms[1] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_trains(tmp_path, monkeypatch, name):
    """On a CPU too, slowly; fp16 with a loss scale, which is part of the checkpoint."""
    out = tmp_path / "run"
    run(monkeypatch, *SHORT, "--steps", 2, "--validations", 0, "--precision", name, "--max-skips", 30,
        "--out", out)
    state = torch.load(out / "last.pt", weights_only=True)
    assert bool(state["scaler"]) == (name == "fp16")
    assert all(w.dtype == torch.float32 for w in state["weights"].values() if w.is_floating_point())
    skipped = state["counts"]["skipped_steps"]
    assert skipped < 2 or state["scaler"]["scale"] < 2 ** 16, "a gradient too large lowers the scale"


def test_sync_bn_is_for_gpus(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--sync-bn: PyTorch has it for GPUs only"):
        run(monkeypatch, *SHORT, "--steps", 1, "--sync-bn", "--out", tmp_path / "run")


# Files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Six photos of two classes, as a dataset of one's own; photo 2 is broken."""
    root = tmp_path / "mine"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 2, (64, 64), dtype=np.uint8)).save(root / "labels" / f"{i}.png")
    for split in ("train", "val"):
        (root / f"{split}_id.txt").write_text("\n".join(map(str, range(6) if split == "train" else [0])))
    domain = {"name": "mine", "classes": ["background", "hat"], "adjacency": []}
    (root / "domain.json").write_text(json.dumps(domain))
    broken = root / "images" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    return root


def test_a_file_that_breaks_stops_the_run_or_is_skipped_and_counted(folder, tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--data", f"mine={folder}", "--preset", "small", "--steps", 4, "--validations", 0,
             "--out", tmp_path / "run"]
    with pytest.raises(InputError, match="2.jpg: not a readable photo"):
        run(monkeypatch, *flags)
    run(monkeypatch, "--resume", tmp_path / "run", "--skip-bad")  # before a checkpoint: from the start
    printed = capsys.readouterr().out
    assert "begins again" in printed and "2.jpg: not a readable photo" in printed
    assert "another photo took its place" in printed
    log = lines(tmp_path / "run")
    unreadable = [line for line in log if line["kind"] == "unreadable"]
    assert len(unreadable) == 2, "12 samples are two passes over six photos"
    assert log[-1]["skipped"] == {"steps": 0, "files": 2}
    assert all("2.jpg" in line["files"][0] for line in unreadable)


def test_the_next_photo_takes_the_place_and_with_none_left_the_run_stops(folder):
    photos = [folder / "images" / f"{i}.jpg" for i in (2, 3)]
    labels = [folder / "labels" / f"{i}.png" for i in (2, 3)]
    data = Photos(builtin_domain("pascal"), photos, labels)
    crops = Crops([data], None, (64, 64), 0, skip_bad=True)
    image, label, d, name, skipped = crops[0, 0, 0]
    assert name.endswith("3.jpg") and len(skipped) == 1 and torch.equal(image, crops[0, 0, 1][0])
    (folder / "images" / "3.jpg").unlink()
    assert isinstance(crops[0, 0, 0], InputError)


# Resuming ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--out", out)
    return out


@pytest.mark.parametrize("flags, message", [
    (["--lr", "1"], "--lr 1.0: contradicts the run in"),
    (["--crop", "32x32"], "--crop 32 32: contradicts the run in"),
    (["--mode", "dedicated"], "--mode dedicated: contradicts"),
    (["--epochs", "3"], "--epochs 3: contradicts"),
    (["--data", "pascal=x"], "--data pascal=x: contradicts"),
    (["--out", "elsewhere"], "--out elsewhere: contradicts"),
    (["--skip-bad", "--seed", "1"], "--seed 1: contradicts"),
])
def test_a_flag_that_contradicts_the_run_is_refused(finished, flags, message):
    for resume in (["--resume", str(finished)], ["--resume", "auto", "--out", str(finished)]):
        if "--out" in flags and resume[1] == "auto":
            continue
        with pytest.raises(InputError) as caught:
            runs.configure([*resume, *flags])
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flags_that_agree_and_those_that_change_no_result_are_taken(finished):
    before = runs.configure(["--resume", str(finished)])
    same = runs.configure(["--resume", "auto", "--out", str(finished), *SHORT,
                           "--steps", "1", "--validations", "0"])
    assert same == before and same.crop == (64, 64)
    changed = runs.configure(["--resume", str(finished), "--workers", "3", "--skip-bad", "--save-every", "7"])
    assert changed == before | {"workers": 3, "skip_bad": True, "save_every": 7}


def test_auto_begins_a_run_or_goes_on_with_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, out in ([], "runs/universal"), (["--mode", "dedicated"], "runs/dedicated"):
        begun = runs.configure(["--resume", "auto", *flags])
        assert begun.resume is None and runs.placed(begun, 1).out == out
    for n in (1, 2):
        config = runs.configure([]) | {"out": str(runs.run_folder("universal", n)), "seed": n}
        Path(config.out).mkdir(parents=True)
        runs.write_config(config)
    assert runs.configure(["--resume", "auto"]).out == "runs/universal-2"
    begun = runs.placed(runs.configure(["--resume", "auto", "--out", "runs/new"]), 1)
    assert (begun.resume, begun.out) == (None, "runs/new")
    Path("runs/weights").mkdir()
    Path("runs/weights/model.pt").write_text("of another run, without its settings")
    with pytest.raises(InputError, match="holds a run already .model.pt.; give another folder"):
        runs.placed(runs.configure(["--resume", "auto", "--out", "runs/weights"]), 1)
    assert runs.configure(["--out", "runs/universal"]).resume is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun starts the same command again
    monkeypatch.setattr(runs, "recall", {"folder": "runs/universal-2"}.get)
    assert runs.configure(["--seed", "2"]).resume == "runs/universal-2"


def test_a_launch_that_died_before_its_folder_was_made_does_not_take_the_newest(
        finished, tmp_path, monkeypatch):
    """Started again by torchrun it begins: in the folder that it had chosen, if any, or else in a new one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "universal").symlink_to(finished)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for memory, out in (({}, "runs/universal-2"), ({"folder": "runs/mine"}, "runs/mine")):
        monkeypatch.setattr(runs, "recall", memory.get)
        config = runs.configure([])
        assert config.resume is None and runs.placed(config, 1).out == out


def test_a_run_whose_files_were_changed_is_refused(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--out", out)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"lr": 0.01', '"lr": 0.5'))
    with pytest.raises(InputError, match="last.pt: was trained with --lr 0.01, "
                                         "but config.json beside it says 0.5; put config.json back"):
        run(monkeypatch, "--resume", out)
    (out / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not the settings of a run"):
        run(monkeypatch, "--resume", out)
    (out / "config.json").write_text(config)
    monkeypatch.setattr(train.Figures, "__len__", lambda self: 5)
    with pytest.raises(InputError, match="the training list of 'pascal' had 2000 photos "
                                         "when the run began, and has 5 now, or others"):
        run(monkeypatch, "--resume", out)


def test_a_run_of_an_earlier_version(tmp_path, monkeypatch):
    """Settings that it does not know are as published; an optimiser that does not fit is refused."""
    out = tmp_path / "run"
    run(monkeypatch, *SHORT, "--steps", 2, "--validations", 0, "--out", out)
    config = json.loads((out / "config.json").read_text())
    younger = ("optimizer", "decay", "balance", "sst_lr_scale", "check")
    older = {key: value for key, value in config.items() if key not in younger}
    (out / "config.json").write_text(json.dumps(older))
    resumed = runs.configure(["--resume", str(out)])
    assert [getattr(resumed, key) for key in younger] == ["adamw", "drop", 0, 1, None]
    content = torch.load(out / "last.pt", weights_only=True)
    content["config"] = {key: value for key, value in content["config"].items() if key not in younger}
    torch.save(content, out / "last.pt")
    with pytest.raises(InputError, match="last.pt: its optimiser's state does not fit "
                                         "this version of train.py; go on with the version"):
        run(monkeypatch, "--resume", out)


# Validation photos that break -------------------------------------------------------------------------------


@pytest.fixture
def half_validation(folder):
    """Three validation photos, of which number 2 is broken. All training photos are whole."""
    (folder / "train_id.txt").write_text("0\n1\n3\n4\n5")
    (folder / "val_id.txt").write_text("0\n2\n3")
    return folder


def flags_of(folder, out):
    return [*SHORT, "--data", f"mine={folder}", "--preset", "small", "--steps", 2, "--validations", 1,
            "--out", out]


def test_a_broken_validation_photo_is_left_out_named_and_counted(
        half_validation, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *flags_of(half_validation, tmp_path / "run"), "--skip-bad")
    assert "step 2: " in (printed := capsys.readouterr().out) and "2.jpg: not a readable photo" in printed
    val, unreadable = lines(tmp_path / "run")[-2:]
    assert (unreadable["kind"], len(unreadable["files"]), val["kind"]) == ("unreadable", 1, "val")
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert last["counts"]["skipped_files"] == 1 and not last["pending"]
    (half_validation / "val_id.txt").write_text("0\n3")  # the same photos, and none is broken
    run(monkeypatch, *flags_of(half_validation, tmp_path / "whole"))
    assert lines(tmp_path / "whole")[-1]["miou"] == val["miou"]


def test_a_kill_between_the_lines_of_a_validation_leaves_each_once(half_validation, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(monkeypatch, *flags_of(half_validation, out), "--skip-bad")
    whole = lines(out)
    content = torch.load(out / "last.pt", weights_only=True)
    content["counts"]["skipped_files"] = 0
    torch.save(content | {"pending": True}, out / "last.pt")  # as it was saved before the validation
    run(monkeypatch, "--resume", out, "--skip-bad")
    kinds = [(line["step"], line["kind"]) for line in lines(out)]
    assert kinds == [(line["step"], line["kind"]) for line in whole] and len(kinds) == len(set(kinds))


@pytest.mark.pictures
def test_pictures_of_no_photo(half_validation, tmp_path, monkeypatch):
    """Without a validation nothing has read them; with --skip-bad the run ends in order."""
    (half_validation / "val_id.txt").write_text("2")
    monkeypatch.setattr(train, "finish", FINISH)
    flags = [*flags_of(half_validation, tmp_path / "run"), "--validations", 0]
    with pytest.raises(InputError, match="2.jpg: not a readable photo"):
        run(monkeypatch, *flags)
    run(monkeypatch, "--resume", tmp_path / "run", "--skip-bad")
    assert (tmp_path / "run/samples.png").stat().st_size > 0


def test_a_validation_of_nothing_is_refused(half_validation, tmp_path, monkeypatch):
    (half_validation / "val_id.txt").write_text("2")
    with pytest.raises(InputError, match="validation of 'mine': no photo that can be read has a label"):
        run(monkeypatch, *flags_of(half_validation, tmp_path / "run"), "--skip-bad")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["pending"]


def test_a_run_that_ends_at_its_validation_has_saved_the_step_and_goes_on_with_the_validation(
        half_validation, tmp_path, monkeypatch):
    out, photo = tmp_path / "run", half_validation / "images" / "2.jpg"
    with pytest.raises(InputError, match="2.jpg: not a readable photo"):
        run(monkeypatch, *flags_of(half_validation, out))
    last = torch.load(out / "last.pt", weights_only=True)
    assert (last["step"], last["pending"], last["best"]) == (2, True, -1)
    assert [line["kind"] for line in lines(out)] == ["train", "train"]
    photo.write_bytes((half_validation / "images" / "1.jpg").read_bytes())
    run(monkeypatch, *flags_of(half_validation, tmp_path / "whole"))
    monkeypatch.setattr(train, "train_step", None)  # nothing is left to train
    run(monkeypatch, "--resume", out)
    one, two = ([{key: value for key, value in line.items() if key != "time"} for line in lines(folder)]
                for folder in (out, tmp_path / "whole"))
    assert one == two and [line["kind"] for line in one] == ["train", "train", "val"]
    one, two = (torch.load(folder / "last.pt", weights_only=True) for folder in (out, tmp_path / "whole"))
    assert one["best"] == two["best"] > 0 and not one["pending"]
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])


def test_a_validation_that_was_logged_but_not_saved_is_done_again_and_kept_once(tmp_path, monkeypatch):
    """Killed between the line of the log and the second checkpoint of the step."""
    out = tmp_path / "run"
    run(monkeypatch, *SHORT, "--steps", 2, "--validations", 2, "--out", out)
    kinds = lambda log: [(line["step"], line["kind"]) for line in log]
    whole = lines(out)
    content = torch.load(out / "last.pt", weights_only=True) | {"pending": True}
    torch.save(content, out / "last.pt")
    run(monkeypatch, "--resume", out)
    assert kinds(lines(out)) == kinds(whole)
    assert lines(out)[-1]["miou"] == whole[-1]["miou"]


# Batch norm that must stay frozen ---------------------------------------------------------------------------


def test_frozen_batch_norm_stays_frozen_when_it_is_synchronised():
    """SyncBatchNorm is no BatchNorm2d: the first validation, which ends with train(), thawed it."""
    net = model.ParsingNet({"a": 2}, TINY)
    net.backbone.freeze()
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.eval().train()
    kinds = {type(m) for m in net.backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm} and net.encoder.training
    assert not [m for m in net.backbone.modules() if type(m) in kinds and m.training]


def test_a_skipped_step_restores_synchronised_statistics():
    net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.ParsingNet({"a": 2}, TINY)).train()
    norms = StepStatistics(net)
    norms.begin()
    net.backbone.bn1.running_mean.fill_(float("nan"))
    norms.collect()
    norms.finish(1)
    norms.undo()
    assert (net.backbone.bn1.running_mean == 0).all()
