"""What things cost here: deformable attention by every backend, the whole network, and SST's share of a training step.

    python bench.py                     all of it; minutes
    python bench.py --only operator     one table: operator, network or step
    python bench.py --json              one object instead of tables

Rivals run interleaved, in turns, so that a busy machine slows all of them; medians are shown, and ratios from the same run.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from sst.deform_attn import deform_attn
from sst.domains import builtin_domain
from sst.losses import L_seg, L_u
from sst.model import ParsingNet
from sst.modules import SST, rows_of

PHOTO = [(64, 64), (32, 32), (16, 16)]  # encoder levels of one image at 512x512
PEER = "torch-ms-deform-attn (compiled)"


def medians(rivals, rounds):
    """{name: seconds}: the median over `rounds` turns of calling every rival once."""
    times = {name: [] for name in rivals}
    for round in range(rounds + 2):  # two to warm up
        for name, call in rivals.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if round > 1:
                times[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def operator_inputs(device, dtype=torch.float32):
    """One image at 512x512: 5,376 queries, 8 heads of 32 channels, 4 points; places a few pixels around each query."""
    torch.manual_seed(0)
    S = sum(h * w for h, w in PHOTO)
    grids = [torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij") for h, w in PHOTO]
    centres = torch.cat([torch.stack([x, y], dim=-1).reshape(-1, 2) for y, x in grids])
    locations = centres[None, :, None, None, None] + 0.04 * torch.randn(1, S, 8, 3, 4, 2)
    weights = torch.randn(1, S, 8, 12).softmax(-1).view(1, S, 8, 3, 4)
    return [t.to(device, dtype).requires_grad_() for t in (torch.randn(1, S, 8, 32), locations, weights)]


def operators(device):
    """{name: function of value, locations, weights} of all backends that run here, and of the peer where it is installed."""
    calls = {name: lambda v, l, w, name=name: deform_attn(v, PHOTO, l, w, backend=name) for name in ("sparse", "grid_sample")
             if name != "sparse" or (device.type == "cpu" and torch.backends.mkl.is_available())}
    try:
        from torch_ms_deform_attn import ms_deform_attn
    except ImportError:
        return calls
    shapes = torch.tensor(PHOTO, device=device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    calls[PEER] = lambda v, l, w: ms_deform_attn(v, shapes, starts, l, w)
    return calls


def bench_operator(device, rounds):
    tensors = operator_inputs(device)
    G = torch.randn(1, tensors[0].shape[1], 256, device=device)
    calls = operators(device)

    def forward(call):
        with torch.no_grad():
            call(*tensors)

    def both(call):
        torch.autograd.grad(call(*tensors), tensors, G)

    result = {}
    for what, run in (("forward", forward), ("forward + backward", both)):
        for name, seconds in medians({name: (lambda call=call: run(call)) for name, call in calls.items()}, rounds).items():
            result.setdefault(name, {})[f"{what} ms"] = 1000 * seconds
    for name in calls:
        result[name]["peak MiB"] = peak_memory(name)
    return result


def peak_memory(name):
    """MiB that forward and backward of an operator add to a fresh process."""
    code = f"import bench; bench.one_pass({name!r})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def one_pass(name):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, call = operator_inputs(device), operators(device)[name]
    G = torch.randn(1, tensors[0].shape[1], 256, device=device)
    measure = torch.cuda.max_memory_allocated if device.type == "cuda" else peak_resident
    before = measure()
    torch.autograd.grad(call(*tensors), tensors, G)
    print((measure() - before) / 2 ** 20)


def peak_resident():
    """The most bytes that this process has held so far (Linux; getrusage would count the parent's)."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def bench_network(device, rounds):
    """Inference and a training step without SST at 512x512, one image, random weights."""
    domains = [builtin_domain(name) for name in ("pascal", "atr", "cihp")]
    image = torch.rand(1, 3, 512, 512, device=device).to(memory_format=torch.channels_last)
    label = torch.zeros(1, 512, 512, dtype=torch.int64, device=device)
    result = {}
    for arch in ("small", "r50", "r101"):
        net = ParsingNet(domains, arch).to(device, memory_format=torch.channels_last)

        def infer():
            with torch.no_grad():
                net.eval()(image)

        def train():
            net.train()
            H = net.features(image)[-1]
            sum(L_seg(head(H), label) for head in net.heads.values()).backward()

        for what, seconds in medians({"inference ms": infer, "training step ms": train}, rounds).items():
            result.setdefault(arch, {})[what] = 1000 * seconds
    return result


def bench_step(device, rounds):
    """Forward and backward of one micro-batch with SST and without (the Multi-datasets baseline), three domains."""
    domains = [builtin_domain(name) for name in ("pascal", "atr", "cihp")]
    result = {}
    for preset, arch, B, side in (("demo", "small", 6, 96), ("paper", "r50", 4, 512)):
        net = ParsingNet(domains, arch).to(device, memory_format=torch.channels_last).train()
        sst = SST(domains, net.arch.dim).to(device)
        images = torch.rand(B, 3, side, side, device=device).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 7, (B, side // 32, side // 32), device=device).repeat_interleave(32, 1).repeat_interleave(32, 2)
        domain = sorted(k % 3 for k in range(B))

        def step(with_sst):
            H, terms, logits = net.features(images), {}, {}
            for i, (name, head) in enumerate(net.heads.items()):
                rows = rows_of(domain, i)
                logits[name] = head(H[-1][rows])
                terms[f"seg/{name}"] = L_seg(logits[name], labels[rows])
            if with_sst:
                terms |= sst(H, labels, domain, logits)[0]
            L_u(terms).backward()

        times = medians({"without SST ms": lambda: step(False), "with SST ms": lambda: step(True)}, rounds)
        result[f"{preset}: {arch}, {B} x {side}x{side}"] = {name: 1000 * seconds for name, seconds in times.items()} | {
            "ratio": times["with SST ms"] / times["without SST ms"]}
    return result


def table(title, rows):
    columns = list(next(iter(rows.values())))
    lines = [f"\n{title:<34}" + "".join(f"{column:>24}" for column in columns)]
    return "\n".join(lines + [f"{name:<34}" + "".join(f"{row[column]:>24.2f}" for column in columns) for name, row in rows.items()])


def main():
    p = argparse.ArgumentParser("bench.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    p.add_argument("--only", choices=["operator", "network", "step"], help="one table")
    p.add_argument("--rounds", type=int, default=9, help="turns whose median is taken (9)")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    p.add_argument("--json", action="store_true", help="print one object")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
             "threads": torch.get_num_threads()}
    results = {"about": about}
    for name, bench in (("operator", bench_operator), ("network", bench_network), ("step", bench_step)):
        if args.only in (None, name):
            results[name] = bench(device, args.rounds)
            if not args.json:
                print(table(name, results[name]), flush=True)
    print(json.dumps(results, indent=1) if args.json else "\n" + "  ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
