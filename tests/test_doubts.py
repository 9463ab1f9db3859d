"""What looks right in label maps and is wrong is said by --check, by training and by evaluation."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from figures import Figures
from sst.check import Tally
from sst.checkpoint import model_content, save
from sst.data import listing, open_dataset
from sst.domains import builtin_domain
from sst.doubts import doubts, exchanged
from sst.errors import InputError, InputWarning
from sst.model import ParsingNet

PERSON = ["background", "person"]


def folder(root, labels, classes, **fields):
    """A dataset of its own, the same photos in both lists."""
    listing.cache_clear()
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for n, label in enumerate(labels):
        Image.fromarray(np.full((*label.shape, 3), 90, np.uint8)).save(root / f"images/{n}.png")
        Image.fromarray(label).save(root / f"labels/{n}.png")
    for split in ("train", "val"):
        (root / f"{split}_id.txt").write_text("\n".join(map(str, range(len(labels)))))
    (root / "domain.json").write_text(json.dumps({"name": "mine", "classes": classes} | fields))
    return root


@pytest.fixture
def masks():
    """Two masks of 0 and 255, as many tools write them."""
    mask = np.zeros((64, 64), np.uint8)
    mask[10:60, 20:40] = 255
    return [mask, mask.T.copy()]


def check(monkeypatch, capsys, root, *flags):
    monkeypatch.chdir(root)  # where check.png goes
    data = ["--data", f"mine={root}", *flags]
    monkeypatch.setattr(sys, "argv", ["train.py", "--check", "--workers", "0", *data])
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code, capsys.readouterr().out


def test_a_mask_of_0_and_255_looks_wrong_until_255_is_mapped(tmp_path, masks, monkeypatch, capsys):
    root = folder(tmp_path, masks, PERSON)
    status, printed = check(monkeypatch, capsys, root)
    assert status == 1 and "hold one class alone, 'background'" in printed
    assert printed.endswith("none is bad; looks wrong: 2, named above; if that is right, give --accept\n")
    assert check(monkeypatch, capsys, root, "--accept")[0] == 0
    assert np.array(Image.open(root / "check.png")).std() > 10, "a picture of both lists"
    folder(tmp_path, masks, PERSON, label_map={"background": [0], "person": [255]})
    assert check(monkeypatch, capsys, root)[0] == 0


def test_training_and_evaluation_say_it_too(tmp_path, masks, monkeypatch):
    root, out = folder(tmp_path / "data", masks, PERSON), tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [
        "train.py", "--preset", "small", "--data", f"mine={root}", "--size", "64x64", "--crop", "64x64",
        "--beta", "0", "--steps", "1", "--batch-size", "2", "--workers", "0", "--validations", "0",
        "--out", str(out)])
    with pytest.warns(InputWarning, match="'mine': its label maps hold one class alone, 'background'"):
        train.main()
    with pytest.warns(InputWarning, match="'mine': its label maps hold one class alone, 'background'"):
        evaluate.main([str(out), "--data", f"mine={root}"])


def test_a_list_whose_labels_are_nearly_all_ignored(tmp_path):
    label = np.full((20, 20), 255, np.uint8)
    label[0, 0], label[0, 1] = 0, 1
    (said,) = doubts(open_dataset("mine", folder(tmp_path, [label], PERSON)), training=True)
    assert said.startswith("domain 'mine': 100% of the pixels of its label maps are ignored (255); if 255")


def test_a_class_that_no_training_label_holds(tmp_path):
    label = np.array([[0, 1], [1, 0]], np.uint8)
    data = open_dataset("mine", folder(tmp_path, [label] * 3, [*PERSON, "hat"]))
    assert doubts(data, training=True) == ["domain 'mine': its label maps never hold hat"]
    assert doubts(data, training=True, most=2) == ["domain 'mine': 2 of its 3 label maps never hold hat"]
    assert doubts(data, training=False) == [], "a validation list may be without some"


def test_a_broken_label_map_is_left_to_training(tmp_path):
    root = folder(tmp_path, [np.array([[0, 1], [1, 0]], np.uint8)] * 2, PERSON)
    (root / "labels/1.png").write_text("none")
    assert doubts(open_dataset("mine", root), training=True) == []


def test_figures_raise_no_doubt():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doubts(Figures(builtin_domain("atr"), 0, 3, (64, 64)), training=True) == []


# Ids that are exchanged -------------------------------------------------------------------------------------


class Exchanged:
    """Figures whose label maps have pairs of ids the other way round."""

    def __init__(self, name, pairs, count=40):
        self.figures, self.count = Figures(builtin_domain(name), 0, 100, (96, 96)), count
        self.domain, self.table = self.figures.domain, np.arange(256, dtype=np.uint8)
        for a, b in pairs:
            self.table[[a, b]] = self.table[[b, a]]

    def __len__(self):
        return self.count

    def where(self, i):
        return str(i)

    def load(self, i, size=None):
        image, label = self.figures.load(i)
        return image, self.table[label]


def found(name, pairs, count=40):
    tally = Tally(Exchanged(name, pairs, count))
    tally.read(name, workers=0)
    return exchanged(tally.dataset.domain, tally)


@pytest.mark.parametrize("name", ["pascal", "atr", "cihp"])
@pytest.mark.parametrize("count", [12, 40])
def test_right_labels_raise_no_doubt(name, count):
    assert found(name, [], count) == []


def test_arms_and_legs_of_another_export():
    legs, arms = found("pascal", [(3, 4), (5, 6)])
    assert legs.startswith("ids 5 and 6 may be exchanged: torso touches lower legs in 100% of the photos "
                           "that hold both, and upper legs in 0%")
    assert arms.startswith("ids 3 and 4 may be exchanged: torso touches lower arms in ")
    proposal = json.loads(arms.split('"label_map": ')[1])
    assert proposal == {"background": [0], "head": [1], "torso": [2], "upper arms": [4], "lower arms": [3],
                        "upper legs": [6], "lower legs": [5]}


@pytest.mark.parametrize("pairs", [[(9, 12)], [(16, 18)], [(14, 16), (15, 17)]])
def test_other_exchanges(pairs):
    said = found("cihp", pairs, count=100)
    assert {tuple(map(int, sentence.split()[1:4:2])) for sentence in said} == set(pairs)
    moved = json.loads(said[-1].split('"label_map": ')[1])
    names = builtin_domain("cihp").classes
    for a, b in pairs:
        assert moved[names[a]] == [b] and moved[names[b]] == [a]


def test_check_says_it(tmp_path, monkeypatch, capsys):
    data = Exchanged("pascal", [(5, 6)])
    folder(tmp_path, [data.load(i)[1] for i in range(40)], list(data.domain.classes),
           adjacency=[list(pair) for pair in data.domain.adjacency])
    status, printed = check(monkeypatch, capsys, tmp_path)
    assert status == 1 and "looks wrong: 1\n    ids 5 and 6 may be exchanged" in printed


def test_names_without_a_word_vector(tmp_path, monkeypatch, capsys):
    label = np.array([[0, 1], [1, 0]], np.uint8)
    root = folder(tmp_path / "a", [label], ["background", "Hut"])
    assert check(monkeypatch, capsys, root)[0] == 0, "alone it needs none"
    status, printed = check(monkeypatch, capsys, root, f"other={folder(tmp_path / 'b', [label], PERSON)}")
    assert status == 1
    assert 'no word vector: Hut; several domains need one: give the domain "aliases"' in printed
    assert check(monkeypatch, capsys, root, f"other={tmp_path / 'b'}", "--lam", "0")[0] == 0


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    root = folder(tmp_path / "a", [np.array([[0, 1], [1, 0]], np.uint8)], PERSON)
    (tmp_path / "file").write_text("")
    flags = ["--check", "--workers", "0", "--data", f"mine={root}", "--out", str(tmp_path / "file")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(InputError, match="file/check.png: cannot be written .*; give a folder of yours"):
        train.main()


def test_a_network_may_be_evaluated_on_what_raises_no_doubt(tmp_path, recwarn):
    label = np.array([[0, 1] * 8, [1, 0] * 8] * 8, np.uint8)
    root = folder(tmp_path, [label], PERSON)
    data = open_dataset("mine", root)
    torch.manual_seed(0)
    save(model_content(ParsingNet([data.domain], "small"), [data.domain], (32, 32)), tmp_path / "model.pt")
    evaluate.main([str(tmp_path), "--data", f"mine={root}"])
    assert not [w for w in recwarn if issubclass(w.category, InputWarning)]
