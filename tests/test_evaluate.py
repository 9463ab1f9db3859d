"""evaluate.py: scores, maps of classes and several processes, against numbers worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_inference import LIMBS, Stub

import evaluate
import train
from figures import Figures
from sst import checkpoint
from sst.distributed import Interruption, Place
from sst.domains import LabelDomain, builtin_domain, read_class_map
from sst.errors import InputError, InputWarning
from sst.inference import photo_labels
from sst.metrics import confusion, mapped, scores
from sst.model import Arch, ParsingNet
from sst.plots import is_confusion, save_confusion

ROOT = Path(__file__).parent.parent
TINY = Arch(blocks=(1, 1, 1, 1), width=8, dim=32, heads=2, layers=1, ffn=32, window=4)


# Metrics ----------------------------------------------------------------------------------------------------


def test_a_matrix_of_a_head_with_other_classes_by_hand():
    label = np.array([[0, 1, 1], [1, 255, 0]])
    prediction = np.array([[0, 2, 3], [2, 3, 1]])
    # truth 0: predicted 0 and 1. truth 1: twice 2, once 3. The ignored pixel counts nowhere.
    matrix = confusion(prediction, label, 2, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 0, 2, 1]]
    # Head classes 0 and 1 are both the data's 0, 2 is its 1, and 3 is no class (2).
    assert mapped(matrix, np.array([0, 0, 1, 2])).tolist() == [[2, 0, 0], [0, 2, 1]]


def test_no_class_is_a_wrong_prediction_by_hand():
    # truth 0: 2 hits. truth 1: one pixel as 0, 2 hits, one as no class.
    # IoU 2/(2+3-2) and 2/(4+2-2), recall 2/2 and 2/4.
    result = scores(np.array([[2, 0, 0], [1, 2, 1]]))
    assert result["iou"] == pytest.approx([200 / 3, 50]) and result["accuracy"] == pytest.approx([100, 50])
    assert result["miou"] == pytest.approx(350 / 6) and result["mean_accuracy"] == pytest.approx(75)


def test_classes_left_out_count_in_no_mean_but_their_pixels_stay():
    # Class 2 is left out. Its pixel predicted 0 is still a false positive of class 0: IoU 3/(3+4-3) = 75.
    result = scores(np.array([[3, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]), left_out=[2])
    assert result["iou"][:2] == pytest.approx([75, 50]) and np.isnan(result["iou"][2])
    assert np.isnan(result["accuracy"][2])
    assert result["miou"] == pytest.approx(62.5) and result["mean_accuracy"] == pytest.approx(75)
    assert result["absent"] == []


# Whole evaluations ------------------------------------------------------------------------------------------

COARSE = {"name": "coarse", "classes": ["background", "person", "bag"]}
TO_COARSE = {"background": "background", "left arm": "person", "right arm": None}


def write(root):
    """Two datasets over one folder of photos whose colours say what Stub will predict; they share photo a."""
    for folder in ("images", "limbs", "coarse"):
        (root / folder).mkdir()
    paints = {"a": [[0, 1], [1, 2]], "b": [[2, 2, 0, 1]], "c": [[0, 0, 1, 2]]}
    labels = {"limbs": {"a": [[0, 1], [2, 2]], "b": [[2, 1, 255, 1]]},
              "coarse": {"c": [[0, 1, 1, 1]], "a": [[0, 1], [1, 2]]}}
    for id, paint in paints.items():
        Image.fromarray(255 * np.eye(3, dtype=np.uint8)[np.array(paint)]).save(root / "images" / f"{id}.png")
    for name, maps in labels.items():
        for id, label in maps.items():
            Image.fromarray(np.array(label, np.uint8)).save(root / name / f"{id}.png")
        (root / f"{name}.txt").write_text("\n".join(maps))
    for fields in (LIMBS.to_dict(), COARSE):
        name = fields["name"]
        (root / f"{name}.json").write_text(json.dumps(fields | {"labels": name, "val": f"{name}.txt"}))
    (root / "map.json").write_text(json.dumps(TO_COARSE))


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A Stub with a head for limbs, read from any checkpoint; the datasets lie in tmp_path."""
    net = Stub()
    monkeypatch.setattr(checkpoint, "load_model", lambda path: (net, [LIMBS]))
    write(tmp_path)
    return net


def run(*flags):
    evaluate.main([*map(str, flags)])


def test_two_datasets_by_one_head_worked_out_by_hand(net, tmp_path, capsys):
    flags = [tmp_path, "--data", f"limbs={tmp_path / 'limbs.json'}", f"coarse={tmp_path / 'coarse.json'}",
             "--as", f"coarse:limbs={tmp_path / 'map.json'}"]
    run(*flags, "--json")
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert list(result) == ["limbs", "coarse via limbs"]
    # limbs, truth x predicted: 1 0 0 / 0 2 1 / 0 1 2; IoU 1, 2/4, 2/4, recall 1, 2/3, 2/3.
    assert result["limbs"]["iou"] == pytest.approx({"background": 100, "left arm": 50, "right arm": 50})
    assert result["limbs"]["miou"] == pytest.approx(200 / 3)
    assert result["limbs"]["mean_accuracy"] == pytest.approx(700 / 9)
    # coarse x limbs: 2 0 0 / 1 3 1 / 0 0 1; right arm is no class: IoU 2/(2+3-2), 3/(5+3-3), recall 1, 3/5.
    iou = result["coarse via limbs"]["iou"]
    assert iou.pop("bag") is None and iou == pytest.approx({"background": 200 / 3, "person": 60})
    assert result["coarse via limbs"]["miou"] == pytest.approx(190 / 3)
    assert result["coarse via limbs"]["mean_accuracy"] == pytest.approx(80)
    assert net.sizes == [(2, 2), (1, 4), (1, 4)], "the shared photo goes through the network once"
    assert f"reading {tmp_path / 'model.pt'}" in printed.err and "photos at their own size" in printed.err
    assert "limbs: 2 photos on the val list" in printed.err and "3 different photos" in printed.err
    assert "photo 3/3" in printed.err
    assert "0:00:00 left" in printed.err

    run(*flags, "--out", tmp_path / "new" / "pictures")
    printed = capsys.readouterr().out
    assert "coarse via limbs: mIoU 63.33 %, mean accuracy 80.00 %, 8 labelled pixels\n" in printed
    assert "the means are without bag: no class of limbs's head is mapped to it" in printed
    assert ["person", "60.00", "60.00"] in [line.split() for line in printed.splitlines()]
    pictures = {path.name for path in (tmp_path / "new" / "pictures").iterdir()}
    assert pictures == {"confusion.limbs.png", "confusion.coarse.via.limbs.png"}


def test_a_dataset_with_a_head_of_its_own_is_scored_by_both(tmp_path, capsys, monkeypatch):
    net = Stub(heads=("limbs", "coarse"))
    write(tmp_path)
    domains = [LIMBS, LabelDomain("coarse", tuple(COARSE["classes"]))]
    monkeypatch.setattr(checkpoint, "load_model", lambda path: (net, domains))
    run(tmp_path, "--json", "--data", f"coarse={tmp_path / 'coarse.json'}",
        "--as", f"coarse:limbs={tmp_path / 'map.json'}")
    result = json.loads(capsys.readouterr().out)
    # By its own head, 2 0 0 / 1 3 1 / 0 0 1: bag is a class, IoU 1/(1+2-1).
    assert result["coarse"]["iou"] == pytest.approx({"background": 200 / 3, "person": 60, "bag": 50})
    assert result["coarse via limbs"]["miou"] == pytest.approx(190 / 3) and net.sizes == [(1, 4), (2, 2)]


def test_absent_classes_are_null_and_named(net, tmp_path, capsys):
    Image.fromarray(np.array([[0, 0], [255, 255]], np.uint8)).save(tmp_path / "limbs" / "a.png")
    (tmp_path / "limbs.txt").write_text("a")
    flags = [tmp_path, "--data", f"limbs={tmp_path / 'limbs.json'}"]
    run(*flags, "--json")
    result = json.loads(capsys.readouterr().out)["limbs"]
    # One background pixel was seen, the other taken for a left arm; of right arms there is nothing.
    assert result == {"miou": 25, "mean_accuracy": 50,
                      "iou": {"background": 50, "left arm": 0, "right arm": None}}
    run(*flags)  # over its own pictures
    assert "the means are without right arm: in no label and no prediction" in capsys.readouterr().out


def test_the_size_is_the_runs_or_the_flags(net, tmp_path, capsys):
    net.photos = {"size": (6, 8)}
    flags = [tmp_path, "--data", f"limbs={tmp_path / 'limbs.json'}"]
    run(*flags)
    run(*flags, "--size", "4x4", "--scales", "0.5", "1")
    assert net.sizes == [(6, 8), (6, 8), (2, 2), (4, 4), (2, 2), (4, 4)]
    printed = capsys.readouterr().out
    assert "fitted into 6x8 (as in training)\n" in printed
    assert "fitted into 4x4 (--size), times 0.5, 1; mean of logits\n" in printed


@pytest.mark.parametrize("flags, wanted", [
    ([], ([1], None, "logits")),
    (["--published"], ([0.5, 0.75, 1, 1.25, 1.5, 1.75], [0, 2, 1], "logits")),
    (["--flip", "--average", "probabilities"], ([1], [0, 2, 1], "probabilities")),
    (["--scales", "1", "2"], ([1, 2], None, "logits")),
], ids=str)
def test_flags_of_averaging(net, tmp_path, monkeypatch, flags, wanted):
    seen = []

    def spy(net, image, size, domains, scales, flips, average):
        seen.append((scales, flips and flips["limbs"].tolist(), average))
        return photo_labels(net, image, size, domains, scales, flips, average)

    monkeypatch.setattr(evaluate, "photo_labels", spy)
    run(tmp_path, "--data", f"limbs={tmp_path / 'limbs.json'}", *flags)
    assert seen == [wanted] * 2


def test_without_data_the_figures_are_scored_as_training_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Figures, "__len__", lambda self: 4)
    domains = [builtin_domain(name) for name in ("atr", "pascal")]
    torch.manual_seed(0)
    net = ParsingNet(domains, TINY).eval()
    checkpoint.save(checkpoint.model_content(net, domains, (64, 64)), tmp_path / "model.pt")
    run(tmp_path, "--json")
    result = json.loads(capsys.readouterr().out)
    figures = [Figures(d, 2 ** 31, 80, (64, 64)) for d in domains]
    place = Place(0, 1, torch.device("cpu"))
    validation = train.validate(net, figures, (64, 64), place, None, Interruption())
    means = lambda scored: {name: (r["miou"], r["mean_accuracy"]) for name, r in scored.items()}
    assert means(result) == means(validation)
    assert result["pascal"]["iou"]["head"] == validation["pascal"]["iou"][1]
    run(tmp_path, "--json", "--data", "atr=figures")
    only, log = capsys.readouterr()
    assert json.loads(only) == {"atr": result["atr"]} and "atr: 4 figures on the val list" in log


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path, capsys):
    """Five photos, so that the processes have unequal shares; torchrun starts the script as a user would."""
    domain = builtin_domain("pascal")
    for folder in ("JPEGImages", "SegmentationPart", "list"):
        (tmp_path / folder).mkdir()
    drawn = Figures(domain, 5, 5, (48, 40))
    for i in range(5):
        for pixels, place in zip(drawn.load(i), ("JPEGImages", "SegmentationPart")):
            Image.fromarray(pixels).save(tmp_path / place / f"{i}.png")
    (tmp_path / "list" / "val_id.txt").write_text("0\n1\n2\n3\n4\n")
    torch.manual_seed(0)
    net = ParsingNet([domain], TINY)
    checkpoint.save(checkpoint.model_content(net, [domain], None), tmp_path / "model.pt")
    flags = [str(tmp_path / "model.pt"), "--data", f"pascal={tmp_path}", "--scales", "1", "1.5", "--flip",
             "--json"]
    evaluate.main(flags)
    one = capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(ROOT / "evaluate.py"), *flags], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "9,600 labelled pixels" in done.stderr, "5 photos of 48 x 40 pixels, each once"
    assert done.stdout == one and "photo 5/5" in done.stderr and "2 processes" in done.stderr
    assert 0 < json.loads(one)["pascal"]["miou"] < 100


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--data", "coarse=coarse.json"],
     "--data coarse: model.pt has no head for it; its label domains are limbs, whose heads can score it "
     "through a map of classes: --as coarse:limbs=MAP.json"),
    (["--data", "limbs=renamed.json"], "--data limbs: class 2 is wing there and right arm in model.pt"),
    (["--data", "limbs=longer.json"], "--data limbs: class 3 is wing there and absent in model.pt"),
    (["--data", "limbs=limbs.json", "limbs=coarse.json"], "label domain 'limbs' is given twice"),
    (["--data", "limbs=limbs.json", "--data", "limbs=coarse.json"], "label domain 'limbs' is given twice"),
    (["--data", "limbs=limbs.json", "--split", "train"], "train_id.txt: the list of ids is not readable"),
    (["--data", "pascal=figures", "--split", "train"],
     "--split train: the built-in figures (pascal) have only a val list"),
    (["--data", "limbs=figures"], "unknown label domain 'limbs'; built in are"),
    ([], "model.pt: its label domains (limbs) are none of the built-in figures' (pascal, atr, cihp); give "
         "--data NAME=PATH"),
    (["--published", "--flip"], "--published beside --flip"),
    (["--published", "--average", "probabilities"], "--published beside --flip"),
    (["--scales", "1", "nan"], "--scales 1 nan: factors lie between 0.05 and 20"),
    (["--data", "coarse=coarse.json", "--as", "coarse=map.json"],
     "--as coarse=map.json: write DATA:HEAD=MAP.json"),
    (["--data", "coarse=coarse.json", "--as", "limbs:limbs=map.json"],
     "write DATA:HEAD=MAP.json with two different"),
    (["--data", "limbs=limbs.json", "--as", "coarse:limbs=map.json"],
     "'coarse' is not among the datasets (limbs); give --data coarse=PATH"),
    (["--data", "coarse=coarse.json", "--as", "coarse:cihp=map.json"],
     "model.pt has no head 'cihp'; its label domains are limbs"),
    (["--data", "coarse=coarse.json", "--as", "coarse:limbs=map.json", "coarse:limbs=map.json"],
     "coarse:limbs has a map already"),
    (["--data", "coarse=coarse.json", "--as", "coarse:limbs=none.json"], "none.json: not readable as JSON ("),
    (["--data", "limbs=limbs.json", "--out", "map.json/x"],
     "--out map.json/x: cannot be made (Not a directory)"),
], ids=str)
def test_one_sentence_for_what_cannot_be_scored(net, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    changed = {"renamed": ["background", "left arm", "wing"], "longer": [*LIMBS.classes, "wing"]}
    for name, classes in changed.items():
        fields = {"name": "limbs", "classes": classes, "labels": "limbs", "val": "limbs.txt"}
        Path(f"{name}.json").write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        run("model.pt", *flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path().glob("confusion*")) and not net.sizes


@pytest.mark.parametrize("change, message", [
    ([1, 2], "map.json: found list; write one JSON object that gives every class of limbs a class of coarse"),
    ({"left arm": "person", "right arm": None},
     "map.json: lacks 'background'; every class of limbs needs a class of coarse, or null"),
    (TO_COARSE | {"tail": None},
     "map.json: maps 'tail', which is no class of limbs; classes are background, left arm, right arm"),
    (TO_COARSE | {"left arm": "arm"},
     "map.json: maps 'left arm' to 'arm', which is no class of coarse; "
     "use null or one of background, person, bag"),
    (TO_COARSE | {"left arm": 1}, "map.json: maps 'left arm' to 1, which is no class of coarse"),
], ids=str)
def test_one_sentence_for_a_map_that_maps_nothing(tmp_path, change, message):
    (tmp_path / "map.json").write_text(json.dumps(change))
    with pytest.raises(InputError) as caught:
        read_class_map(tmp_path / "map.json", LIMBS, LabelDomain("coarse", tuple(COARSE["classes"])))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_map_by_hand(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps(TO_COARSE))
    coarse = LabelDomain("coarse", tuple(COARSE["classes"]))
    assert read_class_map(tmp_path / "map.json", LIMBS, coarse).tolist() == [0, 1, 3]


def test_a_file_of_others_is_not_overwritten(net, tmp_path):
    picture = tmp_path / "confusion.limbs.png"
    Image.new("RGB", (2, 2)).save(picture)
    before = picture.read_bytes()
    message = "confusion.limbs.png: a file that evaluate.py did not write is in the picture's place; move it"
    with pytest.raises(InputError, match=message):
        run(tmp_path, "--data", f"limbs={tmp_path / 'limbs.json'}")
    assert picture.read_bytes() == before


def test_the_picture_shows_percentages_of_each_true_class(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    shown, imshow = [], Axes.imshow

    def spy(axis, values, **style):
        shown.append((axis, values))
        return imshow(axis, values, **style)

    monkeypatch.setattr(Axes, "imshow", spy)
    matrix = np.array([[1, 3, 0], [0, 0, 0]])
    save_confusion(matrix, ["a", "b"], ["x", "y", "z"], "title", tmp_path / "picture.png")
    (axis, values), = shown
    assert values.tolist() == [[25, 75, 0], [0, 0, 0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b (in no label)"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    assert {(text.get_text(), text.get_position()) for text in axis.texts} == {("25", (0, 0)), ("75", (1, 0))}
    assert is_confusion(tmp_path / "picture.png") and not is_confusion(__file__)


def test_checkpoints_and_settings_that_cannot_be_used(tmp_path):
    net = ParsingNet([LIMBS], TINY)
    checkpoint.save(checkpoint.model_content(net, [LIMBS], None) | {"optimizer": {}}, tmp_path / "last.pt")
    message = "last.pt: a run to resume, with SST and optimizer; give the model.pt or best.pt beside it"
    with pytest.raises(InputError, match=message):
        run(tmp_path / "last.pt")
    with pytest.raises(InputError, match="model.pt: no such file"):
        run(tmp_path)
    old = checkpoint.model_content(net, [LIMBS], None)
    del old["photos"]
    checkpoint.save(old, tmp_path / "best.pt")
    for text in ('{"size": 7}', "{", "{}"):
        (tmp_path / "config.json").write_text(text)
        with (pytest.raises(InputError, match="config.json: not the settings of a run"),
              pytest.warns(InputWarning, match="as an earlier version wrote it; .*config.json is taken")):
            run(tmp_path / "best.pt")
    with pytest.warns(InputWarning, match="best.pt: does not say the size .* nor does a config.json beside"):
        assert checkpoint.trained_size(net, tmp_path / "elsewhere" / "best.pt") is None


def test_the_sentence_is_all_that_a_user_sees(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "model.pt", "--json"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    wanted = "evaluate.py: model.pt: no such file; give a model.pt or best.pt that train.py wrote\n"
    assert done.stderr == wanted
