"""What is recorded of a training: log.jsonl, a line every so often, and what is printed meanwhile."""

import json
import math
import time
import warnings
from pathlib import Path

import torch

from . import distributed
from .distributed import all_reduce, gather, print0
from .doubts import doubts
from .errors import InputError, InputWarning
from .losses import L_u
from .modules import centred_cosine, effective_rank, row_cosine
from .runs import open_log


# What is recorded of the rows of X_0 and X_L, under which key.
ROWS_OF_X = {"cos": row_cosine, "centred": centred_cosine, "rank": effective_rank}


class Step:
    """What a training step did, in this process.

    terms: names of the loss terms. values, images: of each micro-batch, its terms' values, its images' names.
    X: {domain: (X_0, X_L)} of the first micro-batch. unreadable: [(micro-batch, sentence)].
    shares: `gradient_shares` of the first micro-batch, where they were asked for.
    Of all processes: unread, the number of unreadable files; finite, whether losses and gradient were.
    """

    def __init__(self):
        self.terms, self.values, self.images, self.unreadable = (), [], [], []
        self.X, self.shares, self.unread, self.finite = None, None, 0, True

    def add(self, batch, terms, X):
        """A micro-batch (data.Batch) and what the model returned for it."""
        self.terms = tuple(terms)
        self.values.append(torch.stack([value.detach() for value in terms.values()]))
        self.images.append(batch.names)
        self.unreadable += [(batch.number, what) for what in batch.skipped]
        if self.X is None:
            self.X = {name: [x[0].detach(), *(x_L.detach() for x_L in x[1:][-1:])] for name, x in X.items()}


def gradient_shares(terms, weights, module, scale=1.0):
    """How much each kind of loss term ("seg", "aux", "dataset", ...) pulls at a module's parameters.

    {kind: the length of the gradient of its part of Eq. 12}, in parts of all lengths together. They are not
    parts of the whole gradient, which is shorter where terms pull against each other. weights: Eq. 12's.
    scale: of half precision.
    """
    kinds, lengths, parameters = {}, {}, [p for p in module.parameters() if p.requires_grad]
    for name, value in terms.items():
        if name != "total":
            kinds.setdefault(name.partition("/")[0], {})[name] = value
    for kind, part in kinds.items():
        loss = L_u(part, *weights) * scale
        gradient = (torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    if loss.requires_grad else ())
        lengths[kind] = float(torch.nn.utils.get_total_norm([g for g in gradient if g is not None]))
    return {kind: length / (sum(lengths.values()) or 1.0) for kind, length in lengths.items()}


class Journal:
    """log.jsonl and what is printed of a training. Every process has one; the first one's writes.

    at: the training's Progress. epoch_steps: steps of an epoch.
    """

    def __init__(self, config, at, epoch_steps, device):
        self.config, self.at, self.epoch_steps, self.device = config, at, epoch_steps, device
        self.log = open_log(Path(config.out), at) if distributed.first() else None
        self.board = board(config) if distributed.first() else None
        self.begun = self.logged = at.step
        self.started = self.mark = time.time()
        self.printed = self.waiting = self.waited = 0.0

    def write(self, kind, **fields):
        """A line of log.jsonl."""
        if self.log:
            line = {"step": self.at.step, "epoch": round(self.at.step / self.epoch_steps, 4), "kind": kind}
            print(json.dumps(line | fields), file=self.log, flush=True)
        if self.board:
            for name, value in flat(kind, fields):
                self.board.add_scalar(name, value, self.at.step)

    def lines(self):
        """All lines of the log so far."""
        self.log.seek(0)  # closing another handle of the file would end its lock
        return [json.loads(line) for line in self.log]

    def describe(self, model, words, train_sets, val_sets, place, path):
        """Print the settings and what is trained. words: about its weights. path: the checkpoint, or None."""
        config, images = self.config, self.config.global_batch
        for key, value in vars(config).items():
            hidden = ("out", "resume") + ("figures",) * bool(config.data or config.target)
            if key not in hidden and value is not False and value not in (None, []):
                print0(f"  {key:<18} {value}")
        listed = ", ".join(f"{t.domain.name} ({t.domain.num_classes} classes, {len(t)} training and {len(v)} "
                           "validation images)" for t, v in zip(train_sets, val_sets))
        print0(f"{len(train_sets)} label domains: {listed}")
        if words:
            print0(words)
        kept = sum(p.numel() for p in model.net.parameters())
        dropped = sum(p.numel() for p in model.parameters()) - kept
        source = " and the frozen source" if hasattr(model, "source") else ""
        print0(f"{kept:,} parameters are kept, {dropped:,} of SST{source} are dropped after training; "
               f"{config.steps} steps of {images} images; device {place.device}, {place.world} "
               f"process{'es' * (place.world > 1)}")
        if distributed.first():
            for dataset in (*train_sets, *val_sets):
                for sentence in doubts(dataset, training=dataset in train_sets):
                    warnings.warn(sentence, InputWarning, stacklevel=2)
        if config.resume and path:
            print0(f"goes on after step {self.at.step} ({path})")
        elif config.resume:
            print0("the run was interrupted before its first checkpoint, so it begins again")

    def timed(self, batches):
        """The same iterator. The time that training waits for it counts."""
        while True:
            asked = time.time()
            batch = next(batches, None)
            self.waiting += time.time() - asked
            if batch is None:
                return
            yield batch

    def record(self, done, lr):
        """What a Step did: a line every so often, and for every one that was skipped or met unreadable files.

        Raises InputError where too many were skipped in a row: training has diverged.
        """
        if done.unread:
            self.unreadable(done.unreadable, "another photo took its place")
        step, steps, counts = self.at.step, self.config.steps, self.at.counts
        due = step % self.config.log_every == 0 or step in (1, steps)
        if due or not done.finite:
            K = self.config.global_batch // self.config.batch_size
            losses = dict(zip(done.terms, all_reduce(sum(done.values) / K).tolist()))
        if not done.finite:
            self.skipped(done, losses)
            return
        counts["skipped_in_a_row"] = 0
        if due:
            rows = {key: {name: {of: measure(x).item() for of, x in zip(("x0", "xl"), X)}
                          for name, X in done.X.items()} for key, measure in ROWS_OF_X.items()}
            skipped = {key: counts[f"skipped_{key}"] for key in ("steps", "files")}
            self.write("train", loss=losses, lr=lr, **rows, skipped=skipped, time=self.times())
            self.progress(losses, lr)
        if done.shares and all(map(math.isfinite, done.shares.values())):
            self.write("gradient", shares=done.shares)

    def unreadable(self, files, instead):
        """Files that were passed over, [(order, sentence)] of each process; instead: what was done."""
        files = [what for _, what in gather(files)]
        if files:
            self.at.counts["skipped_files"] += len(files)
            self.write("unreadable", files=files)
            print0("\n".join(f"step {self.at.step}: {what}; {instead}" for what in files))

    def skipped(self, done, losses):
        """A step that was not finite."""
        step, counts, limit = self.at.step, self.at.counts, self.config.max_skips
        counts["skipped_steps"] += 1
        counts["skipped_in_a_row"] += 1
        finite = [bool(values.isfinite().all()) for values in done.values]
        guilty = [images for images, fine in zip(done.images, finite) if not fine]
        # Where the losses are finite, the gradient alone is not.
        files = gather(sum(guilty, [])) or gather(sum(done.images, []))
        what = ", ".join(name for name, value in losses.items() if not math.isfinite(value)) or "the gradient"
        losses = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        self.write("skipped", loss=losses, files=files)
        print0(f"step {step} skipped: not finite: {what}; images: {', '.join(files)}")
        if counts["skipped_in_a_row"] == limit:
            raise InputError(f"step {step}: {what} not finite for {limit} steps in a row: training has "
                             f"diverged; lower --lr {self.config.lr:g} or set --clip 1")

    def times(self):
        """Since the start: seconds, images a second. Since the last line: seconds a step, and of waiting.

        And the peak memory in GiB.
        """
        now, steps = time.time(), self.at.step - self.logged
        images = (self.at.step - self.begun) * self.config.global_batch
        times = {"seconds": now - self.started, "images_per_second": images / (now - self.started),
                 "step": (now - self.mark) / steps, "wait": self.waiting / steps,
                 "peak_memory": distributed.peak_memory(self.device)}
        self.waited += self.waiting
        self.mark, self.logged, self.waiting = now, self.at.step, 0.0
        return times

    def progress(self, losses, lr):
        """Print a line every three seconds, and at the end."""
        step, steps, now = self.at.step, self.config.steps, time.time()
        if now - self.printed > 3 or step == steps:
            self.printed, elapsed, done = now, now - self.started, step - self.begun
            losses = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print0(f"step {step}/{steps}  epoch {step / self.epoch_steps:.2f}  {losses}  lr {lr:.0e}  "
                   f"{done * self.config.global_batch / elapsed:.1f} images/s, "
                   f"{100 * self.waited / elapsed:.0f} % of the time loading them  "
                   f"{clock(elapsed / done * (steps - step))} left")

    def validation(self, results, skipped):
        """Print and log {domain: scores}; skipped: sentences. Returns the mean mIoU in percent."""
        miou = {name: result["miou"] for name, result in results.items()}
        mean = sum(miou.values()) / len(miou)
        listed = "  ".join(f"{name} {value:.2f}" for name, value in miou.items())
        print0(f"validation after step {self.at.step}: mIoU {listed}  mean {mean:.2f} %")
        accuracy = {name: result["mean_accuracy"] for name, result in results.items()}
        # After a kill between the two lines both are written again: open_log cuts before the first.
        self.write("val", miou=miou, mean_accuracy=accuracy, time={"seconds": time.time() - self.started})
        self.unreadable([(what, what) for what in skipped], "validation went on without it")
        return mean


def board(config):
    """What writes for TensorBoard (--log-to), or None."""
    if config.log_to is None:
        return None
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(Path(config.out) / "tensorboard")


def flat(name, fields):
    """Every number in nested dictionaries, with its place as a name: ("train/loss/seg/atr", 1.2)."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from flat(f"{name}/{key}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{name}/{key}", value


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
