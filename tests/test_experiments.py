"""experiments.py: the statistics by hand, the page from made-up cells, every cell a run of train.py."""

import json

import pytest

import experiments
from sst import runs
from sst.domains import builtin_domain


def cell(variant, seed, score, bed="balanced-photos", step=0.5):
    return {"bed": bed, "variant": variant, "seed": seed, "scores": {"mean": score}, "seconds a step": step}


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Four seeds of two variants, and a fifth that only one has."""
    for name, file in (("CELLS", "cells.jsonl"), ("PAGE", "results.md"), ("PICTURE", "results.png")):
        monkeypatch.setattr(experiments, name, tmp_path / file)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    made = [cell("multi", seed, 30.0 + seed) for seed in range(5)]
    made += [cell("cross", seed, 30.0 + seed + gain, step=0.6) for seed, gain in enumerate((1, 2, 3, 4))]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    return tmp_path


def test_the_p_value_is_that_of_a_table():
    # Student's t: two-sided 5 % at t = 4.303 with 2 degrees of freedom and 2.365 with 7; 1 % at 3.499 with 7.
    for t, n, p in ((4.303, 3, 0.05), (2.365, 8, 0.05), (3.499, 8, 0.01)):
        values = [(-1.0) ** k for k in range(n)]
        m, s = experiments.mean(values), experiments.stdev(values)
        shifted = [value - m + t * s / n ** 0.5 for value in values]
        assert experiments.p_value(shifted) == pytest.approx(p, rel=2e-3)
    assert experiments.p_value([1, -1]) == pytest.approx(1)


def test_differences_are_paired_by_seed(cells):
    scores = experiments.by_variant("balanced-photos")
    assert experiments.paired(scores["cross"], scores["multi"]) == [1, 2, 3, 4], "seed 4 has no partner"


def test_the_page_keeps_its_words_and_shows_what_was_measured(cells):
    (cells / "results.md").write_text("# Results\n\nThe answer.\n\n<!-- tables -->\nold tables\n")
    experiments.report(None)
    page = (cells / "results.md").read_text()
    assert page.startswith("# Results\n\nThe answer.\n\n") and "old tables" not in page
    assert "| Multi-datasets | 32.00 ± 0.71 | 5 | | | | 0.500 s |" in page
    assert "| 34.00 ± 1.29 | 4 | 2.50 ± 0.65 | 4 of 4 | 0.03 | 1.20 x |" in page
    assert (cells / "results.png").stat().st_size > 5000


def parsed(*flags):
    """What `experiments.py run` gets of balanced-photos and these variants and flags."""
    words = ["run", "--photos", "x", "--only", "balanced-photos", "--variants", *flags]
    return experiments.arguments().parse_args(words)


def test_finished_cells_are_not_done_again(cells, capsys):
    args = parsed("multi", "cross", "--seeds", "3", "4", "--dry-run")
    assert args.go(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["1 cells to do, 2 side by side", "  balanced-photos, cross, seed 4"]


def test_a_cell_that_fails_is_named_and_nothing_is_kept(cells, capsys, monkeypatch):
    def fail(words, args, out=None):
        raise RuntimeError("train.py: no such folder")

    monkeypatch.setattr(experiments, "program", fail)
    args = parsed("cross", "--seeds", "4")
    before = (cells / "cells.jsonl").read_text()
    assert args.go(args) == 1 and (cells / "cells.jsonl").read_text() == before
    assert "balanced-photos, cross, seed 4: failed: train.py: no such folder" in capsys.readouterr().out


@pytest.mark.parametrize("variant", experiments.VARIANTS)
@pytest.mark.parametrize("bed", experiments.BEDS)
def test_every_cell_is_a_run_of_train(bed, variant):
    config = runs.configure([*experiments.BEDS[bed][1], *experiments.VARIANTS[variant], "--seed", "3"])
    assert config.steps and config.preset == "lite" and config.seed == 3


@pytest.mark.parametrize("head, classes", [("atr", experiments.ATR_TO_COMMON),
                                           ("ccp-fine", experiments.FINE_TO_COMMON)])
def test_the_maps_of_classes_are_whole(head, classes):
    assert set(classes) == set(builtin_domain(head).classes)
    assert set(classes.values()) - {None} == set(builtin_domain("ccp-common").classes)
