"""predict.py: label maps at the photo's size, files that overwrite no other, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import sst
from sst.checkpoint import model_content, save
from sst.domains import LabelDomain, builtin_domain, numbering
from sst.errors import InputError
from sst.export import export
from sst.files import pixels
from sst.model import Arch, ParsingNet
from sst.plots import colour_table, overlay

ROOT = Path(__file__).parent.parent
TINY = Arch(blocks=(1, 1, 1, 1), width=8, dim=64, heads=2, layers=1, ffn=32, window=4)
DOMAINS = [builtin_domain("pascal"), LabelDomain("mine", ("background", "hat", "shoe"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model.pt of random weights whose predictions hold several classes."""
    torch.manual_seed(0)
    net = ParsingNet(DOMAINS, TINY)
    for head in net.heads.values():
        torch.nn.init.normal_(head.weight)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save(model_content(net, DOMAINS, None), path)
    return path


def photo(h, w, seed=0):
    """Coloured spots, (h, w, 3) uint8."""
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.array(Image.fromarray(spots).resize((w, h), Image.Resampling.BICUBIC))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    predict.main()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def results(*names):
    endings = (".all.jpg", ".mine.overlay.jpg", ".mine.png", ".pascal.overlay.jpg", ".pascal.png")
    return sorted(f"{name}{ending}" for name in names for ending in endings)


# The command ------------------------------------------------------------------------------------------------


def test_a_folder_is_mirrored_and_every_photo_gets_its_files(model, tmp_path, monkeypatch, capsys):
    photos, out = tmp_path / "photos", tmp_path / "new" / "out"
    (photos / "sub").mkdir(parents=True)
    Image.fromarray(photo(40, 60, 1)).save(photos / "a.png")
    Image.fromarray(photo(50, 30, 2)).save(photos / "sub" / "a.1.JPG")
    (photos / "notes.txt").write_text("no photo by its ending")
    (photos / "._a.png").write_text("no photo, what a Mac leaves on foreign disks")
    run(monkeypatch, model, photos, "--out", out)
    assert files(out) == results("a", "sub/a.1")
    printed = capsys.readouterr().out
    assert "photos keep their size, up to 1024 pixels" in printed and "1/2  " in printed
    assert "2/2  " in printed
    parser = sst.load(model)
    for name, source, size in (("a", "a.png", (60, 40)), ("sub/a.1", "sub/a.1.JPG", (30, 50))):
        for domain, mask in parser(photos / source).items():
            with Image.open(f"{out}/{name}.{domain}.png") as image:
                assert image.mode == "P" and image.size == size and (np.array(image) == mask).all()
                colours = np.array(image.convert("RGB"))
            assert (colours == parser.domains[domain].palette()[mask]).all()


def test_a_mask_for_every_class_and_what_was_found(model, tmp_path, monkeypatch):
    Image.fromarray(photo(40, 48)).save(tmp_path / "a.png")
    run(monkeypatch, model, tmp_path / "a.png", "--out", tmp_path / "out", "--masks", "--json")
    found = json.loads((tmp_path / "out/a.json").read_text())
    for name, domain in sst.load(model).domains.items():
        label = np.array(Image.open(tmp_path / f"out/a.{name}.png"))
        assert [entry["id"] for entry in found[name]] == np.unique(label).tolist() and len(found[name]) > 1
        for entry in found[name]:
            k, (left, top, right, bottom) = entry["id"], entry["box"]
            assert entry["class"] == domain.classes[k]
            assert entry["share"] == pytest.approx((label == k).mean(), abs=1e-6)
            inside = label[top:bottom, left:right] == k
            assert inside.sum() == (label == k).sum() and inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
            mask = np.array(Image.open(tmp_path / f"out/a.{name}.{predict.filename(domain, k)}.png"))
            assert (mask == 255 * (label == k)).all()
    assert len(files(tmp_path / "out")) == 6 + sum(map(len, found.values()))
    with pytest.raises(InputError, match="would replace the given photo a.mine.1-hat.png"):
        os.rename(tmp_path / "a.png", tmp_path / "out/a.png")
        (tmp_path / "out/a.mine.1-hat.png").write_bytes((tmp_path / "out/a.png").read_bytes())
        run(monkeypatch, model, tmp_path / "out/a.png", tmp_path / "out/a.mine.1-hat.png", "--out",
            tmp_path / "out")


def test_classes_numbered_as_elsewhere(model, tmp_path, monkeypatch):
    Image.fromarray(photo(40, 48)).save(tmp_path / "a.png")
    (tmp_path / "n.json").write_text('{"background": 9, "hat": 3, "shoe": 9}')
    run(monkeypatch, model, tmp_path / "a.png", "--out", tmp_path / "own")
    run(monkeypatch, model, tmp_path / "a.png", "--out", tmp_path / "out", "--numbering",
        f"mine={tmp_path / 'n.json'}")
    own, other = (Image.open(tmp_path / folder / "a.mine.png") for folder in ("own", "out"))
    assert (np.array([9, 3, 9])[np.array(own)] == np.array(other)).all()
    palette = np.array(other.getpalette()).reshape(-1, 3)
    assert (palette[[9, 3]] == DOMAINS[1].palette()[:2]).all(), "the first class's colour"
    assert (tmp_path / "own/a.pascal.png").read_bytes() == (tmp_path / "out/a.pascal.png").read_bytes()


@pytest.mark.parametrize("content, message", [
    ('{"background": 0, "hat": 1}', "does not number the classes of 'mine': shoe; every class"),
    ('{"background": 0, "hat": 1, "shoe": 2, "sock": 3}', "of 'mine': sock; every class"),
    ('{"background": 0, "hat": 1, "shoe": 256}', "'shoe' has the number 256; give whole numbers from 0"),
    ('{"background": 0, "hat": 1, "shoe": true}', "'shoe' has the number True"),
    ("[1, 2]", "of 'mine': no object"), ("{", "not readable as JSON"), (None, "n.json: not readable as JSON"),
])
def test_numberings_that_are_refused(tmp_path, content, message):
    if content:
        (tmp_path / "n.json").write_text(content)
    with pytest.raises(InputError, match=message):
        numbering(f"mine={tmp_path / 'n.json'}", {"mine": DOMAINS[1]})
    for spec in ("hers=n.json", "mine", "mine="):
        with pytest.raises(InputError, match="write DOMAIN=FILE, DOMAIN being one of mine; built in are sch"):
            numbering(spec, {"mine": DOMAINS[1]})


def test_the_numberings_built_in():
    """SCHP's simple_extractor numbers ATR and LIP as their datasets do; VITON-HD joins CIHP's classes."""
    domains = {name: builtin_domain(name) for name in ("atr", "lip", "cihp")}
    assert numbering("atr=schp-atr", domains)[1].tolist() == list(range(18))
    assert numbering("lip=schp-lip", domains)[1].tolist() == list(range(20))
    viton = [[0, 10], [1, 2], [4, 13], [5, 6, 7], [9, 12], [14], [15], [16], [17], [18], [19], [8], [3, 11]]
    found = numbering("cihp=viton-hd", domains)[1]
    assert [np.nonzero(found == k)[0].tolist() for k in range(13)] == viton


def test_photos_that_are_read_at_once_give_the_same(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for k in range(5):
        Image.fromarray(photo(40, 48, k)).save(tmp_path / f"in/{k}.png")
    (tmp_path / "in/broken.png").write_text("none")
    for n in (1, 3):
        with pytest.raises(InputError, match="1 of 6 photos could not be read"):
            run(monkeypatch, model, tmp_path / "in", "--out", tmp_path / f"out{n}", "--batch-size", n)
        printed = capsys.readouterr()
        assert "6/6" in printed.out + printed.err and "results of 5 photos" in printed.out
    assert files(tmp_path / "out1") == files(tmp_path / "out3") == results(*"01234")
    for k in range(5):
        one, three = (np.array(Image.open(tmp_path / f"out{n}/{k}.pascal.png")) for n in (1, 3))
        assert (one == three).mean() > 0.999


def test_pictures_show_the_photo_under_the_colours_of_its_classes():
    image, label = np.full((600, 80, 3), 200, np.uint8), np.zeros((600, 80), np.uint8)
    label[:300, :40] = 2
    picture = overlay(image, label, DOMAINS[0])
    assert picture.shape[0] == 600 and picture.shape[1] > 150, "the legend is on the right"
    assert (picture[300:, :80] == 200).all() and (picture[:, 40:80] == 200).all(), "the background stays"
    torso = DOMAINS[0].palette()[2].astype(int)
    assert abs(picture[:300, :40] - (0.4 * 200 + 0.6 * torso)).max() <= 1
    legend = picture[:, 80:]
    swatches = [tuple(colour) for colour in DOMAINS[0].palette()[1:].tolist()]
    rows = [np.flatnonzero((legend == colour).all(-1).any(1)).mean() for colour in swatches]
    assert rows == sorted(rows) and np.ptp(np.diff(rows)) == 0, "one swatch a class, one below the other"
    black = np.flatnonzero((legend[:, 30:] == 0).all(-1).any(1))
    assert abs(black[black > 20].mean() - rows[1]) < 3, "only the name of the class that is there is black"
    assert overlay(image[:20], label[:20], DOMAINS[0]).shape[0] > 100, "a low photo does not cut its legend"


def test_pictures_are_of_a_size_for_the_screen(model, tmp_path, monkeypatch):
    for name, size in (("small", (20, 40)), ("middle", (300, 900)), ("large", (1000, 2400))):
        Image.fromarray(photo(*size)).save(tmp_path / f"{name}.jpg")
        run(monkeypatch, model, tmp_path / f"{name}.jpg", "--out", tmp_path / "out", "--max-side", 64)
    widths = {name: Image.open(tmp_path / "out" / f"{name}.pascal.overlay.jpg").width
              for name in ("small", "middle", "large")}
    legend = widths["small"] - 640
    assert 80 < legend < 200
    assert widths == {"small": 640 + legend, "middle": 900 + legend, "large": 1600 + legend}
    assert Image.open(tmp_path / "out" / "large.pascal.png").size == (2400, 1000)
    assert Image.open(tmp_path / "out" / "large.all.jpg").width > 3 * 640


def test_ids_that_are_no_class_are_grey_in_the_palette():
    table = colour_table(DOMAINS[1])
    assert (table[:3] == DOMAINS[1].palette()).all() and (table[3:] == 128).all()


def test_equal_stems_and_equal_names_keep_apart(model, tmp_path, monkeypatch):
    for i, name in enumerate(("one/a.jpg", "one/a.png", "one/a.jpg.png", "one/b.jpg", "two/b.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo(20, 20 + i)).save(tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    run(monkeypatch, model, one, "--out", tmp_path / "1")
    assert files(tmp_path / "1") == results("a.jpg", "a.png", "a.jpg.png", "b")
    run(monkeypatch, model, two, one / "a.png", "--out", tmp_path / "2")
    assert files(tmp_path / "2") == results("a", "b"), "no two are equal, so names start at what was given"
    run(monkeypatch, model, one, two, one / "b.jpg", "--out", tmp_path / "3")
    assert files(tmp_path / "3") == results("one/a.jpg", "one/a.png", "one/a.jpg.png", "one/b", "two/b")
    for i, name in enumerate(("one/a.jpg", "one/a.png", "one/a.jpg.png", "one/b", "two/b")):
        assert Image.open(tmp_path / "3" / f"{name}.mine.png").width == 20 + i


def test_results_below_the_photos_are_not_taken_for_photos(model, tmp_path, monkeypatch):
    Image.fromarray(photo(20, 20)).save(tmp_path / "a.png")
    for _ in range(2):
        run(monkeypatch, model, tmp_path, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == results("a")


def test_a_broken_photo_is_named_and_skipped_and_the_rest_done(model, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.fromarray(photo(64, 64)).save(photos / name)
    (photos / "a.jpg").write_text("no photo at all")
    (photos / "b.jpg").write_bytes((photos / "c.jpg").read_bytes()[:-300])
    with pytest.raises(InputError, match="2 of 3 photos could not be read and were skipped"):
        run(monkeypatch, model, photos, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == results("c")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "a.jpg: not a readable photo" in said[0]
    assert "b.jpg: not a readable photo" in said[1]


def test_the_command_says_what_is_wrong_and_exits_with_1(model, tmp_path):
    (tmp_path / "a.jpg").write_text("no photo")
    command = [sys.executable, str(ROOT / "predict.py"), str(model), "--out", "out", "a.jpg"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last == "predict.py: 1 of 1 photos could not be read and were skipped, see above"


def test_refused_before_any_photo_is_read(model, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    (photos / "empty").mkdir(parents=True)
    Image.fromarray(photo(20, 20)).save(photos / "a.png")
    Image.fromarray(photo(20, 20)).save(photos / "a.mine.png")
    (tmp_path / "file").write_text("")
    for arguments, message in (
            ([], "nothing to do; give photos"),
            ([photos, tmp_path / "none.jpg", "--out", tmp_path / "out"], "none.jpg: no such file or folder"),
            ([photos / "empty", "--out", tmp_path / "out"], r"empty: no photo in this folder \(.jpg"),
            ([photos, "--out", photos], "--out .*photos: is a folder of photos"),
            ([photos / "a.png", photos / "a.mine.png", "--out", photos],
             r"a result of .*a.png would replace the given photo a.mine.png"),
            ([photos, "--out", tmp_path / "file/out"], r"file/out: cannot be written \(Not a directory\)"),
            ([photos, "--out", tmp_path / "file"], r"file: cannot be written \(File exists\)")):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, model, *arguments)
    assert files(tmp_path) == ["file", "photos/a.mine.png", "photos/a.png"], "nothing was written"
    with pytest.raises(InputError, match="none.pt: no such file; give a model.pt or best.pt"):
        run(monkeypatch, tmp_path / "none.pt", photos, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="--int8 without --export: it is a kind of export"):
        run(monkeypatch, model, photos, "--int8", photos)


def test_export_says_what_it_lacks(model, tmp_path, monkeypatch):
    net, domains = sst.load(model).net, sst.load(model).domains
    with pytest.raises(InputError, match="--export .*none/p.onnx: the folder .*none does not exist"):
        run(monkeypatch, model, "--export", tmp_path / "none" / "p.onnx")
    for package in ("onnx", "onnxscript"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, "onnx", sys.modules.get("onnx", sys))  # there, wherever the tests run
            m.setitem(sys.modules, package, None)
            message = f"--export needs the package {package}, .*pip install onnx onnxscript"
            with pytest.raises(InputError, match=message):
                export(net, domains, tmp_path / "p.onnx")
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(InputError, match="--export needs PyTorch 2.8 or newer, this is 2.7.1"):
        export(net, domains, tmp_path / "p.onnx")
