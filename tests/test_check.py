"""train.py --check: what is counted, which pairs of classes touch, and that a bad file stops nothing."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import train
from sst import runs
from sst.check import touching
from sst.data import listing, open_dataset

CLASSES = ["background", "hat", "hair", "face", "shoe"]

# Labels of 4 x 3 pixels. In A and B hat touches hair, and hair face; hat and face meet in B only at corners.
A = [[0, 1, 1, 0],
     [0, 2, 2, 0],
     [0, 3, 3, 0]]
B = [[1, 2, 2, 0],
     [0, 3, 0, 0],
     [255, 255, 255, 0]]
C = [[0, 0, 0, 0],
     [0, 1, 0, 3],
     [0, 0, 0, 0]]
BIG = np.zeros((6, 8), int)


def dataset(root, train, val, **fields):
    """A dataset of its own: {id: label map} of both lists."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for split, labels in (("train", train), ("val", val)):
        for id, label in labels.items():
            label = np.array(label, np.uint8)
            Image.fromarray(np.full((*label.shape, 3), 90, np.uint8)).save(root / "images" / f"{id}.jpg")
            Image.fromarray(label).save(root / "labels" / f"{id}.png")
        (root / f"{split}_id.txt").write_text("\n".join(labels))
    (root / "domain.json").write_text(json.dumps({"name": "mine", "classes": CLASSES} | fields))
    return root


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Run train.py --check: its exit status and what it prints. Tiny label maps never hold every class."""
    def run(*flags, workers=0, accept=True):
        listing.cache_clear()
        flags = [*flags, "--accept"] if accept else flags
        flags = [*flags, "--workers", workers] if workers is not None else flags
        monkeypatch.setattr(sys, "argv", ["train.py", "--check", *map(str, flags)])
        monkeypatch.chdir(tmp_path)  # where check.png goes
        with pytest.raises(SystemExit) as end:
            train.main()
        return end.value.code, capsys.readouterr().out
    return run


def test_a_report_worked_out_by_hand(tmp_path, check):
    pairs = [["hat", "hair"], ["hat", "face"], ["hair", "shoe"]]
    root = dataset(tmp_path / "d", {"a": A, "b": B, "big": BIG}, {"c": C}, adjacency=pairs)
    status, out = check("--data", f"mine={root}")
    # Training pixels: 12 + 12 + 48 = 72, of which 3 are ignored: 6 + 5 + 48 = 59 of 69 are background,
    # 2 + 1 hat, 2 + 2 hair, 2 + 1 face.
    assert status == 0 and out == f"""
mine={root}
  train: 3 listed, 3 usable; 2 sizes from 4x3 to 8x6, median 4x3; 4.17 % of pixels ignored
  val: 1 listed, 1 usable; all 4x3; 0.00 % of pixels ignored
              train: of pixels  of photos    val: of pixels  of photos
  background           85.51 %   100.00 %           83.33 %   100.00 %
  hat                   4.35 %    66.67 %            8.33 %   100.00 %
  hair                  5.80 %    66.67 %                 -          -
  face                  4.35 %    66.67 %            8.33 %   100.00 %
  shoe                       -          -                 -          -
  never in train: shoe
  never in val: hair, shoe
  pairs of classes, and in how many of the training photos that hold both they touch:
  touching but not in M_intra: 1
    hair, face: 2 of 2
  in M_intra but never touching: 2
    hat, face: 0 of 2
    hair, shoe: 0 of 0
  for a domain.json, the 2 pairs that touch in 10% or more of the training photos that hold both:
 "adjacency": [
  ["hat", "hair"], ["hair", "face"]
 ]
  bad files: 0
  looks wrong: 1
    train: domain 'mine': its label maps never hold shoe

picture: check.png

4 photos and their label maps read; none is bad; looks wrong: 1, accepted
"""
    assert check("--data", f"mine={root}", accept=False)[0] == 1


def test_touching_is_side_by_side_or_one_above_the_other():
    found = np.argwhere(np.triu(touching(np.array(B, np.uint8), 5))).tolist()
    assert found == [[0, 1], [0, 2], [0, 3], [1, 2], [2, 3]]
    shares = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    label = np.random.default_rng(0).choice([0, 1, 2, 3, 4, 255], (5, 7), p=shares).astype(np.uint8)
    slow = np.zeros((5, 5), bool)
    for y, x in np.ndindex(5, 7):
        for v, u in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if 0 <= v < 5 and 0 <= u < 7:
                one, two = label[y, x], label[v, u]
                if one != two and 255 not in (one, two):
                    slow[one, two] = True
    assert (touching(label, 5) == slow).all() and slow.any() and not slow.all()


def pasted(out):
    """The adjacency list of a report, as JSON."""
    return json.loads("{" + re.search(r' "adjacency": \[.*?\n \]', out, re.S)[0] + "}")


def test_a_domain_without_adjacency_gets_one_that_can_be_pasted(tmp_path, check):
    # 11 photos hold hat and face, which touch in one: 1/11 is less than 10 %. Of 10 photos it is enough.
    apart = {str(n): C for n in range(10)}
    for count, wanted in ((9, [["hat", "hair"], ["hat", "face"], ["hair", "face"]]),
                          (10, [["hat", "hair"], ["hair", "face"]])):
        photos = {"a": [[1, 3]], "b": [[1, 2, 3]]} | dict(list(apart.items())[:count - 1])
        root = dataset(tmp_path / str(count), photos, {"c": C})
        status, out = check("--data", f"mine={root}")
        assert status == 0
        assert ("domain 'mine' has no adjacency (M_intra): give it the list below, or train with "
                "--intra-mask none") in out
        fields = json.loads((root / "domain.json").read_text())
        (root / "domain.json").write_text(json.dumps(fields | pasted(out)))
        assert pasted(out) == {"adjacency": wanted}
        assert open_dataset("mine", root).domain.intra_mask().sum() == 5 + 2 * len(wanted)
        assert "touching but not in M_intra: " + str(3 - len(wanted)) in check("--data", f"mine={root}")[1]


def test_pairs_that_touch_often_come_first(tmp_path, check):
    # Hat and face touch in 2 of 30 photos, hat and hair in 1 of 1.
    photos = {str(n): [[1, 3]] if n < 2 else C for n in range(30)} | {"x": [[1, 2]]}
    root = dataset(tmp_path / "d", photos, {"c": C}, adjacency=[])
    out = check("--data", f"mine={root}")[1]
    assert "touching but not in M_intra: 2\n    hat, hair: 1 of 1\n    hat, face: 2 of 30\n" in out


def test_nothing_touches(tmp_path, check):
    root = dataset(tmp_path / "d", {"a": C}, {"c": C})
    assert pasted(check("--data", f"mine={root}")[1]) == {"adjacency": []}


def test_every_bad_file_is_named_and_the_others_are_counted(tmp_path, check):
    noise = np.random.default_rng(0).integers(0, 5, (40, 40))
    ids = ("cut", "text", "rgb", "class9", "small", "nophoto", "nolabel", "good")
    root = dataset(tmp_path / "d", {id: noise for id in ids}, {"c": C})
    whole = (root / "images/cut.jpg").read_bytes()
    (root / "images/cut.jpg").write_bytes(whole[:len(whole) // 2])
    (root / "images/text.jpg").write_text("no photo")
    Image.new("RGB", (40, 40)).save(root / "labels/rgb.png")
    Image.new("L", (40, 40), 9).save(root / "labels/class9.png")
    Image.new("L", (4, 4)).save(root / "labels/small.png")
    (root / "images/nophoto.jpg").unlink()
    (root / "labels/nolabel.png").unlink()
    (root / "val_id.txt").write_text("c\ngone")
    status, out = check("--data", f"mine={root}")
    assert status == 1 and out.endswith("\n7 photos and their label maps read; bad: 8, named above\n")
    assert "train: 8 listed, 1 usable; all 40x40" in out and "val: 2 listed, 1 usable" in out
    sentences = out[out.index("  bad files: 8\n"):].splitlines()[1:9]
    parts = ("id 'nophoto' has no photo", "id 'nolabel' has no label map", "cut.jpg: not a readable photo (",
             "text.jpg: not a readable photo (", "rgb.png: a label map of colour mode RGB",
             "class9.png: class id 9 found; domain 'mine' has ids 0 to 4",
             "small.png: the label map is 4x4 but its photo", "id 'gone' has no photo")
    for sentence, part in zip(sentences, parts, strict=True):
        assert part in sentence


def test_many_bad_files_are_counted(tmp_path, check):
    root = dataset(tmp_path / "d", {f"{n:02}": [[9]] for n in range(25)}, {"c": C})
    status, out = check("--data", f"mine={root}")
    assert status == 1 and "bad files: 25\n" in out and "19.png" in out and "20.png" not in out
    assert "    and 5 more\n" in out


def test_a_decoder_that_fails_in_an_unforeseen_way_stops_nothing(tmp_path, check, monkeypatch):
    from sst import data
    read = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, size=None: read(path) if path.stem != "a" else 1 / 0)
    status, out = check("--data", f"mine={dataset(tmp_path / 'd', {'a': A, 'b': B}, {'c': C})}")
    assert status == 1
    assert ("a.jpg: this photo or its label map is not readable (ZeroDivisionError: division by zero); "
            "replace") in out
    assert "train: 2 listed, 1 usable" in out


def test_lists_that_overlap_repeat_or_cannot_be_opened(tmp_path, check):
    root = dataset(tmp_path / "d", {"a": A, "b": B}, {"c": C})
    (root / "train_id.txt").write_text("a\nb\nc\na")
    status, out = check("--data", f"mine={root}")
    assert status == 0 and "train: 4 listed, 4 usable" in out
    assert f"more than once in the train list: 1\n    {root}/images/a.jpg\n" in out
    assert f"in both lists, so that validation scores are too high: 1\n    {root}/images/c.jpg\n" in out
    (root / "val_id.txt").unlink()
    status, out = check("--data", f"mine={root}", f"other={tmp_path / 'nowhere'}")
    assert status == 1 and "train: 4 listed" in out and "val:" not in out
    assert "val_id.txt: the list of ids is not readable (" in out
    assert f"other={tmp_path / 'nowhere'}\n  bad files: 1\n    unknown label domain 'other'" in out


def test_both_lists_of_source_and_target(tmp_path, check):
    source = dataset(tmp_path / "s", {"a": A}, {"c": C}, adjacency=[["hat", "hair"]])
    target = dataset(tmp_path / "t", {"a": A, "b": B}, {"c": C}, adjacency=[])
    status, out = check("--mode", "dedicated", "--source", f"one={source}", "--target", f"two={target}",
                        "--fraction", 0.5)
    assert status == 0 and out.index(f"one={source}\n  train: 1") < out.index(f"two={target}\n  train: 2")
    assert "5 photos and" in out


def test_the_figures_whatever_the_number_of_processes(tmp_path, check, monkeypatch):
    monkeypatch.setattr(train.Figures, "__len__", lambda self: 5)
    monkeypatch.chdir(tmp_path)
    status, out = check("--size", "48x40", workers=0)
    assert status == 0 and out.count("train: 5 listed, 5 usable; all 40x48; 0.00 % of pixels ignored") == 3
    titles = [line for line in out.splitlines() if "figures" in line]
    assert titles == ["pascal, figures", "atr, figures", "cihp, figures"]
    assert out == check("--size", "48x40", workers=1)[1] == check("--size", "48x40", workers=None)[1]
    assert check("--mode", "dedicated", "--size", "48x40")[1].count("figures") == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "check.png"], "no run's folder is made"


def test_bad_files_whatever_the_number_of_processes(tmp_path, check):
    root = dataset(tmp_path / "d", {str(n): [[n % 7]] for n in range(30)}, {"c": C})
    one, two = (check("--data", f"mine={root}", workers=n) for n in (1, 2))
    assert one == two and one[0] == 1
    assert "bad files: 8\n" in one[1], "classes 5 and 6, of 0 to 6: four times each"


def test_a_run_knows_nothing_of_the_flag():
    assert runs.configure([]).check is None and runs.configure([]).workers == 1
