"""What docs/reliability.md counts: runs killed, preempted, split over processes. Damage: test_damage.py."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_train import ROOT

DRIVER = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from figures import Figures
from sst.model import ARCHS, Arch
torch.set_num_threads(1)
if "DOUBLE" in os.environ:
    torch.set_default_dtype(torch.float64)
# Two channels a group where results are compared to 1e-9: with one, a bias before the encoder's GroupNorm
# has no gradient but round-off, which AdamW makes as large as any.
dim = 64 if "DOUBLE" in os.environ else 32
ARCHS["small"] = Arch(blocks=(1, 1, 1, 1), width=8, dim=dim, heads=2, layers=1, ffn=32, window=4)
Figures.__len__ = lambda self: min(self.count, 12)
sys.argv[0] = {str(ROOT / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLAGS = ["--size", "48x48", "--crop", "48x48", "--batch-size", "3", "--workers", "1",
         "--validations", "2", "--log-every", "3"]
DEDICATED = ["--mode", "dedicated", "--source-steps", "30"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


def command(driver, out, *flags, processes=0, launch=()):
    torchrun = []
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}",
                    *(launch or ["--standalone"])]
    return [sys.executable, *torchrun, str(driver), *FLAGS, "--out", str(out), *map(str, flags)]


def finish(argv, status=0, **options):
    environment = ENVIRONMENT | options.pop("env", {})
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@contextmanager
def started(argv):
    """A training in a process group of its own; whatever is left of it ends with the block."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENVIRONMENT, start_new_session=True)
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()


def until(process, words):
    """Read a process's output up to the line with these words."""
    read = []
    for line in process.stdout:
        read.append(line)
        if words in line:
            return
    raise AssertionError(f"'{words}' was not printed:\n{''.join(read)}")


def wait_for_step(out, step):
    """Until the log has a line of that step or a later one."""
    deadline = time.time() + 120
    while time.time() < deadline:
        if (out / "log.jsonl").exists() and any(line["step"] >= step for line in log(out, partly=True)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def lines(out):
    """Lines of all logs in a run's folder."""
    return sum(path.read_text().count("\n") for path in out.rglob("log.jsonl"))


def wait_for_lines(out, count):
    """Until all logs in a run's folder have so many lines."""
    deadline = time.time() + 120
    while lines(out) < count:
        assert time.time() < deadline, f"{count} lines were not reached"
        time.sleep(0.002)


def log(out, partly=False):
    """log.jsonl without what depends on the clock."""
    text = (out / "log.jsonl").read_text()
    lines = [json.loads(line) for line in (text[:text.rfind("\n") + 1] if partly else text).splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def weights(out, name="model.pt"):
    return torch.load(out / name, weights_only=True)["weights"]


def assert_same(one, two):
    """Bit for bit the same logs and weights, each step once."""
    assert log(one) == log(two)
    steps = [(line["step"], line["kind"]) for line in log(one)]
    assert len(steps) == len(set(steps))
    for name in ("model.pt", "best.pt", "last.pt"):
        a, b = weights(one, name), weights(two, name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


# Interruptions ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kills, flags", [(15, ["--steps", 150]), (5, [*DEDICATED, "--steps", 45])],
                         ids=["universal", "dedicated"])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(driver, tmp_path, kills, flags):
    flags = [*flags, "--save-every", 4]
    finish(command(driver, tmp_path / "whole", *flags))
    again = command(driver, tmp_path / "killed", *flags, "--resume", "auto")
    rng = random.Random(0)
    for kill in range(kills):
        with started(again) as process:
            until(process, "parameters are kept")
            # Some steps and checkpoints later, or none: counted, since a fast machine does more in a second.
            wait_for_lines(tmp_path / "killed", lines(tmp_path / "killed") + rng.choice((0, 2, 4, 6)))
            time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None, f"finished before kill {kill}: give it more steps"
            os.kill(process.pid, signal.SIGKILL)
    done = finish(again)
    assert "goes on after step" in done.stdout
    assert_same(tmp_path / "whole", tmp_path / "killed")
    if "dedicated" in flags:
        assert_same(tmp_path / "whole" / "source", tmp_path / "killed" / "source")
    assert "this run is finished" in finish(again).stdout


@pytest.fixture(scope="module")
def whole(driver, tmp_path_factory):
    """60 steps of two micro-batches in one process, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(command(driver, out, "--steps", 60, "--global-batch", 6))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_status(driver, whole, tmp_path, number, status):
    out = tmp_path / "run"
    with started(command(driver, out, "--steps", 60, "--global-batch", 6)) as process:
        wait_for_step(out, 9)
        process.send_signal(number)
        until(process, "interrupted by a signal")
        assert process.wait(60) == status
    assert 9 <= torch.load(out / "last.pt", weights_only=True)["step"] < 60
    finish(command(driver, out, "--resume", out))
    assert_same(whole, out)


@pytest.fixture(scope="module")
def two(driver, tmp_path_factory):
    """The same in two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    finish(command(driver, out, "--steps", 60, processes=2))
    return out


@pytest.mark.slow
def test_a_signal_to_any_process_ends_all_and_torchrun_starts_them_again(driver, two, tmp_path):
    out = tmp_path / "run"
    launch = ["--standalone", "--max-restarts=2"]
    with started(command(driver, out, "--steps", 60, processes=2, launch=launch)) as torchrun:
        wait_for_step(out, 9)
        os.kill(rank(torchrun.pid, 1), signal.SIGTERM)
        until(torchrun, "exitcode: 143")  # of whichever process torchrun saw end first
        until(torchrun, "goes on after step")
        wait_for_step(out, 33)
        os.kill(rank(torchrun.pid, 0), signal.SIGKILL)  # no time to save: back to step 30 or earlier
        until(torchrun, "goes on after step")
        until(torchrun, "Next: look at")
        assert torchrun.wait(60) == 0
    assert_same(two, out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["runs.placed", "runs.write_config", "journal.open_log"])
def test_a_launch_that_torchrun_starts_again_keeps_to_its_own_folder(driver, tmp_path, moment):
    """It dies before or after its folder is there. Meanwhile a newer run has finished beside it."""
    short = [flag for flag in FLAGS if flag not in ("--validations", "2")]
    short += ["--validations", "0", "--steps", "2"]
    finish([sys.executable, str(driver), *short], cwd=tmp_path)
    finished = (tmp_path / "runs/universal/log.jsonl").read_text()
    dying = tmp_path / "dying.py"
    dying.write_text(f"""
import os, shutil
from sst import journal, runs

def die(*args):
    shutil.copytree("runs/universal", "runs/universal-3")
    os._exit(7)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    {moment} = die
exec(open({str(driver)!r}).read())
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
              "--max-restarts=1"]
    done = finish([*launch, str(dying), *short], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert "writing to runs/universal-2" in done.stdout and "this run is finished" not in done.stdout
    assert (tmp_path / "runs/universal-2/model.pt").exists()
    assert not (tmp_path / "runs/universal-4").exists()
    for name in ("universal", "universal-3"):
        assert (tmp_path / "runs" / name / "log.jsonl").read_text() == finished


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on_with_another_number_of_processes(
        driver, whole, two, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 60, "--resume", "auto"]
    with started(command(driver, out, *flags, processes=2)) as torchrun:
        wait_for_step(out, 9)
        torchrun.send_signal(signal.SIGTERM)
        torchrun.communicate(timeout=60)
        assert torchrun.returncode != 0
    assert torch.load(out / "last.pt", weights_only=True)["step"] >= 9
    again = tmp_path / "again"
    subprocess.run(["cp", "-r", out, again], check=True)
    finish(command(driver, out, *flags, processes=2))
    assert_same(two, out)
    finish(command(driver, again, *flags))  # alone, with two micro-batches a step
    assert_close(whole, again, 1e-3)


def rank(torchrun, number):
    """The process id of that rank, a child of torchrun."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes() if parent == torchrun else b""
            if f"RANK={number}".encode() in environment.split(b"\0"):
                return int(entry.name)
        except (OSError, ValueError, IndexError):
            pass
    raise AssertionError("no such process")


@pytest.mark.slow
def test_a_loading_process_that_is_killed_ends_the_run_with_a_sentence(driver, whole, tmp_path):
    out = tmp_path / "run"
    with started(command(driver, out, "--steps", 60, "--global-batch", 6)) as process:
        wait_for_step(out, 9)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        until(process, "train.py: a loading process has ended (DataLoader worker")
        assert process.wait(60) == 1
    finish(command(driver, out, "--resume", out))
    assert_same(whole, out)


def test_a_folder_in_which_another_process_trains_is_refused(driver, tmp_path):
    out = tmp_path / "run"
    with started(command(driver, out, "--steps", 10 ** 6)) as process:
        wait_for_step(out, 1)
        done = finish(command(driver, out, "--steps", 10 ** 6, "--resume", "auto"), status=1)
        assert done.stderr == (f"train.py: {out}: another process trains in this folder; "
                               f"wait for its end (or end it), then --resume {out}\n")
        assert process.poll() is None


# Processes --------------------------------------------------------------------------------------------------


def assert_close(one, two, tolerance):
    for a, b in zip(log(one), log(two), strict=True):
        assert (a["step"], a["kind"]) == (b["step"], b["kind"])
        if a["kind"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    a, b = weights(one), weights(two)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance,
                                   msg=lambda m: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("slots", [
    [], ["--slots", "proportional", "--batch-size", "2", "--global-batch", "8"],
], ids=["equal", "proportional"])
def test_one_two_and_four_processes_train_the_same_network(driver, tmp_path, slots):
    """In float64: a step of four micro-batches, accumulated by one process, by two, or dealt to four."""
    flags = ["--steps", 6, "--global-batch", 12, "--log-every", 1, *slots]
    for processes in (0, 2, 4):
        finish(command(driver, tmp_path / str(processes), *flags, processes=processes), env={"DOUBLE": "1"})
    assert_close(tmp_path / "0", tmp_path / "2", 1e-9)
    assert_close(tmp_path / "0", tmp_path / "4", 1e-9)


@pytest.mark.slow
def test_two_machines_train_as_one(driver, two, tmp_path):
    """Two torchrun agents on loopback addresses, one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    agents = []
    for node in (0, 1):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                    f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
                    f"--local_addr=127.0.0.{node + 1}"]
        agents.append(subprocess.Popen(
            [*torchrun, str(driver), *FLAGS, "--steps", "60", "--out", str(out)], env=ENVIRONMENT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for agent in agents:
        printed = agent.communicate(timeout=200)[0].decode()
        assert agent.returncode == 0, printed
    assert_same(two, out)


# Checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(driver, tmp_path):
    out = tmp_path / "run"
    with started(command(driver, out, "--steps", 200, "--save-every", 3)) as process:
        wait_for_step(out, 6)
        process.send_signal(signal.SIGTERM)
        until(process, "interrupted by a signal")
        process.wait(60)
    before = (out / "last.pt").read_bytes()
    KiB = len(before) // 1024
    half = ["bash", "-c", f"ulimit -f {KiB // 2}; exec \"$@\"", "bash"]  # no file of more than half its size
    done = finish([*half, *command(driver, out, "--resume", out)], status=1)
    assert "fresh.pt: could not be written (" in done.stderr
    assert f"--resume {out}" in done.stderr and done.stderr.count("\n") == 1
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.part"))
