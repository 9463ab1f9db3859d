"""Time to 45 %: how long the demo trains until its mean validation mIoU has reached a goal.

    python tools/speedrun.py                             seeds 0 to 4 of `train.py --mode universal`
    python tools/speedrun.py --runs DIR -- --lr 0.02               the same with other flags of train.py
    python tools/speedrun.py --runs DIR --train OTHER/train.py     the same by another version

Two runs at a time have one thread each. The seconds are those of training, loading included and validation
left out, so that a run may be validated often. Finished runs in DIR are not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev


def reached(lines, goal):
    """(step, seconds of training, mIoU at the end) of a run; step and seconds are None if it missed the goal.

    lines: those of log.jsonl. The mIoU is the mean over the label domains, in percent.
    """
    seconds = last = 0  # of training up to the step `last`
    pace, validated, first, miou = None, False, (None, None), float("nan")
    for line in lines:
        if line["kind"] == "train":
            # A line has the seconds a step since the line before. If there was a validation in between, they
            # hold its time too, so the pace before it counts.
            pace = pace if validated else line["time"]["step"]
            seconds += (line["step"] - last) * pace
            last, validated = line["step"], False
        elif line["kind"] == "val":
            validated, miou = True, mean(line["miou"].values())
            if miou >= goal and first == (None, None):
                first = line["step"], seconds + (line["step"] - last) * pace
    return *first, miou


def run(seed, args):
    """Train a seed, unless that is done; returns what it reached."""
    out = Path(args.runs) / f"seed-{seed}"
    flags = ["--mode", "universal", "--seed", seed, "--validations", 36, *args.flags, "--out", out,
             "--resume", "auto"]
    done = subprocess.run([sys.executable, args.train, *map(str, flags)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    step, seconds, miou = reached([json.loads(line) for line in (out / "log.jsonl").open()], args.goal)
    when = f"after step {step}, {seconds:.0f} s" if step else "not reached"
    print(f"seed {seed}: {args.goal:g} % {when}; {miou:.2f} % at the end", flush=True)
    return seconds


def main():
    p = argparse.ArgumentParser("speedrun.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--goal", type=float, default=45, help="mean validation mIoU in percent (45)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="0 to 4")
    p.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each (2)")
    p.add_argument("--runs", metavar="DIR", default="runs/speedrun", help="folder of the trainings")
    p.add_argument("--train", metavar="FILE", default=Path(__file__).parent.parent / "train.py",
                   help="the train.py to run")
    p.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = p.parse_args()
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            seconds = list(pool.map(lambda seed: run(seed, args), args.seeds))
    except RuntimeError as error:
        sys.exit(f"{args.train}: {error}")
    if None not in seconds and len(seconds) > 1:
        error = stdev(seconds) / len(seconds) ** 0.5
        print(f"time to {args.goal:g} %: {mean(seconds):.0f} ± {error:.0f} s, n {len(seconds)}")


if __name__ == "__main__":
    main()
