"""The documents: commands are accepted, links lead to files, reproduce.md makes the runs that it uses."""

import re
import shlex
from pathlib import Path

import pytest

import evaluate
import predict
from sst import checkpoint, runs

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("train.py", "evaluate.py", "predict.py")
ON_OFF = {"&&", "||", ";", "|", ">", "2>"}


def commands(text):
    """Argument lists [program, flag, ...] of a document's commands, in its code blocks and in its text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    inline = [" ".join(code.split()) for code in re.findall(r"`((?:python3?|torchrun) [^`]+)`", prose)]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines() + inline:
        if not any(program in line for program in PROGRAMS):
            continue
        words, command = shlex.split(line, comments=True), None
        for word in words + [";"]:
            if word in ON_OFF:
                if command:
                    yield command
                command = None
            elif word in PROGRAMS and command is None:
                command = [word]
            elif command is not None and word != "...":
                command.append(word)


def accept(command, monkeypatch):
    """Parse a command as its program does. The checkpoints that it starts from are made up."""
    program, *flags = command
    if "--help" in flags:
        return
    if program == "evaluate.py":
        evaluate.arguments().parse_args(flags)
    elif program == "predict.py":
        predict.arguments().parse_intermixed_args(flags)
    else:
        data = any("=DIR" in flag or "=$" in flag for flag in flags)
        made_up = vars(runs.configure(["--data", "pascal=DIR"] if data else []))
        monkeypatch.setattr(checkpoint, "start_of", lambda name: ({"config": made_up}, name))
        runs.stages(runs.configure(flags))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_accepted(document, monkeypatch):
    found = list(commands(document.read_text(encoding="utf-8")))
    least = {"README.md": 6, "usage.md": 10, "reproduce.md": 10}.get(document.name, 0)
    assert len(found) >= least
    for command in found:
        try:
            with monkeypatch.context() as patch:
                accept(command, patch)
        except (SystemExit, ValueError) as error:  # argparse exits; InputError is a ValueError
            pytest.fail(f"{document.name}: {' '.join(command)}: {error}")


def links(path):
    """Targets of a document's relative links and pictures."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]+src=[\"']([^\"']+)", text)
    return [target for target in targets if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document):
    for target in links(document):
        assert (document.parent / target.split("#")[0]).exists(), f"{document.name} links to {target}"


def test_every_run_of_reproduce_is_made_once_and_before_it_is_used():
    made = set()
    for program, *flags in commands((ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")):
        value = dict(zip(flags, flags[1:]))
        if program == "evaluate.py":
            assert flags[0] in made | {"RUN"}, flags
        elif "--out" in flags:
            if "--source-checkpoint" in flags:
                assert value["--source-checkpoint"] in made, flags
            assert value["--out"] not in made, flags
            made |= {value["--out"], f"{value['--out']}/source"} if "--source" in flags else {value["--out"]}
    assert len(made) > 20


def test_lines_fit_110_columns():
    files = [path for place in (".", "sst", "figures", "tests", "tools", "notebooks")
             for path in sorted((ROOT / place).glob("*.py"))]
    wide = [f"{path.relative_to(ROOT)}:{n}" for path in (*files, ROOT / "README.md")
            for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 110]
    assert wide == [] and len(files) > 70


# The checks themselves

def test_commands_are_found_in_blocks_and_in_text():
    text = ("see `python train.py --mode universal` or `--beta 0`\n```\n# a comment: train.py\n"
            "pip install x && python -m pytest\n"
            "torchrun --nproc_per_node=8 train.py \\\n    --data a=DIR ...   # why\n"
            "python evaluate.py runs/a --json > scores.json\n```\n")
    assert list(commands(text)) == [["train.py", "--data", "a=DIR"], ["evaluate.py", "runs/a", "--json"],
                                    ["train.py", "--mode", "universal"]]


@pytest.mark.parametrize("command", [
    "train.py --moed universal", "train.py --mode dedicated --data pascal=DIR", "evaluate.py",
    "predict.py runs/a --size 3", "train.py --source-checkpoint RUN --target pascal=DIR"])
def test_a_wrong_command_is_refused(command, monkeypatch, capsys):
    with pytest.raises((SystemExit, ValueError)):
        accept(command.split(), monkeypatch)
