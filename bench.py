"""What things cost here: deformable attention by every backend, the network, SST's share of a training step.

    python bench.py                     all of it; minutes
    python bench.py --only operator     one table: operator, network, step, parser or photo
    python bench.py --json              one object instead of tables

Rivals run interleaved, in turns, so that a busy machine slows all of them; medians are shown, and ratios from
the same run. The packages torch-ms-deform-attn (the operator, compiled) and transformers (Mask2Former,
SegFormer) are measured beside it where they are installed. On a GPU operator and network are measured in
float32 and in bfloat16. There the operator gets 8 images, and its forward's GB/s (inputs read and output
written, once each) stand beside the rate at which the GPU copies.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

import sst
from sst import checkpoint, runs
from sst.deform_attn import deform_attn
from sst.distributed import compiler_fault, keep_memory
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.export import export
from sst.files import pixels
from sst.inference import label_map
from sst.losses import L_seg, L_u
from sst.model import ParsingNet
from sst.onnx_parser import OnnxParser
from sst.optim import build_optimizer
from sst.scenarios import build

PHOTO = [(64, 64), (32, 32), (16, 16)]  # encoder levels of one image at 512x512
PEER = "torch-ms-deform-attn (compiled)"
SEGFORMER = "SegFormer-B2 (transformers)"
COMPILED = "torch.compile"
SIDE = 512
NETWORKS = ("small", "r50", "r101")
STEPS = {"demo": ("small", 12, 96), "paper": ("r50", 4, 512)}  # network, images, side


def medians(rivals, rounds, calls=1):
    """{name: seconds}: the median of every rival over `rounds` turns of so many calls; the last counts."""
    times = {name: [] for name in rivals}
    for round in range(rounds + 2):  # two to warm up
        for name, call in rivals.items():
            for _ in range(calls):
                taken = timed(call)
            if round > 1:
                times[name].append(taken)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def timed(call):
    if not torch.cuda.is_available():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()  # keeps the GPU busy while the next one is prepared
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def copy_rate():
    """GB/s that the GPU reads and writes while it copies 1 GiB."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, 9)["copy"] / 1e9


def operator_inputs(device, dtype=torch.float32):
    """One image at 512x512, or 8 on a GPU: 5,376 queries, 8 heads of 32 channels, 4 points.

    Places lie a few pixels around each query. Returns value in dtype, and locations and weights in float32.
    """
    torch.manual_seed(0)
    B = 8 if device.type == "cuda" else 1
    S = sum(h * w for h, w in PHOTO)
    grids = [torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
             for h, w in PHOTO]
    centres = torch.cat([torch.stack([x, y], dim=-1).reshape(-1, 2) for y, x in grids])
    locations = centres[None, :, None, None, None] + 0.04 * torch.randn(B, S, 8, 3, 4, 2)
    weights = torch.randn(B, S, 8, 12).softmax(-1).view(B, S, 8, 3, 4)
    value = torch.randn(B, S, 8, 32).to(dtype)
    return [t.to(device).requires_grad_() for t in (value, locations, weights)]


def operators(device):
    """{name: function of value, locations, weights}: backends that run here, and the peer if installed."""
    can_run = {"triton": device.type == "cuda" and find_spec("triton"),
               "embedding_bag": device.type == "cpu", "grid_sample": True}
    calls = {name: lambda v, l, w, name=name: deform_attn(v, PHOTO, l, w, backend=name)
             for name in can_run if can_run[name]}
    try:
        from torch_ms_deform_attn import ms_deform_attn
    except ImportError:
        return calls
    shapes = torch.tensor(PHOTO, device=device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    # As under autocast: float32 inside.
    calls[PEER] = lambda v, l, w: ms_deform_attn(v.float(), shapes, starts, l, w).to(v.dtype)
    return calls


def dtypes(device):
    return ("float32", "bfloat16") if device.type == "cuda" else ("float32",)


def bench_operator(device, rounds):
    keep_memory()  # as train.py does
    result = {}
    for dtype in dtypes(device):
        tensors = operator_inputs(device, getattr(torch, dtype))
        out = deform_attn(tensors[0], PHOTO, *tensors[1:])
        G = torch.randn_like(out)
        calls = operators(device)
        eager = list(calls)
        if device.type == "cpu" and not compiler_fault(device):
            calls |= {f"{name}, {COMPILED}": torch.compile(calls[name], dynamic=False)
                      for name in eager if name != PEER}

        def forward(call):
            with torch.no_grad():
                call(*tensors)

        def both(call):
            torch.autograd.grad(call(*tensors), tensors, G)

        for what, run in (("forward", forward), ("forward + backward", both)):
            # The second call of a turn counts: the first pays for the memory that the rival before it has
            # given back to the system.
            rivals = {name: (lambda call=call: run(call)) for name, call in calls.items()}
            for name, taken in medians(rivals, rounds, calls=2).items():
                result.setdefault(f"{name}, {dtype}", {})[f"{what} ms"] = 1000 * taken
        for name in calls:
            row = result[f"{name}, {dtype}"]
            # A fresh process would count the compiler's memory.
            row["peak MiB"] = peak_memory(name, dtype) if name in eager else None
            if device.type == "cuda":
                row["forward GB/s"] = sum(t.nbytes for t in (*tensors, out)) / row["forward ms"] / 1e6
    return result


def peak_memory(name, dtype):
    """MiB that forward and backward of an operator add to a fresh process."""
    code = f"import bench; bench.one_pass({name!r}, {dtype!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def one_pass(name, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, call = operator_inputs(device, getattr(torch, dtype)), operators(device)[name]
    B, S, M, d = tensors[0].shape
    G = torch.randn(B, S, M * d).to(tensors[0])
    measure = torch.cuda.max_memory_allocated if device.type == "cuda" else peak_resident
    before = measure()
    torch.autograd.grad(call(*tensors), tensors, G)
    print((measure() - before) / 2 ** 20)


def peak_resident():
    """The most bytes that this process has held so far (Linux; getrusage would count the parent's)."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def bench_network(device, rounds, networks):
    """Inference, and a training step without SST, of one image, random weights; inference of the peers.

    bfloat16 is that of autocast, as train.py has it.
    """
    domains = [builtin_domain(name) for name in ("pascal", "atr", "cihp")]
    image = torch.rand(1, 3, SIDE, SIDE, device=device)
    ours = image.to(memory_format=torch.channels_last)
    label = torch.zeros(1, SIDE, SIDE, dtype=torch.int64, device=device)
    nets = {arch: ParsingNet(domains, arch).to(device, memory_format=torch.channels_last)
            for arch in networks}
    others = {name: net.to(device).eval() for name, net in peers().items()}

    @torch.no_grad()
    def infer(net, image, autocast):
        with autocast():
            net.eval()(image)

    def train(net, autocast):
        net.train()
        with autocast():
            H = net.features(ours)[-1]
            loss = sum(L_seg(head(H), label) for head in net.heads.values())
        loss.backward()

    result = {}
    for dtype in dtypes(device):
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        inference = {name: partial(infer, net, ours, autocast) for name, net in nets.items()} | {
            name: partial(infer, net, image, autocast) for name, net in others.items()}
        inference = medians(inference, rounds)
        steps = medians({name: partial(train, net, autocast) for name, net in nets.items()}, rounds)
        for name, seconds in inference.items():
            result[f"{name}, {dtype}"] = {"inference ms": 1000 * seconds,
                                          "training step ms": 1000 * steps[name] if name in steps else None}
    return result


def peers():
    """Mask2Former with a ResNet-50 and SegFormer-B2, random weights; from transformers, if installed."""
    try:
        import transformers as t
    except ImportError:
        return {}
    t.logging.set_verbosity_error()
    resnet = t.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    b2 = t.SegformerConfig(depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768,
                           num_labels=18)  # as segformer_b2_clothes
    mask2former = t.Mask2FormerForUniversalSegmentation(t.Mask2FormerConfig(backbone_config=resnet))
    return {"Mask2Former-R50 (transformers)": mask2former,
            SEGFORMER: t.SegformerForSemanticSegmentation(b2)}


def bench_step(device, rounds, networks=NETWORKS):
    """A training step of one micro-batch of three domains, optimiser and all, without SST and with it.

    Without SST it is the Multi-datasets baseline.
    """
    domains = [builtin_domain(name) for name in ("pascal", "atr", "cihp")]
    keep_memory()  # as train.py does
    result = {}
    for preset, (arch, B, side) in STEPS.items():
        if arch not in networks:
            continue
        images = torch.randint(0, 256, (B, 3, side, side), device=device, dtype=torch.uint8)
        labels = torch.randint(0, 7, (B, side // 32, side // 32), device=device)
        labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
        domain = sorted(k % 3 for k in range(B))

        def step(model, optimizer, config):
            terms, _ = model(images, labels, domain)
            L_u(terms, config.alpha, config.beta, config.lam, config.alpha * config.cross).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        variants = {}
        none = ["--beta", "0", "--lam", "0", "--cross"]
        for name, flags in (("without SST ms", [*none, "0"]), ("with SST ms", ["--sst", "published"]),
                            ("with L_cross ms", [*none, "1"])):
            config = runs.configure(["--preset", preset, "--data", "figures", "--arch", arch,
                                     "--backbone-weights", "none", *flags])
            model = build(config, domains).to(device, memory_format=torch.channels_last).train()
            variants[name] = partial(step, model, build_optimizer(model, config), config)
        times = medians(variants, rounds)
        row = {name: 1000 * seconds for name, seconds in times.items()}
        result[f"{preset}: {arch}, {B} x {side}x{side}"] = row | {
            "SST ratio": times["with SST ms"] / times["without SST ms"],
            "L_cross ratio": times["with L_cross ms"] / times["without SST ms"]}
    return result


@torch.no_grad()
def bench_photo(device, rounds):
    """A photo of 512x384 in memory -> its label maps, by the parser that the package carries.

    Beside it the network alone, on the photo as it sees it, up to the logits of the same heads.
    """
    image = pixels(Image.open(Path(__file__).parent / "docs/photo.jpg").resize((384, 512)))
    parser = sst.load(device=device.type)
    seen = torch.from_numpy(parser.canvas(image)[0]).to(device).permute(2, 0, 1)[None] / 255
    seen = seen.contiguous(memory_format=torch.channels_last)
    three, rivals = ["ccp-coarse", "ccp-middle", "ccp-fine"], {}
    for n in (1, 3):
        rivals[n, "network"] = partial(parser.net, seen, three[:n])
        rivals[n, "parser"] = partial(parser, image, three[:n])
    times = medians(rivals, rounds)
    return {f"label domains: {n}": {"network ms": 1000 * times[n, "network"],
                                    "parser ms": 1000 * times[n, "parser"],
                                    "ratio": times[n, "parser"] / times[n, "network"]} for n in (1, 3)}


def bench_parser(device, rounds):
    """One photo of 512x384 from its file to label maps at its size: the parser that the package carries.

    It fits the photo into its own 288x192 pixels, and finds the label maps of all its domains. SegFormer-B2
    has random weights, gets the photo at its own size, and finds one label map.
    """
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        Image.open(Path(__file__).parent / "docs/photo.jpg").resize((384, 512)).save(photo, quality=95)
        parser = sst.load(device=device.type)
        rivals, files = {"sst, PyTorch": lambda: parser(photo)}, {"sst, PyTorch": checkpoint.PACKAGED}
        for kind, canvases in (("float32", None), ("int8", [parser.canvas(pixels(photo))[0]])):
            files[f"sst, ONNX {kind}"] = file = Path(folder) / f"{kind}.onnx"
            try:
                export(parser.net, parser.domains, file, parser.size, canvases)
                onnx = OnnxParser(file, threads=torch.get_num_threads())
            except (InputError, ImportError) as error:
                print(f"no row of ONNX {kind}: {error}", file=sys.stderr)
                continue
            rivals[f"sst, ONNX {kind}"] = partial(onnx, photo)
        if SEGFORMER in (others := peers()):
            rivals[SEGFORMER] = partial(segformer, others[SEGFORMER].to(device).eval(), photo)
        times = medians(rivals, rounds)
        return {name: {"a photo ms": 1000 * seconds,
                       "SegFormer / it": times[SEGFORMER] / seconds if SEGFORMER in times else None,
                       "file MiB": files[name].stat().st_size / 2 ** 20 if name in files else None,
                       "peak MiB": peak_of_onnx(files[name], photo) if "ONNX" in name else None}
                for name, seconds in times.items()}


@torch.no_grad()
def segformer(net, photo):
    image = torch.from_numpy(pixels(photo)).to(next(net.parameters()).device).permute(2, 0, 1)[None] / 255
    return label_map(net(image).logits[0], *image.shape[-2:])


def peak_of_onnx(file, photo):
    """MiB of a fresh process that parses a photo with onnxruntime, all of it counted."""
    code = """import sys; from sst.onnx_parser import OnnxParser
OnnxParser(sys.argv[1], threads=1)(sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""
    run = subprocess.run([sys.executable, "-c", code, file, photo], cwd=Path(__file__).parent, check=True,
                         capture_output=True, text=True)
    return int(run.stdout) / 1024


def table(title, rows):
    columns = list(next(iter(rows.values())))
    lines = [f"\n{title:<44}" + "".join(f"{column:>24}" for column in columns)]
    for name, row in rows.items():
        cells = (" " * 23 + "-" if row[column] is None else f"{row[column]:>24.2f}" for column in columns)
        lines.append(f"{name:<44}" + "".join(cells))
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser("bench.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=__doc__)
    p.add_argument("--only", choices=["operator", "network", "step", "parser", "photo"], help="one table")
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS,
                   help="rows of network and step (all)")
    p.add_argument("--rounds", type=int, default=9, help="turns whose median is taken (9)")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    p.add_argument("--json", action="store_true", help="print one object")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"torch": torch.__version__,
             "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
             "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about["copy GB/s"] = round(copy_rate())
    results = {"about": about}
    network, step = (partial(bench, networks=args.networks) for bench in (bench_network, bench_step))
    for name, bench in (("operator", bench_operator), ("network", network), ("step", step),
                        ("parser", bench_parser), ("photo", bench_photo)):
        if args.only in (None, name):
            results[name] = bench(device, args.rounds)
            if not args.json:
                print(table(name, results[name]), flush=True)
    print(json.dumps(results, indent=1) if args.json else
          "\n" + "  ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
