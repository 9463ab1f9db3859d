"""What is not the paper's: L_cross, and the tables of associations that it reads, by hand."""

import json
from math import log
from pathlib import Path

import pytest
import torch
from test_train import BASE, DOMAINS, SHORT, batches, lines, run

from sst import checkpoint, runs, scenarios
from sst.association import Association, one_hot
from sst.distributed import StepStatistics
from sst.domains import LabelDomain, word_similarity
from sst.errors import InputError
from sst.losses import L_cross, L_u

COARSE = LabelDomain("coarse", ("background", "head"))
FINE = LabelDomain("fine", ("background", "hat", "face"))


def logits(*pixels):
    """(1, Z, 1, n) logits whose softmax is each pixel's probabilities."""
    return torch.tensor(pixels).log().T[None, :, None]


def test_l_cross_is_the_likelihood_of_the_label_in_the_other_domains_words():
    # Head `coarse` says head with 3/4; a head is a hat with 1/4, a face with 3/4; the background is itself.
    T = torch.tensor([[1.0, 0, 0], [0, 0.25, 0.75]])
    A = logits([0.25, 0.75])
    for label, expected in ((0, -log(0.25)), (1, -log(0.75 * 0.25)), (2, -log(0.75 * 0.75))):
        assert L_cross(A, torch.tensor([[[label]]]), T).item() == pytest.approx(expected, abs=1e-4)


def test_ignored_pixels_do_not_count_and_an_image_of_them_is_0():
    T, A = torch.eye(2), logits([0.5, 0.5], [0.25, 0.75])
    one = L_cross(A, torch.tensor([[[0, 255]]]), T)
    assert one.item() == pytest.approx(log(2), abs=1e-5)
    assert L_cross(A, torch.tensor([[[255, 255]]]), T) == 0
    both = L_cross(torch.cat([A, A]), torch.tensor([[[0, 255]], [[255, 255]]]), T)
    assert both.item() == pytest.approx(one.item() / 2)


def test_its_gradient_is_one_step_of_em():
    """d/dA = p - q, q(k) in proportion to p(k) T(k, y): the posterior of the head's class given the label."""
    T = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.0001, 0.9999]])
    A = logits([0.5, 0.3, 0.2]).requires_grad_()
    L_cross(A, torch.tensor([[[1]]]), T).backward()
    p = torch.tensor([0.5, 0.3, 0.2])
    q = p * T[:, 1] / (p * T[:, 1]).sum()
    torch.testing.assert_close(A.grad.flatten(), p - q, atol=1e-5, rtol=1e-4)


def test_an_association_counts_what_a_head_says_where_another_domain_has_a_label():
    association = Association([COARSE, FINE])
    # Two labelled pixels of `fine`: a hat, which head `coarse` calls head with 1, and background, called head
    # with 1/2.
    p, Y = logits([1e-9, 1], [0.5, 0.5]).softmax(1), torch.tensor([[[1, 0]]])
    association.count("coarse", "fine", p, one_hot(Y, 3), Y)
    assert not association.eval().count("coarse", "fine", p, one_hot(Y, 3), Y), "not while it is evaluated"
    N = getattr(association, "N:coarse:fine")
    torch.testing.assert_close(N, 0.02 * torch.tensor([[0.25, 0, 0], [0.25, 0.5, 0]]), atol=1e-6, rtol=1e-4)
    T = association.T("coarse", "fine")
    words = getattr(association, "words:coarse:fine")
    expected = N[1] + 0.3 * N[1].sum() * words[1]
    torch.testing.assert_close(T.sum(-1), torch.ones(2))
    torch.testing.assert_close(T[1], expected / expected.sum(), atol=1e-4, rtol=1e-3)


def test_an_association_without_a_count_is_the_similarity_of_words():
    association = Association([COARSE, FINE])
    for j, i in ((COARSE, FINE), (FINE, COARSE)):
        expected = (word_similarity(j, i) / 0.1).softmax(-1)
        torch.testing.assert_close(association.T(j.name, i.name), expected)
    assert association.T("coarse", "fine")[0].argmax() == 0, "background is background"


@pytest.mark.parametrize("change", [{}, {"beta": 0, "lam": 0}], ids=str)
def test_a_few_steps_lower_l_cross(change):
    model = scenarios.build(BASE | {"cross": 1.0} | change, DOMAINS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (batch,) = batches(DOMAINS, 1)
    losses = []
    for _ in range(6):
        terms, _ = model(*batch[:3])
        losses.append(terms["cross"].item())
        L_u(terms, cross=10).backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0], losses


LITE = ["--preset", "lite", "--backbone-weights", "none", "--freeze-stages", 0, "--size", "64x64",
        "--crop", "64x64", "--log-every", 1, "--data", "pascal=figures", "atr=figures", "cihp=figures"]


@pytest.mark.parametrize("flags", [[*SHORT, "--cross", 1], LITE], ids=["beside SST", "lite"])
def test_the_network_is_the_one_without_it_and_nothing_of_it_is_kept(flags, tmp_path, monkeypatch):
    one, two = (scenarios.build(BASE | {"cross": w}, DOMAINS).net.state_dict() for w in (1.0, 0.0))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    short = ["--steps", 2, "--batch-size", 3, "--validations", 0]
    run(monkeypatch, *flags, *short, "--out", tmp_path / "run")
    kept = torch.load(tmp_path / "run/model.pt", weights_only=True)["weights"]
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)["weights"]
    assert (last["association.N:atr:cihp"] > 0).any() and "cross" in lines(tmp_path / "run")[0]["loss"]
    assert any(key.startswith("sst.") for key in last) == (flags is not LITE)
    run(monkeypatch, *flags, *short, "--beta", 0, "--lam", 0, "--cross", 0, "--out", tmp_path / "baseline")
    assert kept.keys() == torch.load(tmp_path / "baseline/model.pt", weights_only=True)["weights"].keys()
    assert same_logits(tmp_path / "run", DOMAINS)


def test_the_lines_of_usage_md_print_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, *LITE, "--steps", 1, "--batch-size", 3, "--validations", 0, "--out", "runs/mine")
    usage = (Path(__file__).parent.parent / "docs/usage.md").read_text()
    block = next(code for code in usage.split("```python\n")[1:] if "association.T" in code)
    capsys.readouterr()
    exec(block.split("```")[0], {})
    printed = capsys.readouterr().out
    assert "\ncihp in the words of pascal\nbackground: " in printed
    rows = [line for line in printed.splitlines() if ": " in line]
    assert len(rows) == 2 * sum(d.num_classes for d in DOMAINS) and all(row.count(" 0.") == 3 for row in rows)


def same_logits(out, domains):
    """Whether model.pt gives the logits of the network in last.pt, bit for bit."""
    trained = scenarios.build(runs.saved(out / "config.json"), domains)
    checkpoint.load_weights(trained, torch.load(out / "last.pt", weights_only=True)["weights"], "last.pt")
    images = torch.rand(1, 3, 64, 64)
    one, two = trained.eval().net(images), checkpoint.load_model(out / "model.pt")[0](images)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_its_weight_rises_and_the_total_has_it(tmp_path, monkeypatch):
    flags = [*SHORT, "--cross", 0.5, "--cross-ramp", 1, "--steps", 2, "--validations", 0]
    run(monkeypatch, *flags, "--out", tmp_path / "run")
    trained = [line for line in lines(tmp_path / "run") if line["kind"] == "train"]
    for line, ramp in zip(trained, (0.5, 1)):
        loss = line["loss"]
        paper = L_u({name: value for name, value in loss.items() if name != "total"})
        assert loss["total"] == pytest.approx(paper + 10 * 0.5 * ramp * loss["cross"], rel=1e-5)


def test_counts_are_statistics_of_a_step():
    """Two micro-batches, each from the counts before the step; their mean. A skipped step leaves no trace."""
    model = scenarios.build(BASE | {"cross": 1.0}, DOMAINS).train()
    statistics, N = StepStatistics(model), getattr(model.association, "N:atr:cihp")
    one, two = batches(DOMAINS, 2)
    alone = []
    for batch in (one, two):
        statistics.begin()
        model(*batch[:3])
        alone.append(N.clone())
        statistics.undo()
        assert (N == 0).all()
    statistics.begin()
    for batch in (one, two):
        model(*batch[:3])
        statistics.collect()
    statistics.finish(2)
    torch.testing.assert_close(N, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("taught", [[], ["--cross-to", "atr"]], ids=str)
def test_a_run_with_it_resumes_bit_for_bit(taught, tmp_path, monkeypatch):
    flags = [*SHORT, "--cross", 1, *taught, "--validations", 0, "--save-every", 1]
    run(monkeypatch, *flags, "--steps", 3, "--out", tmp_path / "whole")
    content = torch.load(tmp_path / "whole/previous.pt", weights_only=True)  # of step 2
    (tmp_path / "part").mkdir()
    torch.save(content, tmp_path / "part/last.pt")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    (tmp_path / "part/config.json").write_text(json.dumps(config))
    run(monkeypatch, "--resume", tmp_path / "part")
    whole, part = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(whole["weights"][key], part["weights"][key]) for key in whole["weights"])


def test_it_teaches_the_heads_that_are_named():
    """Alone they pay what is theirs of the whole, and the other heads get no gradient of it."""
    (batch,), names, alone = batches(DOMAINS, 1), [d.name for d in DOMAINS], {}
    for taught in (names[:1], names[1:2], names[2:], []):
        model = scenarios.build(BASE | {"cross": 1.0, "cross_to": taught}, DOMAINS).train()
        terms, _ = model(*batch[:3])
        terms["cross"].backward()
        alone[" ".join(taught)] = terms["cross"].item()
        heads = {name for name, head in model.net.heads.items() if head.weight.grad is not None}
        assert heads == set(taught or names)
    whole = alone.pop("")
    assert len(alone) == 3 and min(alone.values()) > 0
    assert sum(alone.values()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("flags", [["--cross", 1, "--cross-to", "ade"], ["--cross", 0, "--cross-to", "atr"],
                                   ["--cross", 1, "--cross-to", "atr", "--data", "atr=figures"]], ids=str)
def test_a_head_that_it_cannot_teach_is_refused(flags, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=f"--cross-to {flags[3]}: takes names of "):
        run(monkeypatch, *SHORT, *flags, "--out", tmp_path / "run")


def test_the_preset_paper_has_none_of_it():
    assert runs.configure(["--data", "pascal=x"]).cross == 0
    assert scenarios.build(BASE, DOMAINS).association is None


def test_one_domain_has_no_l_cross(tmp_path, monkeypatch):
    flags = [*SHORT, "--cross", 1, "--steps", 1, "--validations", 0, "--preset", "small"]
    run(monkeypatch, *flags, "--data", "pascal=figures", "--out", tmp_path / "run")
    assert "cross" not in lines(tmp_path / "run")[0]["loss"]


# In dedicated parsing a frozen source says what it sees


def test_a_belief_costs_the_mean_of_what_its_labels_cost():
    T = torch.tensor([[1.0, 0, 0], [0, 0.25, 0.75]])
    A, Y = logits([0.25, 0.75], [0.5, 0.5]), torch.tensor([[[0, 255]]])  # the second pixel is ignored
    q = torch.tensor([0.5, 0.3, 0.2]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    each = [L_cross(A, torch.tensor([[[label, 255]]]), T).item() for label in range(3)]
    assert L_cross(A, Y, T, q).item() == pytest.approx(0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2])


def test_a_frozen_source_is_counted_where_the_target_has_labels():
    association = Association([COARSE], sources=[FINE])
    assert association.pairs == [("coarse", "fine")]
    # The target's labels: head, background, and a pixel that is ignored. The source: surely a hat; background
    # or face with 1/2 each; anything.
    source = {"fine": logits([1e-9, 1, 1e-9], [0.5, 1e-9, 0.5], [1, 1, 1])}
    A, Y = {"coarse": logits([0.5, 0.5], [0.5, 0.5], [0.5, 0.5])}, torch.tensor([[[1, 0, 255]]])
    loss = association(A, Y, ["coarse"], source=source)
    T = Association([COARSE], sources=[FINE]).T("coarse", "fine")  # nothing was counted before
    assert loss.item() == pytest.approx(L_cross(A["coarse"], Y, T, source["fine"].softmax(1)).item())
    expected = 0.02 * torch.tensor([[0.25, 0, 0.25], [0, 0.5, 0]])
    torch.testing.assert_close(getattr(association, "N:coarse:fine"), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("flags", [["--beta", 0, "--lam", 0], ["--sst", "published", "--cross", 1]], ids=str)
def test_dedicated_parsing_with_l_cross(flags, tmp_path, monkeypatch):
    short = [*SHORT, "--validations", 0, "--mode", "dedicated", "--source-steps", 1, "--steps", 2]
    run(monkeypatch, *short, "--cross", 1, *flags, "--out", tmp_path / "run")
    first, second = lines(tmp_path / "run")
    assert first["loss"]["cross"] > 0
    weights = torch.load(tmp_path / "run/last.pt", weights_only=True)["weights"]
    assert (weights["association.N:pascal:cihp"] > 0).any()
    run(monkeypatch, *short, "--beta", 0, "--lam", 0, "--out", tmp_path / "plain")
    kept, plain = (torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"]
                   for name in ("run", "plain"))
    assert kept.keys() == plain.keys() and "cross" not in lines(tmp_path / "plain")[0]["loss"]
    assert all(torch.equal(kept[key], weights[f"net.{key}"]) for key in kept)


def test_a_run_starts_from_one_with_associations(tmp_path, monkeypatch, capsys):
    run(monkeypatch, *SHORT, "--cross", 1, "--steps", 1, "--validations", 0, "--out", tmp_path / "run")
    run(monkeypatch, *SHORT, "--cross", 1, "--steps", 1, "--validations", 0, "--init-from", tmp_path / "run",
        "--out", tmp_path / "next")
    assert "associations" in capsys.readouterr().out
