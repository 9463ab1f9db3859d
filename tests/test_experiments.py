"""experiments.py: the statistics by hand, the page from made-up cells, every cell a run of train.py."""

import json
from statistics import mean, stdev
from types import SimpleNamespace

import pytest

import experiments
import results
from sst import runs
from sst.config import preset
from sst.domains import builtin_domain


def cell(variant, seed, score, bed="balanced-photos", step=0.5, steps=500, **more):
    scores = {"mean": score, "ccp-coarse": score + 20, "ccp-fine": 60 - score, "ccp-fine: hat": 0}
    return {"bed": bed, "variant": variant, "seed": seed, "scores": scores, "seconds a step": step,
            "steps": steps} | more


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Four seeds of two variants, a fifth that only one has, and two of the baseline with more steps.

    The ceiling of a poor domain, of which there are two, are the first five.
    """
    monkeypatch.setattr(experiments, "CELLS", tmp_path / "cells.jsonl")
    monkeypatch.setattr(experiments, "TUNING", tmp_path / "tuning.jsonl")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(results, "PICTURE", tmp_path / "results.png")
    made = [cell("multi", seed, 30.0 + seed) for seed in range(5)]
    made += [cell("cross", seed, 30.0 + seed + gain, step=0.6) for seed, gain in enumerate((1, 2, 3, 4))]
    made += [cell("multi steps=600", seed, 30.5 + seed, steps=600) for seed in (0, 1)]
    made += [cell("cross steps=600", seed, 33.5 + seed, step=0.6, steps=600) for seed in (0, 1)]
    made += [cell("sst", 0, 29.0, step=0.9), cell("sst beta=0", 0, 29.0, step=0.6, **{"other work": True})]
    made += [cell("multi", seed, 25.0 + seed, "poor-coarse", **{"other work": True}) for seed in (0, 1)]
    made += [cell("cross", 0, 26.0, "poor-coarse"), cell("cross cross-to=ccp-coarse", 1, 29.0, "poor-coarse")]
    made += [cell("multi", 0, 50.0, "pool-1"), cell("multi", 0, 51.0, "pool-6")]
    made += [cell("cross", 0, 53.0, "pool-6")]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    (tmp_path / "tuning.jsonl").write_text(json.dumps(cell("multi lr=0.006", 0, 28.0)) + "\n")
    return tmp_path


def test_the_p_value_is_that_of_a_table():
    # Student's t: two-sided 5 % at t = 4.303 with 2 degrees of freedom and 2.365 with 7; 1 % at 3.499 with 7.
    for t, n, p in ((4.303, 3, 0.05), (2.365, 8, 0.05), (3.499, 8, 0.01)):
        values = [(-1.0) ** k for k in range(n)]
        m, s = mean(values), stdev(values)
        shifted = [value - m + t * s / n ** 0.5 for value in values]
        assert results.p_value(shifted) == pytest.approx(p, rel=2e-3)
    assert results.p_value([1, -1]) == pytest.approx(1)


def test_differences_are_paired_by_seed():
    one, two = {0: 31, 1: 33, 2: 35, 3: 37}, {3: 33, 2: 32, 1: 31, 0: 30, 4: 34}
    assert results.paired(one, two) == [1, 2, 3, 4], "seed 4 has no partner"


def test_the_page_keeps_its_words_and_shows_what_was_measured(cells):
    (cells / "results.md").write_text("# Results\n\nThe answer.\n\n<!-- tables -->\nold tables\n")
    experiments.report(None)
    page = (cells / "results.md").read_text()
    assert page.startswith("# Results\n\nThe answer.\n\n") and "old tables" not in page
    assert "| Multi-datasets | 32.00 ± 0.71 | 5 | | | | 0.500 s |" in page
    assert "| Multi-datasets, steps=600 | 31.00 ± 0.50 | 2 | | | | 0.500 s |" in page
    # Against seeds 0 to 3 at equal steps: 1, 2, 3, 4. Against seeds 0 and 1 with more steps: 0.5, 1.5.
    assert ("| 34.00 ± 1.29 | 4 | +2.50 ± 0.65, 4 of 4, p 0.03 | +1.00 ± 0.50, 2 of 2, p 0.3 |  | 1.20 x |"
            in page)
    # A longer variant stands beside the baseline that is as long, which does not have its time.
    row = "| + L_cross, steps=600 | 34.00 ± 0.50 | 2 | +3.00 ± 0.00, 2 of 2, p nan |  |  | 1.20 x |"
    assert row in page
    # The longer baseline took 1.2 times as long: no match for 1.8, nor for a time that says nothing.
    assert "| SST as published | 29.00 | 1 | -1.00, 0 of 1 |  |  | 1.80 x |" in page
    assert "| SST as published, beta=0 | 29.00 | 1 | -1.00, 0 of 1 |  |  | not measured |" in page
    # The test bed of a poor domain stands beside what the same domain reaches with all its labels.
    assert "| Multi-datasets | 45.50 ± 0.50 | 2 | | | | not measured |" in page
    # What its head gains the other one loses: 35 without, 34 with L_cross.
    assert "| 46.00 | 1 | +1.00, 1 of 1 |  | -1.00, 0 of 1 | not measured |" in page
    assert "| ceiling: Multi-datasets, all 267 photos of `ccp-coarse` | 52.00 ± 0.71 | 5 | | | | |" in page
    run = "python experiments.py run --photos DIR --only balanced-photos --variants"
    for which in ("multi --seeds 0 1 2 3 4", 'multi cross --try "steps=600" --seeds 0 1',
                  "cross --seeds 0 1 2 3"):
        assert f"{run} {which}\n" in page
    assert "| balanced-photos | Multi-datasets, lr=0.006 | 28.00 | 1 |" in page
    assert "scored | baseline" not in page, "there is no place for the table of all test beds"
    assert (cells / "results.png").stat().st_size > 5000


def test_another_image_size_stands_beside_the_baseline_of_that_size(cells):
    size, ceiling = "crop=192x128 size=192x128", results.CEILINGS["poor-coarse"][0]
    made = {f"multi {size}": 40.0, f"cross {size}": 42.0, "multi lr=0.006": 50.0, "cross lr=0.006": 51.0}
    with (cells / "cells.jsonl").open("a") as file:
        file.writelines(json.dumps(cell(variant, 0, score)) + "\n" for variant, score in made.items())
    experiments.report(None)
    page = (cells / "results.md").read_text()
    words = size.replace(" ", ", ")
    assert f"| + L_cross, {words} | 42.00 | 1 | +2.00, 1 of 1 |" in page
    assert "| + L_cross, lr=0.006 | 51.00 | 1 | +1.00, 1 of 1 |" in page
    assert f"| ceiling: Multi-datasets, {words}, {ceiling} | 60.00 | 1 |" in page
    assert all(f"| ceiling: Multi-datasets, {other}" not in page for other in ("lr=", "steps="))


def test_every_test_bed_is_a_row_between_two_lines(cells):
    (cells / "results.md").write_text("Before.\n<!-- glance -->\nold\n<!-- glance -->\nAfter.\n")
    for _ in range(2):  # and once more, from the page that it wrote
        experiments.report(None)
    before, table, after = (cells / "results.md").read_text().split("<!-- glance -->")
    assert before == "Before.\n" and after.startswith("\nAfter.\n") and "old" not in table
    columns = table.split("\n")[2].strip("| ").split(" | ")
    assert columns[:3] == ["test bed", "scored", "baseline"] and columns[4::2] == ["the other heads"] * 3
    assert columns[3::2] == ["+ L_cross", "+ L_cross, to that head alone", "SST as published"]
    # The plain variants alone; L_cross gains for `ccp-coarse` what `ccp-fine` loses.
    gains, losses = "+2.50 ± 0.65, 4 of 4, p 0.03", "-2.50 ± 0.65, 0 of 4, p 0.03"
    for row in (
            "| [balanced-photos](#balanced-photos) | mean | 32.00 ± 0.71 "
            f"| {gains} |  | | | -1.00, 0 of 1 |  |",
            "| [poor-coarse](#poor-coarse) | ccp-coarse | 45.50 ± 0.50 "
            "| +1.00, 1 of 1 | -1.00, 0 of 1 | +3.00, 1 of 1 | -3.00, 0 of 1 | | |",
            "| [pool-3](#pool) | ccp-coarse | 52.00 ± 0.71 "
            f"| {gains} | {losses} | | | -1.00, 0 of 1 | +1.00, 1 of 1 |",
            "| [pool-1](#pool) | ccp-coarse | 70.00 | | | | | | |"):
        assert row in table.splitlines()


def test_test_beds_that_differ_in_a_number_are_one_table(cells):
    experiments.report(None)
    page = (cells / "results.md").read_text()
    table = page[page.index("## pool\n"):].split("\n## ")[0]
    assert "| test bed | | ccp-coarse, mIoU % | n |" in table
    rows = [line for line in table.splitlines() if line.startswith("| pool-")]
    # pool-3 is another test bed with another score. Changed flags and more steps stay there.
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| pool-1", "Multi-datasets", "70.00", "1"], ["| pool-3", "Multi-datasets", "52.00 ± 0.71", "5"],
        ["| pool-3", "+ L_cross", "54.00 ± 1.29", "4"], ["| pool-3", "SST as published", "49.00", "1"],
        ["| pool-6", "Multi-datasets", "71.00", "1"], ["| pool-6", "+ L_cross", "73.00", "1"]]
    assert "--only balanced-photos --variants multi --seeds 0 1 2 3 4\n" in table
    assert "--only pool-3" not in page
    with pytest.raises(SystemExit):
        experiments.arguments().parse_args(["run", "--photos", "x", "--only", "pool-3"])


def parsed(*flags):
    """What `experiments.py run` gets of balanced-photos and these variants and flags."""
    words = ["run", "--photos", "x", "--only", "balanced-photos", "--variants", *flags]
    return experiments.arguments().parse_args(words)


def test_finished_cells_are_not_done_again(cells, capsys):
    args = parsed("multi", "cross", "--seeds", "3", "4", "--dry-run")
    assert args.go(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["1 cells to do, 2 side by side", "  balanced-photos, cross, seed 4"]


@pytest.mark.parametrize("changed, ending", [("", ""), (" M train.py\n", "-dirty")])
def test_a_cell_names_its_commit(changed, ending, monkeypatch):
    """What the run itself writes, docs/cells.jsonl, makes no other commit."""
    def run(words, **how):
        assert words[1] != "status" or words[-1] == ":!docs"
        return SimpleNamespace(stdout=changed if words[1] == "status" else "abc1234\n")

    monkeypatch.setattr(experiments.subprocess, "run", run)
    assert experiments.about()["commit"] == f"abc1234{ending}"


def test_the_order_of_changed_flags_makes_no_other_cell(cells):
    line = json.dumps(cell("sst lam=0.5 beta=0.1", 4, 31.0)) + "\n"
    (cells / "cells.jsonl").write_text((cells / "cells.jsonl").read_text() + line)
    args = parsed("sst", "--seeds", "4", "5", "--try", "beta=0.1 lam=0.5")
    args.cells = experiments.CELLS
    assert experiments.wanted(args) == [("balanced-photos", "sst beta=0.1 lam=0.5", 5)]


def test_the_seeds_are_those_of_the_page_and_not_those_of_tuning():
    assert parsed("multi").seeds == list(range(8, 16))
    kept, tuned = (experiments.kept(path) for path in (experiments.CELLS, experiments.TUNING))
    assert {c["seed"] for c in kept} == set(range(8, 16))
    assert not {c["seed"] for c in tuned} & set(range(8, 16))


@pytest.mark.parametrize("load, words", [(2.3, {}), (2.6, {"other work": True})])
def test_times_beside_other_work_are_marked(load, words, monkeypatch):
    monkeypatch.setattr(experiments.os, "getloadavg", lambda: (9.0, load, 0.0), raising=False)
    assert experiments.busy(jobs=2) == words


def test_equal_time_is_no_less_time_and_hardly_more():
    made = [cell("multi", 0, 30.0), cell("cross", 0, 33.0, step=0.525)]
    made += [cell(f"multi steps={steps}", 0, score, steps=steps)
             for steps, score in ((1000, 36.0), (333, 28.0), (519, 30.5), (525, 31.0))]
    bed = results.Bed("balanced-photos", "?", "mean", made, {"multi": "Multi-datasets", "cross": "+ L_cross"})
    assert bed.at_equal_time("cross", 1.05) == "+2.00, 1 of 1", "against 525 steps"
    assert bed.at_equal_time("cross", 1.03) == "+2.50, 1 of 1" and bed.at_equal_time("cross", 1.5) == ""


def test_a_file_of_one_s_own_begins_anew(cells, capsys):
    args = parsed("multi", "--seeds", "3", "4", "--dry-run", "--cells", str(cells / "my.jsonl"))
    assert args.go(args) == 0 and capsys.readouterr().out.startswith("2 cells to do")
    assert not (cells / "my.jsonl").exists()


def test_a_cell_that_fails_is_named_and_nothing_is_kept(cells, capsys, monkeypatch):
    def fail(words, args, out=None):
        raise RuntimeError("train.py: no such folder")

    monkeypatch.setattr(experiments, "program", fail)
    args = parsed("cross", "--seeds", "4")
    before = (cells / "cells.jsonl").read_text()
    assert args.go(args) == 1 and (cells / "cells.jsonl").read_text() == before
    assert "balanced-photos, cross, seed 4: failed: train.py: no such folder" in capsys.readouterr().out


@pytest.mark.parametrize("bed, variant", [
    (bed, variant) for bed in experiments.BEDS for variant in experiments.variants_of(bed)])
def test_every_cell_is_a_run_of_train(bed, variant, monkeypatch):
    source = {"source_checkpoint": preset("lite")}
    monkeypatch.setattr(runs, "before", lambda given: source.get(next(iter(source.keys() & given), None)))
    config = runs.configure(experiments.flags_of(bed, f"{variant} lr=0.006", 3))
    name = "demo" if bed == "demo" else "lite"
    assert (config.preset, config.seed, config.lr) == (name, 3, 0.006) and config.steps


@pytest.mark.parametrize("bed", [bed for bed in experiments.BEDS if bed != "unseen-labels"])
def test_a_cell_is_scored_on_the_domains_that_it_trains(bed, monkeypatch):
    def evaluate(out, data, flags, args):
        specs.extend(data)
        return {spec.split("=")[0]: {"miou": 10.0 + k} for k, spec in enumerate(data)}

    specs = []
    monkeypatch.setattr(experiments, "evaluate", evaluate)
    scores = experiments.score(bed, None, None)
    flags = experiments.BEDS[bed][1]
    trained = flags[flags.index("--target" if "dedicated" in bed else "--data") + 1:]
    assert specs == [word for word in trained if "=" in word and not word.split("=")[1].isdigit()]
    assert experiments.BEDS[bed][2] in scores and scores["mean"] == 10 + (len(specs) - 1) / 2


def test_held_back_photos_are_in_no_training_list(tmp_path):
    photos = tmp_path / "photos"
    folders = experiments.hold_back(photos, tmp_path / "back")
    lists = {name: [(tmp_path / "back" / name / f"{split}_id.txt").read_text().split()
                    for split in ("train", "val")] for name in folders}
    back = lists["ccp-fine"][1]
    assert len(back) == 162 and all(val == back for _, val in lists.values())
    assert [len(train) for train, _ in lists.values()] == [213, 213, 212, 638]
    assert not any(set(train) & set(back) for train, _ in lists.values())
    official = (experiments.BUILTIN / "ccp_val_id.txt").read_text().split()
    assert not set(official) & {id for train, _ in lists.values() for id in train + back}
    fields = json.loads((tmp_path / "back/ccp-fine/domain.json").read_text())
    assert fields["images"] == f"{photos}/photos" and fields["classes"][0] == "background"


@pytest.mark.parametrize("head, lacks", [("atr", set()), ("ccp-fine", set()), ("cihp", {"bag", "belt"})])
def test_the_maps_of_classes_are_whole(head, lacks):
    classes = json.loads((experiments.MAPS / f"{head}-to-ccp-common.json").read_text())
    assert set(classes) == set(builtin_domain(head).classes)
    assert set(classes.values()) - {None} == set(builtin_domain("ccp-common").classes) - lacks
