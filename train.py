"""Train a human parser with SST. One page, read from top to bottom:

    python train.py --mode universal                                   the built-in figures, minutes on a CPU
    torchrun --nproc_per_node=8 train.py --data pascal=DIR atr=DIR cihp=DIR                      as published
    torchrun --nproc_per_node=8 train.py --mode dedicated --source cihp=DIR --target pascal=DIR  as published
    python train.py --check --data NAME=DIR ...                        reads every file, reports on the data
    python train.py --help                                             every flag

What a step sees follows from seed and step alone: a run may be split, killed, resumed (docs/reliability.md).
"""

import signal
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from figures import Figures
from sst import checkpoint, distributed, runs
from sst.check import report
from sst.crops import Crops, Schedule, micro_batches
from sst.distributed import all_reduce, print0
from sst.errors import InputError, run_program
from sst.inference import confusion_of, samples
from sst.journal import Journal, Step, gradient_shares
from sst.losses import L_d, L_u
from sst.metrics import scores, summary
from sst.optim import build_optimizer, loss_weights, precision, set_rate
from sst.plots import save_curves, save_samples
from sst.scenarios import matrices

NEXT = """
Next: look at {out}/samples.png and {out}/curves.png. The network is {out}/model.pt.
  On the same crops: --sst published trains it with the paper's losses, --beta 0 --lam 0 --cross 0 with L_seg.
  --data NAME=DIR ... trains on your photos. --seed 1 shows how much of a difference is luck."""


def main():
    place = distributed.start()
    config = runs.configure()
    if config.check:
        sys.exit(report(runs.stages(config), lambda c: runs.open_data(c, Figures)) if place.rank == 0 else 0)
    stages = runs.stages(runs.placed(config, place.world))
    # What is wrong with the second step's data or masks is found before the first begins.
    data = [runs.open_data(stage, Figures) for stage in stages]
    domains = [[dataset.domain for dataset in train_sets] for train_sets, _ in data]
    if len(stages) == 2:
        matrices(stages[1], domains[1], sources=domains[0])
    with distributed.Interruption() as interruption:
        for stage, (train_sets, val_sets) in zip(stages, data):
            train(stage, stages[-1], train_sets, val_sets, place, interruption)
            distributed.barrier()  # the next step reads what the first process has written
    distributed.stop()


def train(config, run, train_sets, val_sets, place, interruption):
    """One training: universal parsing, or a step of dedicated parsing. run: the settings of the last step."""
    rank, world, device = place
    out, domains = Path(config.out), [dataset.domain for dataset in train_sets]
    lists = {dataset.domain.name: runs.fingerprint(dataset) for dataset in train_sets}

    # A step is K micro-batches of B crops, dealt whole to the processes.
    B, K = config.batch_size, config.global_batch // config.batch_size
    if K % world:
        raise InputError(f"--global-batch {K * B}: {K} micro-batches of {B} cannot be dealt evenly to "
                         f"{world} processes; give a multiple of {B * world}")
    schedule = Schedule([len(dataset) for dataset in train_sets], B, config.seed, config.slots)
    epoch_steps = -(-sum(schedule.sizes) // (K * B))
    config.steps = steps = config.steps or config.epochs * epoch_steps

    # What is trained, and how far it is.
    state, path = checkpoint.load_last(out) if config.resume else (None, None)
    model, words = runs.prepare(config, domains, device, resumed=state is not None)
    optimizer, dtype = build_optimizer(model, config), precision(config.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    at = runs.Progress()
    if state:
        at = runs.restore(state, path, config, lists, model, optimizer, scaler)
    if at.step == steps and (out / "samples.png").exists():
        return print0(f"{out}: this run is finished, all {steps} steps of it")
    journal = Journal(config, at, epoch_steps, device)  # claims the folder, before anything else is written
    print0(f"writing to {out}")
    runs.write_config(run)
    runs.write_config(config)
    journal.describe(model, words, train_sets, val_sets, place, path)

    wrapped = model
    if world > 1:
        devices = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    statistics = distributed.StepStatistics(model)
    crops = Crops(train_sets, config.size, config.crop, config.seed, config.scale, config.skip_bad,
                  config.resize)
    numbers = range(at.step * K + rank, steps * K, world)  # of this process's micro-batches
    batches = journal.timed(micro_batches(crops, schedule, numbers, config.workers, device))
    results = None

    def save(again=False):
        runs.save(out, model, domains, optimizer, scaler, at, lists, config, again)

    def score():
        skipped = [] if config.skip_bad else None
        results = validate(model.net, val_sets, config.size, place, skipped, interruption)
        if results is None:
            end()
        mean = journal.validation(results, skipped or [])
        if mean > at.best:
            at.best = mean
            if rank == 0:
                checkpoint.save(checkpoint.model_content(model.net, domains, config.size), out / "best.pt")
        at.pending = False
        save(again=True)
        return results

    def end():
        distributed.barrier()  # torchrun ends the others as soon as one has ended
        print0(f"interrupted by a signal; step {at.step} is saved, --resume {run.out} goes on")
        sys.exit(128 + (interruption.signal or signal.SIGTERM))

    if at.pending:  # interrupted before its validation had ended
        results = score()
    while at.step < steps:
        lr = set_rate(optimizer, at.step / steps, config)
        weights = loss_weights(config, at.step)
        mine = islice(batches, K // world)
        measured = model.net.backbone if falls_due(at.step + 1, config.shares, config) else None
        done = train_step(wrapped, mine, K, weights, optimizer, scaler, statistics, config, dtype, world,
                          measured)
        at.step += 1
        journal.record(done, lr)
        stop = signalled(interruption, device)
        at.pending = falls_due(at.step, config.validations, config)
        if at.pending or stop or at.step % config.save_every == 0 or at.step == steps:
            save()  # before validation, which a broken photo may end
        if stop:
            end()
        if at.pending:
            results = score()

    if config.validations and results is None:  # resumed when nothing was left to train
        skipped = [] if config.skip_bad else None
        results = validate(model.net, val_sets, config.size, place, skipped, interruption) or end()
    if rank == 0:
        finish(config, model.net, domains, val_sets, journal, results, at.best, schedule.passes(steps * K))
        if config is run:
            print0(NEXT.format(out=out))


def falls_due(step, times, config):
    """Whether a run that does something so many times, evenly spread, does it after that step."""
    return step * times // config.steps > (step - 1) * times // config.steps


def signalled(interruption, device):
    """Whether a signal came to any of the processes."""
    return all_reduce(torch.tensor(float(interruption.signal > 0), device=device)).item() > 0


def train_step(model, batches, K, weights, optimizer, scaler, statistics, config, dtype, world, measured):
    """One optimiser step: the mean over K micro-batches, of which `batches` yields this process its share.

    A step whose losses or gradient are not finite, in whatever process, changes nothing. measured: the module
    whose gradient is measured, or None. Returns a Step.
    """
    done = Step()
    statistics.begin()
    for n, batch in enumerate(batches, 1):
        torch.manual_seed((config.seed << 32) + batch.number)  # a network of yours may have dropout
        with model.no_sync() if world > 1 and n < K // world else nullcontext():
            with torch.autocast(batch.images.device.type, dtype, enabled=dtype is not None):
                terms, X = model(batch.images, batch.labels, batch.domain)
                if config.mode == "universal":
                    terms["total"] = L_u(terms, *weights)  # Eq. 12
                else:
                    terms["total"] = L_d(terms, batch.domain[0], *weights)  # Eq. 13
            if measured is not None and n == 1:
                done.shares = gradient_shares(terms, weights, measured, scaler.get_scale())
            scaler.scale(terms["total"] * world / K).backward()  # DDP averages over the processes
        statistics.collect()
        done.add(batch, terms, X)
    statistics.finish(K)

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.stack([norm, *(values.sum() for values in done.values)]).isfinite().all()
    events = torch.stack([~finite, finite.new_tensor(len(done.unreadable), dtype=torch.int64)])
    wrong, done.unread = all_reduce(events).tolist()  # what happened to one process, all of them know
    done.finite = wrong == 0
    if done.finite:
        if config.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
        scaler.step(optimizer)
    else:
        statistics.undo()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return done


def validate(net, val_sets, size, place, skipped, interruption):
    """{domain: scores}; each process takes every world-th photo. skipped: a list for what cannot be read.

    None where a signal came meanwhile, to whatever process.
    """
    net.eval()
    results = {}
    for dataset in val_sets:
        mine = range(place.rank, len(dataset), place.world)
        matrix = confusion_of(net, dataset, size, mine, skipped, lambda: interruption.signal)
        matrix = all_reduce(torch.from_numpy(matrix).to(place.device)).cpu().numpy()
        if signalled(interruption, place.device):
            return None
        if not matrix.any():
            raise InputError(f"validation of '{dataset.domain.name}': no photo that can be read has a "
                             "labelled pixel; repair the list, then go on with --resume")
        results[dataset.domain.name] = scores(matrix)
    net.train()
    return results


def finish(config, net, domains, val_sets, journal, results, best, passes):
    """The kept network, pictures, and a table of what was reached."""
    out = Path(config.out)
    checkpoint.save(checkpoint.model_content(net, domains, config.size), out / "model.pt")
    save_curves(journal.lines(), out / "curves.png")
    save_samples(samples(net.eval(), val_sets, config.size, config.skip_bad), out / "samples.png")
    passes = ", ".join(f"{d.name} {p:.2f}" for d, p in zip(domains, passes))
    print0(f"passes over the training sets: {passes}")
    if results:
        print0(f"\n{summary(results, domains)}\n"
               f"best.pt: mean mIoU {best:.2f} %, selected on these validation sets")


def cli():
    """What `sst-train` and `python train.py` start."""
    try:
        run_program(main, "train.py")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"train.py: a loading process has ended ({str(error).strip().splitlines()[0]}); it may have "
                 f"run out of memory: go on with --resume, perhaps with fewer --workers")


if __name__ == "__main__":
    cli()
