"""Dedicated parsing, and a growing pool of label domains: what is frozen, what is inherited, what is kept."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_train import ROOT, SHORT, lines

import train
from figures import Figures
from sst import checkpoint, runs
from sst.checkpoint import inherit
from sst.runs import configure, stages
from sst.data import fraction_of
from sst.config import restored
from sst.distributed import Interruption, Place
from sst.domains import LabelDomain, builtin_domain
from sst.errors import InputError
from sst.scenarios import build

STEPS = [*SHORT, "--steps", 2, "--validations", 0]


def run(*flags):
    argv, sys.argv = sys.argv, ["train.py", *map(str, flags)]
    try:
        train.main()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Universal parsing of the built-in figures in all three label domains, with SST."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("source") / "run"
    run(*STEPS, "--out", out)
    return out


@pytest.fixture(scope="module")
def transfer(tmp_path_factory):
    """Dedicated parsing of figures, both steps: CIHP -> PASCAL."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("transfer") / "run"
    run("--mode", "dedicated", *STEPS, "--source-steps", 1, "--out", out)
    return out


@pytest.mark.slow
def test_both_steps_run_in_two_processes(tmp_path):
    """The second step waits for what the first process writes at the end of the first step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--mode", "dedicated", *STEPS, "--source-steps", 1, "--out", tmp_path / "run"]
    done = subprocess.run([*torchrun, ROOT / "train.py", *map(str, flags)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/model.pt").exists() and (tmp_path / "run/source/last.pt").exists()


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def test_both_steps_run_and_only_the_target_is_kept(transfer):
    config = json.loads((transfer / "source/config.json").read_text())
    assert (config["mode"], config["steps"], config["figures"]) == ("universal", 1, ["cihp"])
    assert json.loads((transfer / "config.json").read_text())["source_checkpoint"] == str(transfer / "source")
    assert set(lines(transfer / "source")[0]["loss"]) == {"seg/cihp", "aux/cihp", "total"}, "Eq. 13, step 1"
    first = lines(transfer)[0]["loss"]
    assert set(first) == {"seg/pascal", "aux/pascal", "dataset", "img", "total"}, "Eq. 13, step 2"
    total = 10 * first["seg/pascal"] + first["aux/pascal"] + 5 * (first["dataset"] + first["img"])
    assert first["total"] == pytest.approx(total, rel=1e-5)
    net, domains = checkpoint.load_model(transfer / "model.pt")
    assert [d.name for d in domains] == ["pascal"] and list(net.heads) == ["pascal"]
    kept = torch.load(transfer / "model.pt", weights_only=True)["weights"]
    assert kept.keys() == net.state_dict().keys()


def test_the_frozen_source_stays_bit_identical(transfer):
    before, after = last(transfer / "source")["weights"], last(transfer)["weights"]
    frozen = {key.removeprefix("source."): value for key, value in after.items() if key.startswith("source.")}
    assert any("running_mean" in key for key in frozen) and any("X_0" in key for key in frozen)
    assert all(torch.equal(value, before[key]) for key, value in frozen.items())
    assert {key for key in before if not key.startswith("sst.mst.")} == set(frozen)
    conv1 = "net.backbone.conv1.weight"
    assert not torch.equal(after[conv1], before[conv1]), "the target's copy learns"


def dedicated(source, **change):
    config = configure(["--mode", "dedicated", "--source-checkpoint", str(source)]) | change
    (config,) = stages(config)
    origin = checkpoint.load(source / "last.pt", "run")
    return config, origin


@pytest.fixture
def target_only(source, tmp_path):
    """The source without PASCAL, so that PASCAL can be a target: universal parsing of ATR and CIHP."""
    out = tmp_path / "two"
    config = restored(json.loads((source / "config.json").read_text())) | {
        "figures": ["atr", "cihp"], "out": str(out), "scale": (0.8, 1.25), "steps": 1}
    sets = runs.open_data(config, Figures)
    train.train(config, config, *sets, Place(0, 1, torch.device("cpu")), Interruption())
    return out


def test_the_target_starts_as_a_copy_and_every_source_is_bridged_to_it(target_only):
    config, origin = dedicated(target_only)
    model = build(config, [builtin_domain("pascal")], origin).train()
    assert list(model.sst.mst) == ["atr:pascal", "cihp:pascal"] and list(model.sst.mse) == ["pascal"]
    own = {key: value for key, value in model.net.state_dict().items() if not key.startswith("heads.")}
    assert all(torch.equal(value, origin["weights"][f"net.{key}"]) for key, value in own.items())
    assert model.net.training and not model.source.training
    assert not any(p.requires_grad for p in model.source.parameters())

    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(7, (2, 64, 64), dtype=torch.uint8)
    labels[0, :32], labels[1] = 255, 255
    # The source's regions are its own heads' argmax, but where the target's labels are ignored.
    given, _ = model.source.represent(images, labels.long())
    S, X = given["cihp"]
    assert S.shape == (3, 2, 20, 64) and X[0].shape == (20, 64) and X[3].shape == (2, 20, 64)
    assert S[:, 0].any() and not S[:, 1].any(), "an image of ignored pixels has no region"
    other = labels.clone()
    other[0, 32:] = (other[0, 32:] + 1) % 7
    again = model.source.represent(images, other.long())[0]["cihp"][0]
    assert torch.equal(S, again), "the labels' classes are none of the source's"

    terms, X = model(images, labels, [0, 0])
    assert set(terms) == {"seg/pascal", "aux/pascal", "dataset", "img"} and list(X) == ["pascal"]
    sum(terms.values()).backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learning), "DDP would wait for it"
    assert all(p.grad is None for p in model.source.parameters())


def test_source_and_target_of_one_image_are_paired_and_no_others(target_only):
    """Image 0's loss does not change with what image 1 shows."""
    config, origin = dedicated(target_only)
    model = build(config, [builtin_domain("pascal")], origin).eval()
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(7, (2, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        both, one, two = (model(images[rows], labels[rows], [0] * len(rows))[0]["img"]
                          for rows in ([0, 1], [0], [1]))
    assert both.item() == pytest.approx((one.item() + two.item()) / 2, rel=1e-5)


def test_fine_tuning_starts_from_the_same_weights_without_sst(target_only):
    config, origin = dedicated(target_only)
    with_sst, without = (build(config | change, [builtin_domain("pascal")], origin)
                         for change in ({}, {"beta": 0, "lam": 0}))
    assert without.sst is None and not hasattr(without, "source")
    one, two = with_sst.net.state_dict(), without.net.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_fractions_are_nested_and_seeded():
    figures = Figures(builtin_domain("atr"), 0, 40, (64, 64))
    half, most = fraction_of(figures, 0.5, 3), fraction_of(figures, 0.8, 3)
    assert (len(half), len(most)) == (20, 32) and half.indices == most.indices[:20]
    assert half.domain is figures.domain
    assert half.indices == fraction_of(figures, 0.5, 3).indices != fraction_of(figures, 0.5, 4).indices
    assert len(fraction_of(figures, 0.001, 3)) == 1
    assert half.where(2) == figures.where(half.indices[2])
    assert np.array_equal(half.load(2)[0], figures.load(half.indices[2])[0])


# --init-from ------------------------------------------------------------------------------------------------


def other_run(source, names):
    origin = checkpoint.load(source / "last.pt", "run")
    config = configure(["--init-from", str(source)])
    domains = [builtin_domain(name) for name in names]
    model = build(config, domains, origin)
    return model, inherit(model, domains, origin, source / "last.pt"), origin["weights"]


def test_a_domain_is_added_and_one_removed_and_the_known_heads_predict_what_they_did(source):
    net, _ = checkpoint.load_model(source / "model.pt")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = net(image)
        for names in (("pascal", "atr", "cihp", "lip"), ("cihp", "atr")):
            model, words, weights = other_run(source, names)
            after = model.eval().net(image)
            assert list(after) == list(names)
            for name in names:
                assert name == "lip" or torch.equal(after[name], before[name])
            for name in set(names) - {"lip"}:
                assert torch.equal(model.sst.mse[name].X_0, weights[f"sst.mse.{name}.X_0"])
            if "lip" in names:
                new = words.partition("new")[2]
                assert all(part in new for part in ("head of lip", "MSE of lip", "MST of cihp:lip"))
                assert "pascal:atr" not in new
            else:
                assert "left behind: domain pascal" in words and "new" not in words


def test_a_pair_in_the_other_order_keeps_its_meaning(source):
    """MST of atr:cihp and of cihp:atr are the same maps with 1 and 2 exchanged."""
    one, two = other_run(source, ("atr", "cihp"))[0], other_run(source, ("cihp", "atr"))[0]
    X, Y = one.sst.mse["atr"].X_0, one.sst.mse["cihp"].X_0
    with torch.no_grad():
        to_cihp, to_atr = one.sst.mst["atr:cihp"].dataset_level(X, Y)
        swapped_to_atr, swapped_to_cihp = two.sst.mst["cihp:atr"].dataset_level(Y, X)
    torch.testing.assert_close(to_cihp, swapped_to_cihp)
    torch.testing.assert_close(to_atr, swapped_to_atr)
    assert not torch.allclose(to_cihp[:18], to_atr)


def test_init_from_runs(source, tmp_path, capsys):
    run("--init-from", source, *STEPS, "--out", tmp_path / "more")
    printed = capsys.readouterr().out
    assert "loaded (" in printed and "network, head of pascal" in printed and "\nnew (" not in printed


def test_init_from_a_file_of_weights_is_init_from_its_run_without_sst(source, tmp_path, capsys):
    data = [f"{name}=figures" for name in ("pascal", "atr", "cihp")]
    flags = "--data", *data, *STEPS, "--beta", 0, "--lam", 0
    for start, name in ((source, "run"), (source / "model.pt", "file")):
        run("--init-from", start, "--preset", "demo", *flags, "--out", tmp_path / name)
    one, two = (checkpoint.load(tmp_path / name / "model.pt", "model")["weights"] for name in ("run", "file"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert "loaded (" in capsys.readouterr().out
    run("--resume", tmp_path / "file")  # finished: nothing else is needed


def test_init_from_the_packaged_weights_starts_with_what_they_say(tmp_path, capsys):
    config = runs.configure(["--init-from", "packaged", "--data", "atr=figures", "new=x", "--out", "x"])
    assert (config.preset, config.arch, config.backbone_weights) == ("lite", "lite", "auto")
    domains = [builtin_domain("atr"), LabelDomain("new", ("background", "bag"), adjacency=())]
    model, words = runs.prepare(config, domains, torch.device("cpu"))
    net, _ = checkpoint.load_model(checkpoint.PACKAGED)
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval().net(photo)["atr"], net(photo)["atr"], rtol=1e-3, atol=1e-4)
    assert "head of new" in words and "left behind: domain ccp-coarse" in words


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--target", "pascal=x"],
     "--target: has no meaning with --mode universal; it belongs to --mode dedicated"),
    (["--fraction", "0.5"], "--fraction: has no meaning with --mode universal"),
    (["--mode", "dedicated", "--data", "pascal=x"],
     "--data: has no meaning with --mode dedicated; give --source NAME=PATH and --target"),
    (["--mode", "dedicated", "--target", "pascal=x"],
     "--mode dedicated needs --source NAME=PATH and --target NAME=PATH, or neither"),
    (["--mode", "dedicated", "--source", "cihp=x", "--target", "cihp=y"],
     "--target cihp=y: is a source domain too"),
    (["--mode", "dedicated", "--source", "cihp=x", "--source-checkpoint", "y"],
     "--source-checkpoint y: takes the place of pre-training"),
    (["--mode", "dedicated", "--source-steps", "1", "--source-epochs", "1"],
     "--source-epochs 1 and --source-steps 1: give one of them"),
    (["--mode", "dedicated", "--fraction", "0"], "--fraction 0.0: must lie between"),
    (["--mode", "dedicated", "--fraction", "1.5"], "--fraction 1.5: must lie between"),
    (["--mode", "dedicated", "--source-checkpoint", "nowhere"], "nowhere: no such file; give the folder"),
    (["--init-from", "nowhere"], "nowhere: no such file; give the folder of a run"),
])
def test_one_sentence_for_scenarios_that_make_no_sense(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        run(*flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_a_target_without_adjacency_is_refused_before_the_source_is_trained(tmp_path, monkeypatch):
    from PIL import Image
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images/a.jpg")
    Image.new("L", (40, 40)).save(tmp_path / "labels/a.png")
    (tmp_path / "train_id.txt").write_text("a\n"), (tmp_path / "val_id.txt").write_text("a\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "classes": ["background", "face"]}
                                                          | ({"adjacency": []} if name == "one" else {})))
    flags = ["--mode", "dedicated", "--preset", "small", *STEPS, "--source", f"one={tmp_path / 'one.json'}",
             "--target", f"two={tmp_path / 'two.json'}", "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="domain 'two' says nothing of which classes touch"):
        run(*flags)
    assert not (tmp_path / "out").exists()
    run(*flags, "--intra-mask", "none")


def test_one_sentence_for_checkpoints_that_do_not_suit(source, transfer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(message, *flags):
        with pytest.raises(InputError) as caught:
            run(*STEPS, "--out", tmp_path / "out", *flags)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("--target pascal: is a source domain too", "--mode", "dedicated", "--source-checkpoint", source)
    refused("--arch r50: the network of", "--init-from", source, "--arch", "r50")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "last.pt").write_bytes((transfer / "model.pt").read_bytes())  # lacks the auxiliary modules
    refused("alone/last.pt: lacks best, config, counts, lists, optimizer, scaler, step; expected a last.pt",
            "--mode", "dedicated", "--source-checkpoint", alone)
    content = last(transfer / "source")
    content["weights"] = {key: value for key, value in content["weights"].items()
                          if not key.startswith("sst.")}
    checkpoint.save(content, alone / "last.pt")
    refused("has no MSA and MSE, being weights alone or a run with --beta 0, but --lam 5",
            "--mode", "dedicated", "--source-checkpoint", alone)
    content = last(transfer / "source")
    domain = content["domains"][0]
    domain["classes"] = ["a thing" if c == "coat" else c for c in domain["classes"]]
    domain |= {"adjacency": [], "flip_pairs": []}
    checkpoint.save(content, alone / "last.pt")
    refused("its domain 'cihp' has the classes", "--init-from", alone)


def test_sst_needs_more_than_weights_alone_and_the_message_says_so(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "cihp.pt"
    content = checkpoint.load(source / "model.pt", "model")
    content["domains"] = [d for d in content["domains"] if d["name"] != "pascal"]
    content["weights"] = {k: w for k, w in content["weights"].items() if not k.startswith("heads.pascal")}
    checkpoint.save(content, weights)
    flags = *STEPS, "--mode", "dedicated", "--source-checkpoint", weights
    with pytest.raises(InputError, match="cihp.pt: has no MSA and MSE.*give the run's folder"):
        run(*flags)
    run(*flags, "--beta", 0, "--lam", 0, "--cross", 1, "--out", tmp_path / "taught")
    assert (tmp_path / "taught/model.pt").is_file()
    kept = checkpoint.load(tmp_path / "taught/last.pt", "run")["weights"]
    for key, value in content["weights"].items():
        assert torch.equal(kept[f"source.net.{key}"], value), "the frozen source is the file's network"
