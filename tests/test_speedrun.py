"""tools/speedrun.py: the seconds to a goal, by a log worked out by hand, and a run of train.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import speedrun  # noqa: E402
from test_train import SHORT  # noqa: E402


def train(step, pace):
    return {"kind": "train", "step": step, "time": {"step": pace}}


def val(step, *miou):
    return {"kind": "val", "step": step, "miou": dict(enumerate(miou))}


LOG = [train(1, 5.0), train(10, 2.0), val(12, 30, 40),  # 5 + 9*2 + 2*2 = 27 s, 35 %
       train(20, 9.0),  # 10 steps, a validation among them: 2 s each, so 43 s
       {"kind": "gradient", "step": 20},
       train(30, 1.0), val(30, 40, 60),  # 53 s, 50 %
       val(30, 40, 60)]  # after a kill between its line and the checkpoint


@pytest.mark.parametrize("goal, found", [(35, (12, 27)), (45, (30, 53)), (50, (30, 53)), (51, (None, None))])
def test_seconds_are_those_of_training_up_to_the_first_validation_that_reaches_it(goal, found):
    assert speedrun.reached(LOG, goal) == (*found, 50)


@pytest.mark.slow
def test_it_trains_each_seed_and_says_when(tmp_path, monkeypatch, capsys):
    argv = ["speedrun.py", "--goal", "0.1", "--seeds", "3", "--runs", str(tmp_path), "--", *SHORT,
            "--steps", "2", "--validations", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    speedrun.main()
    printed = capsys.readouterr().out
    assert printed.startswith("seed 3: 0.1 % after step 2, ") and printed.endswith(" % at the end\n")
    assert (tmp_path / "seed-3" / "model.pt").exists()


def test_one_sentence_where_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--runs", str(tmp_path), "--", "--lr", "-1"])
    with pytest.raises(SystemExit, match=r"train.py: .*--lr -1.0: must lie between"):
        speedrun.main()
