"""A checklist for a GPU in one command: what runs on it, and how fast? At most eight minutes.

    python tools/gpu_check.py --out DIR                      everything
    python tools/gpu_check.py --out DIR --only tests paper   some parts
    python tools/gpu_check.py --out DIR --small              little sizes: minutes on a CPU, to try this file

It starts the programs that users start, part after part, and writes into DIR the table that it prints
(gpu_check.md), the raw numbers (gpu_check.json) and what the programs printed (PART.txt). A part that fails
is a row that says why. The others go on, and the exit status is 1.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sst.domains import builtin_domain
from figures import Figures

DOMAINS = ("pascal", "atr", "cihp")


def tests(here):
    """The kernels' tests: on a GPU all but those in the interpreter, on a CPU one of those."""
    if not find_spec("triton"):
        return [("kernel tests", "left out: the package triton is not installed")]
    cases, interpret = ("not in_the_interpreter", "0") if here.gpu else ("no_queries", "1")
    output = run(here, "-m", "pytest", "-q", "-rfs", "-m", "slow", "tests/test_deform_attn_triton.py",
                 "-k", cases, TRITON_INTERPRET=interpret)
    return [("kernel tests" if here.gpu else "kernel tests, one, interpreted", output.splitlines()[-1])]


def operator(here):
    """Deformable attention by every backend that is here."""
    result = bench(here, "operator", "--rounds", 1 if here.small else 15)
    table = result["operator"]
    plain = {name: table[f"grid_sample, {name.split(', ')[-1]}"] for name in table}
    rows = compared("operator", table, plain)
    if here.gpu:
        rows.append(("operator: the GPU copies", f"{result['about']['copy GB/s']} GB/s"))
    if not find_spec("torch_ms_deform_attn"):
        rows.append(("operator: torch-ms-deform-attn", "left out: the package is not installed"))
    return rows


def network(here):
    """The whole network, with the backend that is chosen by itself and with grid_sample."""
    flags = ["--networks", "small", "--rounds", 1] if here.small else ["--rounds", 7]
    return compared("network", *(bench(here, "network", *flags, SST_DEFORM_ATTN=backend)["network"]
                                 for backend in ("auto", "grid_sample")))


def compared(what, table, plain):
    """Rows of one of bench.py's tables; plain: those of grid_sample. Its columns are called NAME UNIT."""
    def cell(name, key):
        value, (column, unit) = table[name][key], key.rsplit(" ", 1)
        rival = unit == "ms" and table[name] is not plain[name] and "transformers" not in name
        faster = f" ({plain[name][key] / value:.2f} x as fast as grid_sample)" if rival else ""
        return f"{column} {value:.4g} {unit}{faster}"

    return [(f"{what}: {name}", "; ".join(cell(name, key) for key in row if row[key] is not None))
            for name, row in table.items()]


def paper(here):
    """The published settings on drawn photos, with SST and without: what SST costs."""
    B, flags = on_photos(here, 6 if here.small else 30)
    speeds = {"with SST": speed(train(here, "with-SST", *flags), B),
              "without": speed(train(here, "without-SST", *flags, "--beta", 0, "--lam", 0), B)}
    rows = [(f"{here.preset} preset, {name}", f"{s['images']:.1f} images/s, {s['step']:.3f} s a step, of it "
             f"{s['wait']:.3f} s waiting for images; peak {s['peak']:.2f} GiB") for name, s in speeds.items()]
    step, peak = (100 * (speeds["with SST"][key] / speeds["without"][key] - 1) for key in ("step", "peak"))
    return [*rows, (f"{here.preset} preset, SST's share", f"{step:+.1f} % time, {peak:+.1f} % peak memory")]


def torchrun(here):
    """A universal and a dedicated training, both short, in a process group of one."""
    how = "torchrun, NCCL, bf16" if here.gpu else "torchrun, gloo, float32"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    flags = [*on_figures(here, 6 if here.small else 20), "--validations", 1]
    one = train(here, "universal", *flags, launcher=launcher)
    two = train(here, "dedicated", *flags, "--mode", "dedicated", "--source-steps", 6, launcher=launcher)
    rows = []
    for what, out in (("universal", one), ("dedicated, source", two / "source"), ("dedicated, target", two)):
        first, *_, last = (line["loss"]["total"] for line in steps_of(out))
        rows.append((f"{how}: {what}", f"loss {first:.2f} to {last:.2f}"))
    return rows


def resume(here):
    """A training that is killed after some steps, and goes on."""
    steps, out = 20 if here.small else 60, here.work / "resumed"
    command = ["train.py", *on_figures(here, steps), "--validations", 0, "--save-every", 3, "--log-every", 1,
               "--resume", "auto", "--out", out]
    run(here, *command, until=lambda: len(steps_of(out)) >= 8)
    killed = steps_of(out)[-1]["step"]
    found = re.search(r"goes on after step (\d+)", run(here, *command))
    if not found or [line["step"] for line in steps_of(out)] != [*range(1, steps + 1)]:
        raise RuntimeError("the second run did not go on with the first, or steps are missing in the log")
    return [("kill and resume", f"killed after step {killed}, went on after step {found[1]} to step {steps}")]


def predict(here):
    """predict.py on drawn photos, by a network that has seen one step."""
    out, predictions = train(here, "one-step", *on_photos(here, 1)[1]), here.work / "predictions"
    photos = sorted((here.work / "cihp" / "images").iterdir())[:4]
    output = run(here, "predict.py", out, *photos, "--out", predictions)
    seconds = [float(taken) for taken in re.findall(r"  \d+x\d+  ([\d.]+) s, ", output, re.M)]
    files = len([*predictions.iterdir()])
    if (len(seconds), files) != (4, 4 * (2 * len(DOMAINS) + 1)):
        raise RuntimeError(f"of 4 photos {len(seconds)} were parsed, into {files} files")
    return [("predict.py", f"4 photos, {files} files, {median(seconds):.1f} s a photo")]


def compiled(here):
    """A step of the demo, compiled and not."""
    flags = [*on_figures(here, 6 if here.small else 60), "--validations", 0]
    plain, fast = train(here, "plain", *flags), train(here, "compiled", *flags, "--compile")
    if fault := re.search(r"^--compile: (.*); the run goes on without it$", here.log.read_text(), re.M):
        return [("--compile", f"left out: {fault[1]}")]
    before, after = (1000 * speed(out, 1)["step"] for out in (plain, fast))
    return [("--compile, demo preset", f"{after:.1f} ms a step, without it {before:.1f} ms")]


# A part returns rows: what, and its result. The number is the second of the check by which it must end.
PARTS = {"tests": (tests, 100), "operator": (operator, 150), "network": (network, 220), "paper": (paper, 300),
         "torchrun": (torchrun, 375), "resume": (resume, 410), "predict": (predict, 435),
         "compile": (compiled, 480)}


def run(here, *argv, until=lambda: False, **environment):
    """What a Python program printed; until(): when to kill it. Raises RuntimeError if it fails or is late."""
    before = here.log.stat().st_size
    with open(here.log, "a") as log:
        print("\n$ python", *argv, file=log, flush=True)
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=os.environ | environment,
                                   stdout=log, stderr=log, start_new_session=True)
        try:
            while process.poll() is None and not until():
                if time.time() > here.start + PARTS[here.part][1]:
                    raise RuntimeError(f"not finished after {time.time() - here.began:.0f} s")
                time.sleep(0.02)
            status = process.poll()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its loading processes
            process.wait()
    output = here.log.read_bytes()[before:].decode(errors="replace").strip()
    if status:
        error = r"^(?:FAILED |(?:\[rank\d+\]: *)?[\w.]+(?:Error|\.py): ).+"
        line = (re.findall(error, output, re.M) or output.splitlines())[-1]
        raise RuntimeError(f"{line} (exit status {status})")
    return output


def bench(here, table, *flags, **environment):
    """The object that bench.py prints."""
    output = run(here, "bench.py", "--json", "--only", table, *flags, **environment)
    result, _ = json.JSONDecoder().raw_decode(output, output.index("\n{\n") + 1)
    here.numbers[" ".join([table, *environment.values()])] = result
    return result


def train(here, name, *flags, launcher=()):
    """The folder of a finished training. Raises RuntimeError for steps that were not finite, too."""
    out, steps = here.work / name, flags[flags.index("--steps") + 1]
    run(here, *launcher, "train.py", *flags, "--log-every", max(1, steps // 6), "--out", out)
    here.numbers[name] = steps_of(out)
    if skipped := here.numbers[name][-1]["skipped"]["steps"]:
        raise RuntimeError(f"{skipped} of {steps} steps were skipped: loss or gradient was not finite")
    return out


def steps_of(out):
    """The lines of log.jsonl that tell of a step, also while it is being written."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    lines = map(json.loads, text[:text.rfind("\n") + 1].splitlines())
    return [line for line in lines if line["kind"] == "train"]


def speed(out, B):
    """Of a run's second half: seconds a step, those of waiting, images a second; peak memory in GiB."""
    lines = steps_of(out)
    late = [line["time"] for line in lines if line["step"] > lines[-1]["step"] / 2]
    step, wait = (median(time[key] for time in late) for key in ("step", "wait"))
    return {"step": step, "wait": wait, "images": B / step, "peak": late[-1]["peak_memory"]}


def on_figures(here, steps):
    """Flags of a training on the built-in figures."""
    small = ["--size", "48x48", "--crop", "48x48", "--batch-size", 3] if here.small else []
    return ["--preset", "demo", *small, "--steps", steps, "--precision", here.precision]


def on_photos(here, steps):
    """Images a step, and flags of a training on drawn photos, of 512x512 where nothing is small."""
    B, side, count = (3, 64, 6) if here.small else (4, 512, 24)
    size = ["--size", f"{side}x{side}", "--crop", f"{side}x{side}"] if here.small else []
    data = [f"{name}={drawn(here.work / name, side, count)}" for name in DOMAINS]
    return B, ["--preset", here.preset, *size, "--data", *data, "--backbone-weights", "none",
               "--batch-size", B, "--validations", 0, "--steps", steps, "--precision", here.precision]


def drawn(folder, side, count):
    """The folder of the label domain of its name, filled with drawn photos, enlarged to side x side."""
    domain, place = builtin_domain(folder.name), DOMAINS.index(folder.name)
    figures = Figures(domain, 0, count, offset=place, stride=len(DOMAINS))
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, label = map(Image.fromarray, figures.load(i))
        image.resize((side, side), Image.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=95)
        label.resize((side, side), Image.NEAREST).save(folder / "labels" / f"{i}.png")
    (folder / "id.txt").write_text("\n".join(map(str, range(count))))
    (folder / "domain.json").write_text(json.dumps(domain.to_dict() | {"train": "id.txt", "val": "id.txt"}))
    return folder


def about():
    """What is here, by name. Another process asks PyTorch, so that this one holds nothing of the GPU."""
    code = ("import json, torch; from importlib.util import find_spec; gpu = torch.cuda.is_available(); "
            "print(json.dumps({'GPU': torch.cuda.get_device_name() if gpu else None, "
            "'torch': torch.__version__, 'CUDA': torch.version.cuda, "
            "'Triton': find_spec('triton') and __import__('triton').__version__}))")
    ask = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    facts = json.loads(ask(sys.executable, "-c", code))
    if facts["GPU"] and shutil.which("nvidia-smi"):
        facts["driver"] = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def rows_of(here):
    """The part's rows as dicts. Whatever goes wrong in it becomes a row."""
    here.log, here.began = here.out / f"{here.part}.txt", time.time()
    here.log.write_text("")
    try:
        rows, failed = PARTS[here.part][0](here), False
    except Exception as error:
        with open(here.log, "a") as log:
            traceback.print_exc(file=log)
        reason = str(error) if type(error) is RuntimeError else repr(error)
        rows, failed = [(here.part, f"failed: {reason} (see {here.part}.txt)")], True
    seconds = [f"{time.time() - here.began:.1f}", *[""] * len(rows)]  # of the whole part, in its first row
    # A cell is one line, with nothing in it that ends a cell, and the names of files without their folders.
    one_line = lambda text: re.sub(r"(?<![\w.])/(\S+/)+", "", " ".join(text.split()).replace("|", "/"))
    return [{"what": what, "result": one_line(result), "seconds": taken, "failed": failed}
            for (what, result), taken in zip(rows, seconds)]


def main(argv=None):
    p = argparse.ArgumentParser("gpu_check.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=__doc__)
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the results")
    p.add_argument("--only", metavar="PART", nargs="+", choices=PARTS, default=PARTS, help=", ".join(PARTS))
    p.add_argument("--small", action="store_true", help="little sizes; on a CPU the only ones")
    here, facts = p.parse_args(argv), about()
    here.gpu = facts["GPU"] is not None
    if not (here.gpu or here.small):
        sys.exit("gpu_check.py: PyTorch finds no GPU here; --small runs all on the CPU, at little sizes")
    here.precision, here.preset = "bf16" if here.gpu else "fp32", "small" if here.small else "paper"
    try:
        here.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"gpu_check.py: --out {here.out}: cannot be made ({error.strerror}); give a folder of yours")
    facts["GPU"] = facts["GPU"] or "none: the CPU, float32, gloo"
    names = [f"{key} {value}" for key, value in facts.items() if value] + ["small sizes"] * here.small
    text = f"# GPU check: {', '.join(names)}\n\n| what | result | seconds |\n|---|---|---|\n"
    print(text, end="", flush=True)
    rows, here.numbers = [], {}
    with tempfile.TemporaryDirectory() as work:
        here.work, here.start = Path(work), time.time()
        for here.part in (part for part in PARTS if part in here.only):
            rows += (new := rows_of(here))
            lines = "".join("| {what} | {result} | {seconds} |\n".format(**row) for row in new)
            print(lines, end="", flush=True)
            text, numbers = text + lines, {"about": facts, "rows": rows, "numbers": here.numbers}
            (here.out / "gpu_check.md").write_text(text)
            (here.out / "gpu_check.json").write_text(json.dumps(numbers, indent=1))
    sys.exit(int(any(row["failed"] for row in rows)))


if __name__ == "__main__":
    main()
