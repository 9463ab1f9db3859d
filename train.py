"""Train a human parser with SST. One page, read from top to bottom:

    python train.py --mode universal                                        the built-in figures, minutes on a CPU
    torchrun --nproc_per_node=8 train.py --mode universal --data pascal=DIR atr=DIR cihp=DIR          as published
    torchrun --nproc_per_node=8 train.py --mode dedicated --source cihp=DIR --target pascal=DIR       as published
    python train.py --check --data NAME=DIR ...                             reads every file, reports on the data
    python train.py --help                                                  every flag

What a step sees follows from the seed and the step alone, so a run may be split, killed and resumed: docs/reliability.md.
"""

import json
import math
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from figures import Figures
from sst import checkpoint, config as settings, distributed
from sst.batches import Crops, Schedule, collate
from sst.check import report
from sst.data import fraction_of, open_datasets
from sst.domains import builtin_domain
from sst.errors import InputError, run_program
from sst.inference import confusion_of, photo_logits
from sst.losses import L_d, L_u
from sst.metrics import scores
from sst.modules import row_cosine
from sst.muon import Muon
from sst.plots import save_curves, save_samples
from sst.scenarios import build, build_sst, inherit


def optimiser_of(model, config):
    """AdamW or Muon: backbone and SST learn at their own rates; norms, biases and embeddings do not decay; Muon takes the kept
    network's matrices, but for the heads."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = {"net.backbone": config["backbone_lr_scale"], "sst": config["sst_lr_scale"]}
            part = ".".join(name.split(".")[:2 if name.startswith("net.") else 1])
            decay = parameter.ndim > 1 and not name.endswith(("bias", "level", "X_0"))
            matrix = decay and part not in ("sst", "net.heads") and config["optimizer"] == "muon"
            groups.setdefault((scale.get(part, 1.0), decay, matrix), []).append(parameter)
    groups = [{"params": parameters, "scale": scale, "weight_decay": config["weight_decay"] if decay else 0.0, "matrices": matrix}
              for (scale, decay, matrix), parameters in groups.items()]
    kind = Muon if config["optimizer"] == "muon" else torch.optim.AdamW
    return kind(groups, lr=config["lr"], betas=(0.9, config["adam_beta2"]), fused=True)


def rate(part, config):
    """The learning rate, in parts of --lr, after that part of the run."""
    if part < config["drop_at"]:
        return 1.0
    return 0.1 if config["decay"] == "drop" else (1 - part) / (1 - config["drop_at"])


def main():
    rank, world, device = distributed.start()
    config = settings.resolve(agree=distributed.agree)
    if config["check"]:
        sys.exit(report(settings.stages(config), open_data) if rank == 0 else 0)
    config["global_batch"] = config["global_batch"] or config["batch_size"] * world
    if not config["resume"]:
        config["out"] = distributed.agree(str(settings.free_folder(config)))
    stages = settings.stages(config)
    # What is wrong with the second step's data or masks is found before the first.
    domains = [[dataset.domain for dataset in open_data(stage)[0]] for stage in stages]
    if len(stages) == 2:
        build_sst(stages[1], domains[1], 8, sources=domains[0])
    with distributed.Interruption() as interruption:
        for stage in stages:
            train(stage, stages[-1], rank, world, device, interruption)
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


def train(config, run, rank, world, device, interruption):
    """One training: universal parsing, or a step of dedicated parsing. run: the settings of the last step."""
    def say(text):
        if rank == 0:
            print(text, flush=True)

    train, val = open_data(config)
    domains = [dataset.domain for dataset in train]
    lists = {d.name: [len(t), zlib.crc32("\n".join(Path(t.where(i)).name for i in range(len(t))).encode())] for d, t in zip(domains, train)}

    # A step is K micro-batches of B crops, dealt whole to the processes.
    B, K = config["batch_size"], config["global_batch"] // config["batch_size"]
    if K % world:
        raise InputError(f"--global-batch {K * B}: {K} micro-batches of {B} cannot be dealt evenly to {world} processes")
    schedule = Schedule([len(dataset) for dataset in train], B, config["seed"])
    epoch_steps = -(-sum(schedule.sizes) // (K * B))
    config["steps"] = steps = config["steps"] or config["epochs"] * epoch_steps

    # The model, its optimiser, and where it stands.
    start = config["source_checkpoint"] or config["init_from"]
    state, path = checkpoint.load_last(config["out"]) if config["resume"] else (None, None)
    origin = checkpoint.load(f"{start}/last.pt", "run") if start and not (state and config["init_from"]) else None
    model = build(config, domains, origin, resumed=state is not None)
    inherited = inherit(model, domains, origin, f"{start}/last.pt") if origin and config["init_from"] else ""
    model.to(device, memory_format=torch.channels_last).train()
    if config["sync_bn"]:
        if device.type != "cuda":
            raise InputError("--sync-bn: PyTorch has it for GPUs only; leave it out")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    objective = partial(L_d, target=domains[0].name) if config["mode"] == "dedicated" else L_u
    optimizer = optimiser_of(model, config)
    half = precision(config["precision"], device)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    step, best, counts = 0, -1.0, {"skipped_steps": 0, "skipped_in_a_row": 0, "skipped_files": 0}
    if state:
        settings.check_unchanged(config, state, path)
        if changed := [name for name in lists if lists[name] != state["lists"].get(name)]:
            raise InputError(f"{path}: the training list of '{changed[0]}' had {state['lists'][changed[0]][0]} photos when the run began, and "
                             f"has {lists[changed[0]][0]} now, or others; put the list back, or start a new run")
        checkpoint.load_weights(model, state["weights"], path)
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError:  # of a version that grouped the weights differently
            raise InputError(f"{path}: its optimiser's state does not fit this version of train.py; go on with the version that began the "
                             f"run, or start a new one with --init-from {config['out']}") from None
        if state["scaler"]:  # empty where the run has none
            scaler.load_state_dict(state["scaler"])
        step, best, counts = state["step"], state["best"], state["counts"]
    out = Path(config["out"])
    if step == steps and (out / "samples.png").exists():
        return say(f"{out}: this run is finished, all {steps} steps of it")
    say(f"writing to {out}")
    if rank == 0:
        settings.open_folder(run)
        settings.open_folder(config)
    log = open_log(out, step) if rank == 0 else None

    def write(kind, **fields):
        if rank == 0:
            print(json.dumps({"step": step, "epoch": round(step / epoch_steps, 4), "kind": kind, **fields}), file=log, flush=True)

    say("\n".join(f"  {key:<18} {value}" for key, value in config.items() if value not in (None, False) and key not in ("out", "resume")))
    say(f"{len(domains)} label domains: " + ", ".join(f"{d.name} ({d.num_classes} classes, {len(t)} training and {len(v)} validation "
                                                     f"images)" for d, t, v in zip(domains, train, val)))
    kept = sum(p.numel() for p in model.net.parameters())
    dropped = sum(p.numel() for p in model.parameters()) - kept
    if inherited:
        say(inherited)
    say(f"{kept:,} parameters are kept, {dropped:,} of SST{' and the frozen source' if hasattr(model, 'source') else ''} are dropped after "
        f"training; {steps} steps of {K * B} "
        f"images; device {device}, {world} process{'es' if world > 1 else ''}")
    if config["resume"]:
        say(f"goes on after step {step} ({path})" if state else "interrupted before its first checkpoint: begins again")

    if config["compile"] and (fault := distributed.compiler_fault(device)):
        say(f"--compile: torch.compile does not work on this machine ({fault}); the run goes on without it")
    elif config["compile"]:
        # Crops have one size. The photos of a validation have many, and each would be compiled anew.
        eager, compiled = model.net.features, torch.compile(model.net.features, dynamic=False)
        model.net.features = lambda images: (compiled if model.net.training else eager)(images)
    wrapped = model
    if world > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = distributed.StepBatchNorm(model.net)
    mine = (schedule[s * K + k] for s in range(step, steps) for k in range(rank, K, world))
    loader = torch.utils.data.DataLoader(
        Crops(train, config["size"], config["crop"], config["seed"], config["scale"], config["skip_bad"]), batch_sampler=mine,
        num_workers=config["workers"], collate_fn=collate, pin_memory=device.type == "cuda", worker_init_fn=distributed.deaf,
        prefetch_factor=4 if config["workers"] else None)
    batches = iter(loader)
    started = mark = time.time()
    first_step, logged, printed, waited, total_wait = step, step, 0.0, 0.0, 0.0
    results = None

    while step < steps:
        lr = config["lr"] * rate(step / steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        seen, unread = [], []
        norms.begin()
        for k in range(rank, K, world):
            torch.manual_seed((config["seed"] << 32) + step * K + k)  # a network of yours may have dropout
            asked = time.time()
            batch = next(batches)
            waited += time.time() - asked
            if isinstance(batch, InputError):
                raise batch
            images, labels, domain, names, skipped = batch
            unread += [[step * K + k, what] for what in skipped]
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            last = k + world >= K
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                with torch.autocast(device.type, half, enabled=half is not None):
                    terms, representations = wrapped(images, labels, domain)
                    terms["total"] = objective(terms, alpha=config["alpha"], beta=config["beta"], lam=config["lam"])
                scaler.scale(terms["total"] * world / K).backward()  # DDP averages over the processes
            if k == rank:  # the step's first micro-batch in the first process, which keeps the log
                X = {name: [x[0].detach(), *(x_L.detach() for x_L in x[1:][-1:])] for name, x in representations.items()}
            norms.collect()
            seen.append((names, torch.stack([value.detach() for value in terms.values()])))
        norms.finish(K)

        # Whatever happened to one process in this step, all of them know.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        finite = torch.stack([norm, *(values.sum() for _, values in seen)]).isfinite().all()
        events = torch.tensor([interruption.signal > 0, not finite, len(unread)], dtype=torch.float64, device=device)
        interrupted, bad, unreadable = distributed.total(events).tolist()
        if bad:
            norms.undo()
        else:
            if config["clip"]:
                torch.nn.utils.clip_grads_with_norm_(parameters, config["clip"], norm)
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if unreadable:
            files = [what for _, what in distributed.gather(unread)]
            counts["skipped_files"] += len(files)
            write("unreadable", files=files)
            say("\n".join(f"step {step}: {what}; another photo took its place" for what in files))
        counts["skipped_in_a_row"] = counts["skipped_in_a_row"] + 1 if bad else 0
        if bad or step % config["log_every"] == 0 or step == 1 or step == steps:
            losses = dict(zip(terms, distributed.total(sum(values for _, values in seen) / K).tolist()))
        if bad:
            counts["skipped_steps"] += 1
            files = (distributed.gather([name for names, values in seen if not values.isfinite().all() for name in names])
                     or distributed.gather([name for names, _ in seen for name in names]))  # the gradient alone is not finite
            what = ", ".join(name for name, value in losses.items() if not math.isfinite(value)) or "the gradient"
            write("skipped", loss={name: value if math.isfinite(value) else None for name, value in losses.items()}, files=files)
            say(f"step {step} skipped: not finite: {what}; images: {', '.join(files)}")
            if counts["skipped_in_a_row"] == config["max_skips"]:
                raise InputError(f"step {step}: {what} not finite for {config['max_skips']} steps in a row: training has diverged; lower --lr "
                                 f"{config['lr']:g} or set --clip 1")
        elif step % config["log_every"] == 0 or step == 1 or step == steps:
            elapsed, interval = time.time() - started, step - logged
            write("train", loss=losses, lr=lr,
                  cos={name: {key: row_cosine(x).item() for key, x in zip(("x0", "xl"), x)} for name, x in X.items()},
                  skipped={key: counts[f"skipped_{key}"] for key in ("steps", "files")},
                  time={"seconds": elapsed, "images_per_second": (step - first_step) * K * B / elapsed, "step": (time.time() - mark) / interval,
                        "wait": waited / interval, "peak_memory": distributed.peak_memory(device)})
            total_wait += waited
            mark, logged, waited = time.time(), step, 0.0
            if time.time() - printed > 3 or step == steps:
                printed = time.time()
                left = elapsed / (step - first_step) * (steps - step)
                say(f"step {step}/{steps}  epoch {step / epoch_steps:.2f}  " + "  ".join(f"{n} {v:.3f}" for n, v in losses.items())
                    + f"  lr {lr:.0e}  {(step - first_step) * K * B / elapsed:.1f} images/s, "
                    f"{100 * total_wait / elapsed:.0f} % waiting for them  {clock(left)} left")

        V = config["validations"]
        validating = step * V // steps > (step - 1) * V // steps
        if validating:
            results = validate(model.net, val, config["size"], rank, world, device)
            miou = {name: result["miou"] for name, result in results.items()}
            average = sum(miou.values()) / len(miou)
            say(f"validation after step {step}: mIoU " + "  ".join(f"{name} {value:.2f}" for name, value in miou.items())
                + f"  mean {average:.2f} %")
            write("val", miou=miou, mean_accuracy={name: result["mean_accuracy"] for name, result in results.items()},
                  time={"seconds": time.time() - started})
            if average > best:
                best = average
                if rank == 0:
                    checkpoint.save(checkpoint.model_content(model.net, domains), out / "best.pt")
        if rank == 0 and (validating or step % config["save_every"] == 0 or step == steps or interrupted):
            checkpoint.save_last(checkpoint.model_content(model.net, domains) | {
                "weights": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "best": best,
                "counts": counts, "lists": lists, "config": config}, out)
        if interrupted:
            distributed.wait()  # torchrun ends the others as soon as one has ended
            say(f"interrupted by a signal; step {step} is saved, --resume {out} goes on")
            sys.exit(128 + (interruption.signal or signal.SIGTERM))

    if config["validations"] and results is None:  # resumed when nothing was left to train
        results = validate(model.net, val, config["size"], rank, world, device)
    if rank == 0:
        finish(out, log, model, domains, val, results, best, schedule.passes(steps * K), config, say)


def open_log(out, step):
    """log.jsonl, open for appending after the line of `step`: what a resumed run does again is not kept twice.

    Locked while this process lives: raises InputError where another one trains in the folder.
    """
    log = open(out / "log.jsonl", "a+")
    try:
        import fcntl  # not on Windows
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        raise InputError(f"{out}: another process trains in this folder; wait for its end (or end it), then --resume {out}") from None
    log.seek(0)
    kept = 0
    for line in log.readlines():
        try:
            if json.loads(line)["step"] > step or not line.endswith("\n"):
                break
        except ValueError:  # it was being written when the run was killed, or the machine lost power
            break
        kept += len(line.encode())
    log.truncate(kept)
    return log


def validate(net, datasets, size, rank, world, device):
    """{domain: scores}; each process takes every world-th photo."""
    net.eval()
    results = {}
    for dataset in datasets:
        matrix = confusion_of(net, dataset, size, range(rank, len(dataset), world))
        results[dataset.domain.name] = scores(distributed.total(torch.from_numpy(matrix).to(device)).cpu().numpy())
    net.train()
    return results


def precision(name, device):
    """The dtype of autocast; None for float32."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


def finish(out, log, model, domains, val, results, best, passes, config, say):
    """The kept network, pictures, and a table of what was reached."""
    checkpoint.save(checkpoint.model_content(model.net, domains), out / "model.pt")
    log.seek(0)  # closing another handle of the file would end its lock
    save_curves([json.loads(line) for line in log], out / "curves.png")
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


def cli():
    """What `sst-train` and `python train.py` start."""
    try:
        run_program(main, "train.py")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"train.py: a loading process has ended ({str(error).strip().splitlines()[0]}); it may have run out of memory: go on with "
                 f"--resume, perhaps with fewer --workers")


if __name__ == "__main__":
    cli()
