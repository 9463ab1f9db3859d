"""Train a human parser with SST. One page, read from top to bottom:

    python train.py --mode universal                                        the built-in figures, minutes on a CPU
    torchrun --nproc_per_node=8 train.py --mode universal --data pascal=DIR atr=DIR cihp=DIR          as published
    torchrun --nproc_per_node=8 train.py --mode dedicated --source cihp=DIR --target pascal=DIR       as published
    python train.py --check --data NAME=DIR ...                             reads every file, reports on the data
    python train.py --help                                                  every flag
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from sst import checkpoint, config as settings, distributed
from sst.batches import Crops, Schedule, collate
from sst.check import report
from sst.data import fraction_of, open_datasets
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.figures import Figures
from sst.inference import confusion_of, photo_logits
from sst.losses import L_d, L_u
from sst.metrics import scores
from sst.modules import row_cosine
from sst.plots import save_curves, save_samples
from sst.scenarios import build, build_sst, inherit


def parameter_groups(model, config):
    """AdamW's groups: the backbone learns at its own rate; norms, biases and embeddings do not decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or name.endswith(("bias", "level", "X_0"))
            groups.setdefault((name.startswith("net.backbone."), no_decay), []).append(parameter)
    return [{"params": parameters, "scale": config["backbone_lr_scale"] if backbone else 1.0,
             "weight_decay": 0.0 if no_decay else config["weight_decay"]} for (backbone, no_decay), parameters in groups.items()]


def main():
    config = settings.resolve()
    if config.get("check"):
        sys.exit(report(settings.stages(config), open_data))
    rank, world, device = distributed.start()
    if config["mode"] == "dedicated" and not config["resume"]:
        config["out"] = distributed.agree(str(settings.free_folder(config)))  # both steps write into it
    stages = settings.stages(config)
    # What is wrong with the second step's data or masks is found before the first.
    domains = [[dataset.domain for dataset in open_data(stage)[0]] for stage in stages]
    if len(stages) == 2:
        build_sst(stages[1], domains[1], 8, sources=domains[0])
    for stage in stages:
        train(stage, rank, world, device)
        distributed.wait()  # the next step reads what the first process has written
    distributed.stop()


def open_data(config):
    """The training and the validation set of every label domain: of --data, or figures."""
    if config["data"]:
        train, val = (open_datasets(config["data"], split) for split in ("train", "val"))
    else:
        domains, size = [builtin_domain(name) for name in config["figures"]], config["size"] or (128, 128)
        places = [settings.FIGURES.index(name) for name in config["figures"]]  # every domain has pictures of its own
        train = [Figures(d, config["seed"], 2000, size, i, len(settings.FIGURES)) for d, i in zip(domains, places)]
        val = [Figures(d, 2 ** 31, 80, size) for d in domains]  # a seed of its own, pictures shared by the domains
    if config["fraction"] < 1:
        train = [fraction_of(dataset, config["fraction"], config["seed"]) for dataset in train]
    return train, val


def train(config, rank, world, device):
    """One training: universal parsing, or a step of dedicated parsing."""
    def say(text):
        if rank == 0:
            print(text, flush=True)

    train, val = open_data(config)
    domains = [dataset.domain for dataset in train]

    # A step is K micro-batches of B crops, dealt whole to the processes.
    B = config["batch_size"]
    K = (config["global_batch"] or B * world) // B
    config["global_batch"] = K * B
    if K % world:
        raise InputError(f"--global-batch {K * B}: {K} micro-batches of {B} cannot be dealt evenly to {world} processes")
    schedule = Schedule([len(dataset) for dataset in train], B, config["seed"])
    epoch_steps = -(-sum(schedule.sizes) // (K * B))
    config["steps"] = steps = config["steps"] or config["epochs"] * epoch_steps

    # The model, its optimiser, and where it stands.
    start = config["source_checkpoint"] or config["init_from"]
    origin = checkpoint.load(f"{start}/last.pt", "run") if start else None
    model = build(config, domains, origin)
    inherited = inherit(model, domains, origin, f"{start}/last.pt") if config["init_from"] else ""
    model.to(device, memory_format=torch.channels_last).train()
    objective = partial(L_d, target=domains[0].name) if config["mode"] == "dedicated" else L_u
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config["lr"], betas=(0.9, config["adam_beta2"]), fused=True)
    step, best = 0, -1.0
    if config["resume"]:
        path = f"{config['resume']}/last.pt"
        state = checkpoint.load(path, "run")
        checkpoint.load_weights(model, state["weights"], path)
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]
    out = settings.open_folder(config) if rank == 0 else None
    say(f"writing to {out}")
    log = open_log(out, step) if rank == 0 else None
    say("\n".join(f"  {key:<18} {value}" for key, value in config.items() if value is not None and key not in ("out", "resume")))
    say(f"{len(domains)} label domains: " + ", ".join(f"{d.name} ({d.num_classes} classes, {len(t)} training and {len(v)} validation "
                                                     f"images)" for d, t, v in zip(domains, train, val)))
    kept = sum(p.numel() for p in model.net.parameters())
    dropped = sum(p.numel() for p in model.parameters()) - kept
    if inherited:
        say(inherited)
    say(f"{kept:,} parameters are kept, {dropped:,} of SST{' and the frozen source' if hasattr(model, 'source') else ''} are dropped after "
        f"training; {steps} steps of {K * B} "
        f"images; device {device}, {world} process{'es' if world > 1 else ''}")

    wrapped = model
    if world > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    norms = distributed.StepBatchNorm(model.net)
    mine = (schedule[s * K + k] for s in range(step, steps) for k in range(rank, K, world))
    loader = torch.utils.data.DataLoader(Crops(train, config["size"], config["crop"], config["seed"], config["scale"]), batch_sampler=mine,
                                         num_workers=config["workers"], collate_fn=collate, pin_memory=device.type == "cuda",
                                         prefetch_factor=4 if config["workers"] else None)
    batches = iter(loader)
    started, first_step, printed, waited = time.time(), step, 0.0, 0.0
    drop_step = round(config["drop_at"] * steps)
    results = None

    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * group["scale"] * (0.1 if step >= drop_step else 1.0)
        sums = {}
        norms.begin()
        for k in range(rank, K, world):
            asked = time.time()
            batch = next(batches)
            waited += time.time() - asked
            if isinstance(batch, InputError):
                raise batch
            images, labels, domain, _ = batch
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            last = k + world >= K
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    terms, X = wrapped(images, labels, domain)
                    terms["total"] = objective(terms, alpha=config["alpha"], beta=config["beta"], lam=config["lam"])
                (terms["total"] * world / K).backward()  # DDP averages over the processes
            norms.collect()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / K
        norms.finish(K)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % config["log_every"] == 0 or step == 1 or step == steps:
            values = distributed.total(torch.stack(list(sums.values()))).tolist()
            for name, value in zip(sums, values):
                if not math.isfinite(value):
                    raise InputError(f"step {step}: the loss term {name} is {value}, so training has diverged; lower --lr {config['lr']:g}")
            elapsed = time.time() - started
            line = {"step": step, "epoch": round(step / epoch_steps, 4), "kind": "train", "loss": dict(zip(sums, values)),
                    "lr": optimizer.param_groups[-1]["lr"],
                    "cos": {name: {key: row_cosine(x).item() for key, x in zip(("x0", "xl"), (x[0], *x[1:][-1:]))} for name, x in X.items()},
                    "time": {"seconds": elapsed, "images_per_second": (step - first_step) * K * B / elapsed, "waiting": waited / elapsed}}
            if rank == 0:
                print(json.dumps(line), file=log, flush=True)
            if time.time() - printed > 3 or step == steps:
                printed = time.time()
                left = elapsed / (step - first_step) * (steps - step)
                say(f"step {step}/{steps}  epoch {step / epoch_steps:.2f}  " + "  ".join(f"{n} {v:.3f}" for n, v in line["loss"].items())
                    + f"  lr {line['lr']:.0e}  {line['time']['images_per_second']:.1f} images/s  {clock(left)} left")

        V = config["validations"]
        if step * V // steps > (step - 1) * V // steps:
            results = validate(model.net, val, config["size"], rank, world, device)
            miou = {name: result["miou"] for name, result in results.items()}
            average = sum(miou.values()) / len(miou)
            say(f"validation after step {step}: mIoU " + "  ".join(f"{name} {value:.2f}" for name, value in miou.items())
                + f"  mean {average:.2f} %")
            if rank == 0:
                print(json.dumps({"step": step, "epoch": round(step / epoch_steps, 4), "kind": "val", "miou": miou,
                                  "mean_accuracy": {name: result["mean_accuracy"] for name, result in results.items()},
                                  "time": {"seconds": time.time() - started}}), file=log, flush=True)
                if average > best:
                    best = average
                    checkpoint.save(checkpoint.model_content(model.net, domains), out / "best.pt")
        if rank == 0 and (step * V // steps > (step - 1) * V // steps or step % 1000 == 0):
            save_run(out, model, domains, optimizer, step, best, config)

    if rank == 0:
        save_run(out, model, domains, optimizer, step, best, config)
    if config["validations"] and results is None:  # resumed when nothing was left to train
        results = validate(model.net, val, config["size"], rank, world, device)
    if rank == 0:
        finish(out, model, domains, val, results, best, schedule.passes(steps * K), config, say)


def open_log(out, step):
    """log.jsonl, open for appending after the line of `step`: what a resumed run does again is not kept twice."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):  # the run was killed while it wrote this one
        lines.pop()
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return open(path, "a")


def validate(net, datasets, size, rank, world, device):
    """{domain: scores}; each process takes every world-th photo."""
    net.eval()
    results = {}
    for dataset in datasets:
        matrix = confusion_of(net, dataset, size, range(rank, len(dataset), world))
        results[dataset.domain.name] = scores(distributed.total(torch.from_numpy(matrix).to(device)).cpu().numpy())
    net.train()
    return results


def save_run(out, model, domains, optimizer, step, best, config):
    """last.pt: everything needed to go on."""
    content = checkpoint.model_content(model.net, domains)
    content |= {"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best, "config": config}
    checkpoint.save(content, out / "last.pt")


def finish(out, model, domains, val, results, best, passes, config, say):
    """The kept network, pictures, and a table of what was reached."""
    checkpoint.save(checkpoint.model_content(model.net, domains), out / "model.pt")
    save_curves([json.loads(line) for line in open(out / "log.jsonl")], out / "curves.png")
    model.net.eval()
    samples = []
    for dataset in val:
        triples = []
        for i in range(min(3, len(dataset))):
            image, truth = dataset.load(i)
            triples.append((image, truth, photo_logits(model.net, image, config["size"])[dataset.domain.name].argmax(0).cpu().numpy()))
        samples.append((dataset.domain, triples))
    save_samples(samples, out / "samples.png")
    say("passes over the training sets: " + ", ".join(f"{d.name} {p:.2f}" for d, p in zip(domains, passes)))
    if results:
        classes = {d.name: d.classes for d in domains}
        say(f"\n{'validation':<12} {'mIoU %':>8} {'mean accuracy %':>16}")
        for name, result in results.items():
            absent = [classes[name][i] for i in result["absent"]]
            say(f"{name:<12} {result['miou']:>8.2f} {result['mean_accuracy']:>16.2f}"
                + (f"   (without {', '.join(absent)}: in no label and no prediction)" if absent else ""))
        say(f"best.pt: mean mIoU {best:.2f} %, selected on these validation sets")
    say(f"\nNext: look at {out}/samples.png and {out}/curves.png; the network is {out}/model.pt.\n"
        "  --beta 0 --lam 0 trains the same network without SST, on the same crops;\n"
        "  --data NAME=DIR ... trains on your photos; --seed 1 tells luck from progress.")


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"train.py: {error}")
