"""train.py: the flags, what SST leaves untouched, what a run writes, several processes, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from figures import Figures
from sst import checkpoint, optim, runs, scenarios
from sst.config import FIGURES, preset
from sst.crops import Crops, Schedule, collate
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.journal import gradient_shares
from sst.losses import L_u
from sst.model import Arch
from sst.scenarios import Universal

ROOT = Path(__file__).parent.parent
TINY = Arch(blocks=(1, 1, 1, 1), width=8, dim=32, heads=2, layers=1, ffn=32, window=4)
DOMAINS = [builtin_domain(name) for name in FIGURES]
BASE = preset("demo") | dict(arch=TINY, seed=0, intra_mask="body", scr="both", connect="full",
                             regions="label", resume=None, mode="universal")


def batches(domains, count, size=3, seed=0):
    data = Crops([Figures(d, 0, 20, (64, 64), i, 3) for i, d in enumerate(domains)], None, (64, 64), seed)
    schedule = Schedule([20] * len(domains), size, seed)
    return [collate([data[key] for key in schedule[m]]) for m in range(count)]


def loss_of(model, config, batch):
    terms, _ = model(*batch[:3])
    return L_u(terms, config.alpha, config.beta, config.lam)


MODES = [{}, {"beta": 0, "lam": 0}, {"beta": 0}, {"lam": 0}, {"intra_mask": "none"},
         {"scr": "dataset"}, {"scr": "image"}, {"scr": "none"}, {"beta": 0, "scr": "dataset"},
         {"connect": "progressive"}, {"regions": "prediction"},
         {"domains": 1}, {"domains": 1, "beta": 0}, {"domains": 2}]


@pytest.mark.parametrize("change", MODES, ids=str)
def test_a_few_steps_lower_the_loss(change):
    domains = DOMAINS[:change.get("domains", 3)]
    config = BASE | change
    model = scenarios.build(config, domains).train()
    optimizer = optim.build_optimizer(model, config | {"lr": 1e-3})
    (batch,) = batches(domains, 1)
    losses = []
    for _ in range(6):
        loss = loss_of(model, config, batch)
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, "DDP would wait for these forever"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("change", [
    {"beta": 0, "lam": 0}, {"scr": "dataset", "connect": "progressive"}], ids=str)
def test_a_seed_gives_the_network_the_same_weights_with_and_without_sst(change):
    one, two = (scenarios.build(BASE | c, DOMAINS).net.state_dict() for c in ({}, change))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    other = scenarios.build(BASE | {"seed": 1}, DOMAINS).net.state_dict()
    assert not torch.equal(one["backbone.conv1.weight"], other["backbone.conv1.weight"])


def test_without_both_weights_no_sst_module_is_built():
    assert scenarios.build(BASE | {"beta": 0, "lam": 0}, DOMAINS).sst is None
    alone = scenarios.build(BASE | {"beta": 0}, DOMAINS[:1])
    assert alone.sst is None, "one domain has nothing to be consistent with"
    model = scenarios.build(BASE | {"lam": 0}, DOMAINS)
    assert model.sst is not None and len(model.sst.mst) == 0


def test_the_kept_network_is_the_same_with_and_without_sst_attached():
    images = torch.rand(1, 3, 64, 64)
    outputs, flops, sizes = [], [], []
    for change in ({}, {"beta": 0, "lam": 0}):
        net = scenarios.build(BASE | change, DOMAINS).eval().net
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs.append(net(images))
        flops.append(counter.get_total_flops())
        sizes.append(sum(p.numel() for p in net.parameters()))
    assert flops[0] == flops[1] > 0 and sizes[0] == sizes[1]
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_sst_reads_the_network_only_through_its_losses():
    """A step with SST and without differ, but the segmentation terms of the very same weights do not."""
    (batch,) = batches(DOMAINS, 1)
    with_sst, without = (scenarios.build(BASE | change, DOMAINS).train()(*batch[:3])[0]
                         for change in ({}, {"beta": 0, "lam": 0}))
    assert [name for name in without] == ["seg/pascal", "seg/atr", "seg/cihp"]
    assert all(torch.equal(with_sst[name], without[name]) for name in without)


def test_a_seed_gives_the_same_crops_in_the_same_order_with_and_without_sst(tmp_path, monkeypatch):
    seen = []
    forward = Universal.forward

    def spy(self, images, labels, domain, given=None):
        seen.append((images.clone(), labels.clone(), domain))
        return forward(self, images, labels, domain)

    monkeypatch.setattr(Universal, "forward", spy)
    for name, flags in (("with", []), ("without", ["--beta", "0", "--lam", "0"])):
        run(monkeypatch, *SHORT, "--validations", "0", "--steps", 2, "--out", tmp_path / name, *flags)
    for (images, labels, domain), (images_, labels_, domain_) in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(images, images_) and torch.equal(labels, labels_) and domain == domain_
    assert not torch.equal(seen[0][0], seen[1][0])


def test_groups_give_the_backbone_its_rate_and_spare_norms_from_decay():
    model = scenarios.build(BASE, DOMAINS)
    groups = optim.build_optimizer(model, BASE | {"backbone_lr_scale": 0.1, "sst_lr_scale": 0.5}).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    of = {id(p): g for g in groups for p in g["params"]}
    net = model.net
    conv1, bn1 = of[id(net.backbone.conv1.weight)], of[id(net.backbone.bn1.weight)]
    head, X_0 = of[id(net.heads["atr"].weight)], of[id(model.sst.mse["atr"].X_0)]
    assert conv1["scale"] == 0.1 and head["scale"] == 1
    assert bn1["weight_decay"] == 0 and conv1["weight_decay"] == 0.05
    assert X_0["weight_decay"] == 0 and X_0["scale"] == 0.5


def test_muon_takes_the_kept_networks_matrices_but_for_the_heads():
    model = scenarios.build(BASE, DOMAINS)
    groups = optim.build_optimizer(model, BASE | {"optimizer": "muon"}).param_groups
    of = {id(p): g["matrices"] for g in groups for p in g["params"]}
    taken = {name for name, p in model.named_parameters() if of[id(p)]}
    assert "net.backbone.layer1.0.conv2.weight" in taken and "net.encoder.layers.0.value.weight" in taken
    assert "net.decoder.0.blocks.0.qkv.weight" in taken
    assert all(p.ndim > 1 for name, p in model.named_parameters() if name in taken)
    assert not [name for name in taken if not name.startswith("net.")
                or name.startswith("net.heads") or name.endswith(("bias", "level"))]
    adamw = optim.build_optimizer(model, BASE | {"optimizer": "adamw"})
    assert type(adamw) is torch.optim.AdamW and not any(g["matrices"] for g in adamw.param_groups)


def test_the_learning_rate_drops_as_published_or_falls_to_nothing():
    drop, linear = (BASE | {"decay": decay, "drop_at": 0.6} for decay in ("drop", "linear"))
    assert [optim.rate(k / 10, drop) for k in (0, 5, 6, 9)] == [1, 1, 0.1, 0.1]
    assert [optim.rate(k / 10, linear) for k in (0, 5, 6, 8, 10)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert optim.rate(125 / 150, preset("paper")) == 0.1  # the step after epoch 125


# Whole runs -------------------------------------------------------------------------------------------------

SHORT = ["--size", "64x64", "--crop", "64x64", "--batch-size", "3", "--workers", "0",
         "--validations", "1", "--log-every", "1", "--shares", "0"]


WHOLE = Figures.__len__


def run(monkeypatch, *flags):
    if Figures.__len__ is WHOLE:  # a short validation: 6 of 80 figures
        monkeypatch.setattr(Figures, "__len__", lambda self: 6 if self.count == 80 else self.count)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run_interrupted(monkeypatch, *flags):
    """A run that ends as soon as its first checkpoint is saved."""
    class Interrupt(Exception):
        pass

    save = checkpoint.save_last

    def save_and_stop(*args):
        save(*args)
        raise Interrupt

    monkeypatch.setattr(checkpoint, "save_last", save_and_stop)
    with pytest.raises(Interrupt):
        run(monkeypatch, *flags)
    monkeypatch.setattr(checkpoint, "save_last", save)


@pytest.mark.pictures
def test_a_run_writes_what_it_promises_and_resumes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(monkeypatch, *SHORT, "--steps", 2, "--out", out)
    printed = capsys.readouterr().out
    assert printed.startswith(f"writing to {out}")
    assert "mean accuracy %" in printed and "--beta 0 --lam 0" in printed
    assert {f.name for f in out.iterdir()} == {
        "model.pt", "best.pt", "last.pt", "config.json", "log.jsonl", "curves.png", "samples.png"}
    assert all((out / name).stat().st_size > 10_000 for name in ("curves.png", "samples.png"))

    config = json.loads((out / "config.json").read_text())
    assert (config["alpha"], config["steps"], config["crop"], config["global_batch"]) == (10, 2, [64, 64], 3)

    first, second, val = lines(out)
    assert (first["kind"], first["step"], second["step"], val["kind"]) == ("train", 1, 2, "val")
    loss = first["loss"]
    assert set(loss) == {"seg/pascal", "seg/atr", "seg/cihp", "aux/pascal", "aux/atr", "aux/cihp",
                         "dataset", "img", "total"}
    seg, aux = (sum(v for k, v in loss.items() if k[:3] == term) for term in ("seg", "aux"))
    assert loss["total"] == pytest.approx(10 * seg + aux + 5 * (loss["dataset"] + loss["img"]), rel=1e-5)
    assert set(first["cos"]) == set(val["miou"]) == {"pascal", "atr", "cihp"}
    assert abs(first["cos"]["atr"]["x0"]) < 0.01
    assert first["time"]["seconds"] > 0 and all(0 <= v <= 100 for v in val["miou"].values())

    content = torch.load(out / "model.pt", weights_only=True)
    assert set(content) == {"format", "arch", "domains", "weights", "colours", "photos"}
    assert content["format"] == 1 and content["photos"]["size"] == [64, 64]
    assert not [key for key in content["weights"] if "msa" in key or "mse" in key or "mst" in key]
    net, domains = checkpoint.load_model(out / "model.pt")
    assert [d.name for d in domains] == ["pascal", "atr", "cihp"] and not net.training
    best, _ = checkpoint.load_model(out / "best.pt")
    assert best(torch.rand(1, 3, 40, 50))["cihp"].shape == (1, 20, 40, 50)

    with pytest.raises(InputError, match=r"holds a run already \(config.json, .*\); "
                                         r"give another folder, or go on with it: --resume"):
        run(monkeypatch, *SHORT, "--steps", 2, "--out", out)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 3, "ki')  # killed while it wrote
    run(monkeypatch, "--resume", out)  # nothing is left to train: the table and pictures again
    assert "this run is finished, all 2 steps" in capsys.readouterr().out
    (out / "samples.png").unlink()  # killed before the pictures were drawn
    run(monkeypatch, "--resume", out)
    assert "mean accuracy %" in capsys.readouterr().out and len(lines(out)) == 3
    with pytest.raises(InputError, match=r"--lr 1.0: contradicts the run in .*/run, where it is 0.01; "
                                         r"leave the flag out"):
        run(monkeypatch, "--resume", out, "--lr", 1)

    # Interrupted after step 1 and resumed ends where the uninterrupted run ended.
    half = tmp_path / "half"
    run_interrupted(monkeypatch, *SHORT, "--steps", 2, "--validations", 2, "--out", half)
    run(monkeypatch, "--resume", half)
    resumed, whole = (torch.load(folder / "model.pt", weights_only=True)["weights"] for folder in (half, out))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert [(line["step"], line["kind"]) for line in lines(half)] == [
        (1, "train"), (1, "val"), (2, "train"), (2, "val")]


def test_shares_are_lengths_of_the_terms_gradients_and_measuring_changes_nothing(tmp_path, monkeypatch):
    run(monkeypatch, *SHORT, "--steps", 4, "--out", tmp_path / "without")
    run(monkeypatch, *SHORT, "--steps", 4, "--shares", 2, "--out", tmp_path / "with")
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"]
            for name in ("without", "with"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    measured = [line for line in lines(tmp_path / "with") if line["kind"] == "gradient"]
    assert [line["step"] for line in measured] == [2, 4]
    shares = measured[0]["shares"]
    assert set(shares) == {"seg", "aux", "dataset", "img"} and sum(shares.values()) == pytest.approx(1)
    assert shares["dataset"] == 0 < min(shares[kind] for kind in ("seg", "aux", "img"))

    # Eq. 12 with alpha 2, beta 1, lambda 3 and the weight 1/2 of L_cross, at one parameter of two numbers.
    module = torch.nn.Module()
    x = module.x = torch.nn.Parameter(torch.ones(2))
    terms = {"seg/a": x[0], "seg/b": 2 * x[0], "aux/a": 4 * x[1], "dataset": torch.ones(()), "img": x.sum(),
             "cross": -2 * x[1]}
    lengths = {"seg": 6, "aux": 4, "dataset": 0, "img": 3 * 2 ** 0.5, "cross": 1}
    found = gradient_shares(terms, (2, 1, 3, 0.5), module, scale=1024.0)
    assert found == pytest.approx({kind: value / sum(lengths.values()) for kind, value in lengths.items()})


DRIVER = """
import sys, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
import train
train.Figures.__len__ = lambda self: min(self.count, 6)  # a short validation
train.save_curves = train.save_samples = lambda content, path: path.write_bytes(b"")
train.main()
"""


def test_two_processes_train_as_one_that_accumulates(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT)))
    flags = [*SHORT, "--steps", "3", "--global-batch", "6", "--lr", "1e-3", "--shares", "1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = [subprocess.Popen([sys.executable, *launch, str(driver), *flags, "--out", str(tmp_path / name)],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for name, launch in (("one", []), ("two", torchrun))]
    for process in started:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    kinds = ["train", "train", "train", "gradient", "val"]
    assert [line["kind"] for line in one] == [line["kind"] for line in two] == kinds
    for a, b in zip(one[:3], two[:3]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    assert one[3]["shares"] == pytest.approx(two[3]["shares"], rel=1e-6), "of the same micro-batch"
    assert one[4]["miou"] == pytest.approx(two[4]["miou"], abs=0.01)
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"] for name in ("one", "two"))
    for key in a:
        if not key.endswith("num_batches_tracked"):  # counts the micro-batches of a process
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-8, msg=lambda m: f"{key}: {m}")


# Settings that are refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "2"],
     "--batch-size 2: every micro-batch needs an image of each of the 3 label domains; use 3 or more"),
    (["--crop", "16x64"], "--crop 16x64: the deepest map has a 32nd of that size"),
    (["--epochs", "1", "--steps", "2"], "--epochs 1 and --steps 2: give one of them"),
    (["--global-batch", "7", "--batch-size", "3"], "--global-batch 7: must be a multiple of --batch-size 3"),
    (["--crop", "32x32", "--batch-size", "1"], "--batch-size 1 with --crop 32x32: batch norm"),
    (["--preset", "paper"], "--preset paper without --data"),
    (["--compile", "--shares", "3"], "--shares 3: takes a backward pass for each term, and the compiled"),
    (["--scale", "2", "1"], "--scale 2.0 1.0: give the smaller factor first"),
    (["--lr", "nan"], "--lr nan: must lie between"),
    (["--lam", "-1"], "--lam -1.0: must lie between"),
    (["--data", "coco=."], "unknown label domain 'coco'"),
    (["--data", "pascal=nowhere"], "pascal=nowhere: no such folder"),
    (["--resume", "nowhere"], "nowhere/config.json: no such file; --resume takes the folder of a run"),
    (["--backbone-weights", "nowhere.pth"], "nowhere.pth: no such file"),
])
def test_one_sentence_for_settings_that_cannot_be_used(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        run(monkeypatch, *flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_the_sentence_is_all_that_a_user_sees(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--data", "pascal=nowhere"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ("train.py: pascal=nowhere: no such folder; "
                           "give the folder that holds the dataset\n")


def test_fresh_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = runs.configure([]) | {"out": None}
    for folder in ("runs/universal", "runs/universal-2", "runs/universal-3"):
        out = runs.free_folder(config)
        assert str(out) == folder
        runs.open_log(out, runs.Progress()).close()
        runs.write_config(config | {"out": folder})


def test_of_two_that_begin_at_once_in_a_folder_one_changes_nothing(tmp_path, monkeypatch):
    """The other has claimed the folder after this one found it free."""
    out = tmp_path / "run"
    out.mkdir()
    begun = """import sys, fcntl; log = open(sys.argv[1], "a"); fcntl.lockf(log, fcntl.LOCK_EX)
print(flush=True); input()"""
    other = subprocess.Popen([sys.executable, "-c", begun, str(out / "log.jsonl")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(InputError, match="run: another process trains in this folder"):
        run(monkeypatch, *SHORT, "--steps", 1, "--out", out)
    assert [path.name for path in out.iterdir()] == ["log.jsonl"], "its settings are not overwritten"
    other.communicate(b"\n")
    run(monkeypatch, *SHORT, "--steps", 1, "--out", out)  # killed before its first line: nothing is lost
    assert (out / "model.pt").exists()


def test_presets_and_overrides():
    assert runs.configure([]).preset == "demo" and runs.configure([]).batch_size == preset("demo").batch_size
    paper = runs.configure(["--data", "pascal=x", "--lam", "2"])
    wanted = dict(preset="paper", arch="r50", epochs=150, steps=None, lr=1e-4, drop_at=125 / 150,
                  alpha=10, beta=1, lam=2, crop=(512, 512), batch_size=4, size=None,
                  backbone_weights="auto", optimizer="adamw", decay="drop", balance=0, sst_lr_scale=1)
    assert {key: getattr(paper, key) for key in wanted} == wanted
    small = runs.configure(["--preset", "small", "--data", "pascal=x", "--steps", "7", "--size", "96x64"])
    assert (small.steps, small.epochs, small.size, small.arch) == (7, None, (96, 64), "small")
