"""Settings: what a run of an earlier version had, how images share a batch, matrices of one's own."""

import json

import pytest
import torch
from test_train import BASE, DOMAINS, SHORT, batches, lines, run

from figures import Figures
from sst import checkpoint, runs, scenarios
from sst.config import ROWS, preset, restored
from sst.errors import InputError
from sst.losses import L_u


def test_a_run_of_the_version_before_resize_and_slots_resumes_as_it_was_trained():
    """Its config.json, preset paper: width and height had one factor,
    every micro-batch as many images of each domain."""
    old = {"mode": "universal", "preset": "paper", "out": "runs/a", "resume": None, "check": None, "seed": 0,
           "data": ["pascal=x", "atr=y", "cihp=z"], "size": None, "crop": [512, 512], "scale": [0.5, 2.0],
           "batch_size": 4, "global_batch": 32, "workers": 4, "skip_bad": False, "source": [], "target": None,
           "source_checkpoint": None, "source_epochs": None, "source_steps": None, "fraction": 1.0,
           "init_from": None, "arch": "r50", "backbone_weights": "auto", "alpha": 10.0, "beta": 1.0,
           "lam": 5.0, "intra_mask": "body", "scr": "both", "connect": "full", "regions": "label",
           "epochs": 150, "steps": None, "optimizer": "adamw", "lr": 0.0001, "adam_beta2": 0.999,
           "backbone_lr_scale": 0.1, "sst_lr_scale": 1.0, "weight_decay": 0.05,
           "drop_at": 0.8333333333333334, "decay": "drop", "balance": 0.0, "clip": None, "precision": "auto",
           "compile": False, "sync_bn": False, "max_skips": 20, "save_every": 1000, "validations": 30,
           "log_every": 20, "figures": ["pascal", "atr", "cihp"]}
    now, then = preset("paper"), restored(json.loads(json.dumps(old)))
    assert (now.resize, now.slots) == ("independent", "proportional")
    assert (then.resize, then.slots, then.masks) == ("common", "equal", None)
    assert {key: value for key, value in vars(then).items() if key in old} == old | {
        "crop": (512, 512), "scale": (0.5, 2.0)}
    assert set(vars(then)) == set(vars(now)), "nothing of it is unset"


def test_an_old_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Saved by a version without the younger settings, it ends as the run that was not interrupted."""
    flags = [*SHORT, "--preset", "demo", "--scale", 0.5, 2, "--steps", 3, "--validations", 0,
             "--save-every", 1]
    run(monkeypatch, *flags, "--out", tmp_path / "whole")
    save = checkpoint.save_last

    def save_and_stop(content, out, *again):
        for key in ("resize", "slots", "masks"):
            del content["config"][key]
        del content["pending"]
        save(content, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_last", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "--out", tmp_path / "old")
    monkeypatch.setattr(checkpoint, "save_last", save)
    config = json.loads((tmp_path / "old/config.json").read_text())
    older = {key: value for key, value in config.items() if key not in ("resize", "slots", "masks")}
    (tmp_path / "old/config.json").write_text(json.dumps(older))
    run(monkeypatch, "--resume", tmp_path / "old")
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"]
                for name in ("whole", "old"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("change", [
    {}, {"lam": 0}, {"beta": 0}, {"scr": "dataset"}, {"beta": 0, "scr": "image"},
    {"beta": 0, "scr": "dataset"}, {"beta": 0, "lam": 0}], ids=str)
def test_a_micro_batch_without_images_of_a_domain_gives_every_parameter_a_gradient(change):
    """--slots proportional: DDP waits for one of each. The terms of the domain are 0 and change nothing."""
    model = scenarios.build(BASE | change, DOMAINS).train()
    (batch,) = batches(DOMAINS[1:], 1, size=2)  # no image of pascal
    terms, _ = model(*batch[:3])
    assert terms["seg/pascal"] == 0 and terms.get("aux/pascal", torch.zeros(())) == 0
    assert set(terms) == set(model(*batches(DOMAINS, 1)[0][:3])[0]), "the same terms as with all domains"
    L_u(terms).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    own = [p.grad for name, p in model.named_parameters()
           if "pascal" in name and "X_0" not in name and ".0." not in name]
    assert own and all((gradient == 0).all() for gradient in own)


def test_proportional_slots_and_independent_factors_train(tmp_path, monkeypatch):
    run(monkeypatch, *SHORT, "--slots", "proportional", "--batch-size", 2, "--resize", "independent",
        "--scale", 0.5, 2, "--steps", 3, "--validations", 0, "--out", tmp_path / "run")
    for line in lines(tmp_path / "run"):
        loss = line["loss"]
        assert {name for name in loss if "/" in name} == {
            f"{term}/{d.name}" for term in ("seg", "aux") for d in DOMAINS}
        absent = [loss[f"seg/{d.name}"] for d in DOMAINS].count(0)
        assert 1 <= absent <= 2, "two images are of two domains at most"


def masks(tmp_path, **fields):
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(fields))
    return path


def test_matrices_of_ones_own_reach_the_modules(tmp_path, monkeypatch):
    eye, table = torch.eye(7), torch.rand(18, 7)
    path = masks(tmp_path, intra={"pascal": eye.int().tolist()}, static={"pascal:atr": table.tolist()})
    config = BASE | {"masks": str(path)}
    sst = scenarios.build(config, DOMAINS).sst
    assert torch.equal(sst.mse["pascal"].M_intra, eye) and torch.equal(sst.mst["pascal:atr"].M_static, table)
    plain = scenarios.build(BASE, DOMAINS).sst
    assert torch.equal(sst.mse["atr"].M_intra, plain.mse["atr"].M_intra), "what the file does not name stays"
    turned = BASE | {"masks": str(masks(tmp_path, static={"atr:pascal": table.T.tolist()}))}
    assert torch.equal(scenarios.build(turned, DOMAINS).sst.mst["pascal:atr"].M_static, table)
    run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--masks", path, "--out", tmp_path / "run")
    weights = torch.load(tmp_path / "run/last.pt", weights_only=True)["weights"]
    assert torch.equal(weights["sst.mst.pascal:atr.M_static"], table)


def test_dedicated_parsing_takes_matrices_of_the_target_in_both_steps(tmp_path, monkeypatch):
    table = torch.rand(7, 20)
    path = masks(tmp_path, static={"cihp:pascal": table.tolist()})
    run(monkeypatch, "--mode", "dedicated", *SHORT, "--steps", 1, "--validations", 0, "--masks", path,
        "--out", tmp_path / "run")
    weights = torch.load(tmp_path / "run/last.pt", weights_only=True)["weights"]
    assert torch.equal(weights["sst.mst.cihp:pascal.M_static"], table)


def test_step_1_of_dedicated_parsing_has_the_same_weights_of_the_losses_unless_beta_is_0():
    """Step 2 needs a source with MSA and MSE, and fine-tuning is to start from the same one."""
    flags = ["--mode", "dedicated", "--out", "runs/none", "--alpha", "3"]
    of = lambda config: [(stage.alpha, stage.beta, stage.lam) for stage in runs.stages(config)]
    assert of(runs.configure([*flags, "--beta", "0.5", "--lam", "2"])) == [(3, 0.5, 2)] * 2
    assert of(runs.configure([*flags, "--beta", "0", "--lam", "0"])) == [(3, 1, 5), (3, 0, 0)]


# Which samples ----------------------------------------------------------------------------------------------


def test_drawn_domains_stand_beside_folders_and_a_limit_takes_some_samples():
    drawn = ["--data", "atr=figures", "cihp=figures", "--preset", "small"]
    config = runs.configure([*drawn, "--limit", "cihp=20"])
    (atr, cihp), val_sets = runs.open_data(config, Figures)
    assert (atr.domain.name, len(atr), cihp.domain.name, len(cihp)) == ("atr", 2000, "cihp", 20)
    assert len(val_sets[0]) == 80 and atr.where(0) == "figure 1 of seed 0", "the same as without --data"
    fewer = runs.open_data(config | {"limit": ["cihp=5"]}, Figures)[0][1]
    assert set(fewer.indices) < set(cihp.indices)
    assert runs.open_data(config | {"limit": ["cihp=5"], "seed": 1}, Figures)[0][1].indices != fewer.indices


@pytest.mark.parametrize("spec", ["pascal", "pascal=", "=3", "pascal=0", "pascal=-1", "pascal=half"])
def test_a_limit_that_is_none(spec):
    with pytest.raises(InputError, match=f"--limit {spec}: write NAME=N with a whole number from 1 on"):
        runs.configure(["--limit", spec])


def test_a_limit_of_a_domain_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--limit atr=3: 'atr' is none of the run's label domains, pascal"):
        runs.configure(["--data", "pascal=figures", "--limit", "atr=3", "--preset", "small"])
    flags = ["--mode", "dedicated", "--source", "cihp=x", "--target", "pascal=y", "--limit"]
    assert runs.configure([*flags, "pascal=3"]).limit == ["pascal=3"]


# Matrices that would have no effect, and files that move ----------------------------------------------------


def test_matrices_that_would_have_no_effect_are_refused(tmp_path):
    path = masks(tmp_path, intra={"pascal": torch.eye(7).int().tolist()})
    with pytest.raises(InputError, match="--masks .*: has no meaning with --beta 0 --lam 0"):
        runs.configure(["--masks", str(path), "--beta", "0", "--lam", "0"])
    with pytest.raises(InputError, match="masks.json: holds M_intra, which --intra-mask none leaves out"):
        scenarios.build(BASE | {"masks": str(path), "intra_mask": "none"}, DOMAINS)


def test_the_file_of_matrices_may_move_while_a_run_goes_on(tmp_path, monkeypatch):
    path = masks(tmp_path, static={"pascal:atr": torch.rand(18, 7).tolist()})
    run(monkeypatch, *SHORT, "--steps", 1, "--validations", 0, "--masks", path, "--out", tmp_path / "run")
    moved = path.rename(tmp_path / "moved.json")
    (tmp_path / "run/samples.png").unlink()
    run(monkeypatch, "--resume", tmp_path / "run", "--masks", moved)
    assert (tmp_path / "run/samples.png").exists()


def test_dedicated_parsing_with_beta_0_trains_both_steps(tmp_path, monkeypatch):
    flags = ["--mode", "dedicated", *SHORT, "--steps", 1, "--validations", 0, "--beta", 0]
    run(monkeypatch, *flags, "--out", tmp_path / "run")
    assert set(lines(tmp_path / "run")[0]["loss"]) == {"seg/pascal", "dataset", "img", "total"}


# The losses as published ------------------------------------------------------------------------------------


PUBLISHED = dict(alpha=10, beta=1, lam=5, scr="both", cross=0, intra_mask="body",
                 connect="full", regions="label")


@pytest.mark.parametrize("name", ["demo", "small", "lite", "paper"])
def test_one_flag_gives_the_published_losses_in_any_preset(name, monkeypatch):
    data = ["--data", "pascal=x"] if name == "paper" else []
    for setting in ("beta", "lam", "cross"):  # a preset of the future
        monkeypatch.setitem(ROWS[setting].columns, name, 0.125)
    published = runs.configure(["--preset", name, "--sst", "published", *data])
    assert {key: getattr(published, key) for key in PUBLISHED} == PUBLISHED
    own = runs.configure(["--preset", name, *data])
    assert own.cross == 0.125 and own.lr == published.lr
    changed = runs.configure(["--preset", name, "--sst", "published", "--lam", "2", *data])
    assert (changed.lam, changed.beta) == (2, 1), "a flag of its own goes first"


@pytest.mark.parametrize("name, same, other", [
    ("scr_form", "published", "centred"), ("association", "counts", "words")])
def test_a_run_with_a_loss_that_is_gone_is_refused(name, same, other, tmp_path):
    fields = vars(preset("demo"))
    assert vars(restored(fields | {name: same})) == vars(restored(fields))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields | {"out": "x", name: other}))
    with pytest.raises(InputError, match=f"config.json: the run was trained with {name} {other}, which"):
        runs.saved(file)
