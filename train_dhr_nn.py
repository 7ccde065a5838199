"""Train a DHR network: a classifier that also rebuilds its input from latents.

    python train_dhr_nn.py                        # CIFAR-10; writes dhr_net.pt
    python train_dhr_nn.py --resume               # go on after a stop
    python train_dhr_nn.py --known-classes 0,1,2  # leave the others unknown
    torchrun --nproc-per-node 8 train_dhr_nn.py   # on eight GPUs

Every epoch is saved to OUT.partial. When the run is done, OUT is written, with
the open-set rule fitted to the network; its course is drawn beside it as a PNG.
"""

import argparse
import math
import sys
from pathlib import Path

from choices import ARCHITECTURES, KNOWN_SETS, LOSSES, command_line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    # fmt: off
    add = parser.add_argument
    add("--dataset", default="cifar10", metavar="NAME",
        help=f"{', '.join(KNOWN_SETS)}, or folder:PATH with one sub-folder of images a class "
        "(default cifar10)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="where images lie or are downloaded to (default data)")
    add("--known-classes", default="", metavar="LIST",
        help="names or indices, comma-separated; the others stay unknown (default: know all)")
    add("--arch", choices=ARCHITECTURES, default="fast",
        help="vgg is the published network; medium has more channels than fast, deep more layers "
        "as well (default fast)")
    add("--epochs", type=int, default=11, metavar="N",
        help="passes over the training images, 1 or more (default 11)")
    add("--batch-size", type=int, default=500, metavar="N",
        help="images a step, 2 or more (default 500)")
    add("--lr", type=float, default=0.1, metavar="RATE",
        help="peak rate of Muon on the encoder, above 0; AdamW's rates follow it (default 0.1)")
    add("--loss", choices=LOSSES, default="softmax",
        help="cross-entropy of the softmax, as published, or of every logit's sigmoid "
        "(default softmax)")
    add("--reconstruction-weight", type=float, default=1.0, metavar="W",
        help="of the mean squared error beside the cross-entropy, 0 for none (default 1)")
    add("--cutout", type=int, default=0, metavar="PIXELS",
        help="side of the square made grey at a random place of each training image (default 0)")
    add("--seed", type=int, default=0, metavar="N",
        help="of the initial weights, the batches and the augmentation (default 0)")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU if any)")
    add("--out", type=Path, default=Path("dhr_net.pt"), metavar="PATH",
        help="checkpoint to write (default dhr_net.pt)")
    add("--resume", action="store_true",
        help="go on from OUT.partial, with the settings stored in it")
    add("--dry-run", action="store_true", help="check everything, take one step, write nothing")
    # fmt: on
    args = parser.parse_args(argv)
    if error := range_error(args):
        parser.error(error)
    return args


def range_error(args: argparse.Namespace) -> str:
    """Which setting is out of its range; empty where none is."""
    for flag, value, allowed in (
        ("--epochs", args.epochs, args.epochs >= 1),
        ("--batch-size", args.batch_size, args.batch_size >= 2),
        ("--lr", args.lr, 0 < args.lr < math.inf),
        ("--reconstruction-weight", args.reconstruction_weight,
         0 <= args.reconstruction_weight < math.inf),
        ("--cutout", args.cutout, args.cutout >= 0),
        ("--seed", args.seed, 0 <= args.seed < 2**32),
    ):  # fmt: skip
        if not allowed:
            return f"{flag} {value} is out of range; see --help"
    return ""


if __name__ == "__main__":  # bad arguments and --help end here, before the slow imports
    parse_args(None)

import copy
import shlex
import subprocess
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from distributed import (
    average,
    first_process_first,
    joined_processes,
    rank,
    replicated,
    world_size,
)
from models import (
    RUN_KEYS,
    DHRNet,
    extract,
    fit_rule,
    keep_freed_memory,
    load_checkpoint,
    pack_rule,
    prepare_device,
    replace_file,
    save_checkpoint,
    software_versions,
    try_writing,
)
from open_set_data import ImageSet, ImagesUnavailable, KnownData, load_known

NOT_MIRRORED = ("mnist", "svhn", "digits")  # a mirrored digit is another sign
STATISTICS_IMAGES = 5000  # at most, that the input's mean, deviation and whitening come from
MAX_SHIFT = 4  # pixels, of the random translation
GREY = 120  # of what cutout cuts out, about the mean of photographs
WARMUP_SHARE = 0.1  # of the steps, before the rate falls linearly to 0
MUON_MOMENTUM = 0.6
ADAM_RATE, ADAM_BIAS_RATE = 0.02, 0.1  # as shares of --lr: matrices, and biases
ADAM_BETAS, ADAM_WEIGHT_DECAY = (0.9, 0.95), 0.01
TAIL_SIZE = 20  # of the open-set rule; fewer where there are fewer validation images
CHECKPOINT_ROOM = 2**26  # bytes that must fit on the disk before training starts
COURSE = ("epoch", "seconds", "rate", "cross_entropy", "mse", "train_accuracy", "val_accuracy")
STORED_ARGS = (
    "dataset", "known_classes", "arch", "epochs", "batch_size", "lr", "loss",
    "reconstruction_weight", "cutout", "seed",
)  # fmt: skip


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for convolutions followed by normalisation.

    Filters [out, in, h, w] are treated as [out, in * h * w] matrices and kept at norm sqrt(out).
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; constants from airbench.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(buffer, alpha=group["momentum"])
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(orthogonalize(update.flatten(1)).view_as(weight), alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Move the singular values of [m, n] to about 1 by three quintic Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def build_optimizers(model: DHRNet, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the encoder's convolutions, AdamW for the biases, the classifier and the decoder."""
    trained = [p for p in model.parameters() if p.requires_grad]
    filters = [p for p in model.encoder.parameters() if p.requires_grad and p.ndim == 4]
    in_filters = {id(p) for p in filters}
    others = [p for p in trained if id(p) not in in_filters]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": ADAM_RATE * lr},
        {"params": [p for p in others if p.ndim == 1], "lr": ADAM_BIAS_RATE * lr},
    ]
    adam = torch.optim.AdamW(groups, betas=ADAM_BETAS, weight_decay=ADAM_WEIGHT_DECAY, fused=True)
    optimizers = [Muon(filters, lr, MUON_MOMENTUM), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def restore(
    optimizers: list[torch.optim.Optimizer], saved: list[dict[str, Any]], model: DHRNet
) -> None:
    """Put optimiser states back, once their keys, shapes and types are known to fit the network.

    Raises:
        ValueError: they do not.
    """

    def layout(states: list[dict[str, Any]]) -> Any:
        return [
            {i: {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
             for i, entries in dict(state)["state"].items()}
            for state in states
        ]  # fmt: skip

    trial = copy.deepcopy(model)  # one step fills its optimisers' states
    for parameter in trial.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fresh = build_optimizers(trial, 0.0)
    for optimizer in fresh:
        optimizer.step()
    try:
        fits = layout(saved) == layout([optimizer.state_dict() for optimizer in fresh])
    except Exception:  # nothing of the kind
        fits = False
    if not fits:
        raise ValueError("the optimiser states in it do not fit its network")
    for optimizer, state in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})


def one_cycle(step: int, total_steps: int) -> float:
    """Share of the peak rate at a step: a linear rise over the warm-up, then a linear fall to 0."""
    warmup = WARMUP_SHARE * total_steps
    return min((step + 1) / warmup, (total_steps - step) / (total_steps - warmup))


def augment(
    images: Tensor, index: Tensor, mirrored: Tensor, cutout: int, generator: torch.Generator
) -> Tensor:
    """Take a batch of images, randomly translated, with the border reflected, and mirrored, and cut
    a square out of each (DeVries and Taylor 2017, arXiv 1708.04552).

    Args:
        images: [N, H, W, C] uint8.
        index: [B] int64, which images.
        mirrored: [B] bool, which of them to mirror left to right.
        cutout: side of the square in pixels, at most H; 0 for none.
        generator: source of the translations and squares, on the images' device.

    Returns:
        [B, C, H, W] uint8 in channels-last memory order.
    """
    size = images.shape[1]
    shape, device = (2, len(index), 1), index.device
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, shape, generator=generator, device=device)
    pixels = torch.arange(size, device=device)
    rows, columns = size - 1 - (size - 1 - (pixels + shift).abs()).abs()
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    if cutout:
        corner = torch.randint(size - cutout + 1, shape, generator=generator, device=device)
        cut_rows, cut_columns = (pixels >= corner) & (pixels < corner + cutout)
        batch[cut_rows[:, :, None] & cut_columns[:, None, :]] = GREY
    return batch.permute(0, 3, 1, 2)


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    mirrored: bool,
    cutout: int,
    seed: int,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch of an epoch, augmented, with its labels.

    All that is random here is seeded anew each epoch, so that a resumed run draws what an
    uninterrupted one would have. Every image is mirrored every other epoch, as in airbench.

    Args:
        images: [N, H, W, C] uint8.
        labels: [N] int64.
        batch_size: of all processes together; what does not fill a batch is left out.
        mirrored: False mirrors no image.
        cutout: as for `augment`.
        seed: of the run.
        epoch: from 0.
    """
    count, share = len(images), batch_size // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    torch.manual_seed((seed * 100_003 + epoch) * world_size() + rank())  # of dropout
    generator = torch.Generator(images.device).manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator, device=images.device)
    mirror = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    mirror = (mirror.to(images.device) ^ (epoch % 2 == 1)) & mirrored
    for index in order[: count // batch_size * batch_size].split(batch_size):
        batch = augment(images, index, mirror[index], cutout, generator)
        yield batch[mine], labels[index][mine]


def one_vs_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images of the summed cross-entropies of K sigmoids, each "this class or not".

    The softmax leaves open where the logits lie along (1, ..., 1); this loss pins each of them.

    Args:
        logits: [N, K].
        labels: [N] int64.
    """
    targets = F.one_hot(labels, logits.shape[1]).float()
    entropies = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return entropies.sum(dim=1).mean()


def training_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    loss: str,
    reconstruction_weight: float,
    autocast: torch.autocast,
) -> Tensor:
    """Take one step on a batch; return its [cross-entropy, squared error, accuracy]."""
    cross_entropy_of = one_vs_rest if loss == "one-vs-rest" else F.cross_entropy
    with autocast:
        logits, reconstruction, _ = model(images)
        cross_entropy = cross_entropy_of(logits, labels)
        plain_model: Any = getattr(model, "module", model)  # what DistributedDataParallel wraps
        mse = F.mse_loss(reconstruction, plain_model.normalize(images))
    (cross_entropy + reconstruction_weight * mse).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return torch.stack([cross_entropy, mse, accuracy]).detach()


def accuracy(
    model: DHRNet, images: ImageSet, batch_size: int, device: torch.device, autocast: torch.autocast
) -> float:
    """Share of images in 0..1 whose largest logit, of `activations`, is their label's."""
    model.eval()
    correct = 0
    for start in range(0, len(images.labels), batch_size):
        batch = torch.from_numpy(images.images[start : start + batch_size]).to(device)
        with autocast:
            logits, *_ = model.activations(batch.permute(0, 3, 1, 2))
        labels = torch.from_numpy(images.labels[start : start + batch_size]).to(device)
        correct += int((logits.argmax(dim=1) == labels).sum())
    return correct / len(images.labels)


def git_commit() -> str:
    """This code's commit, `+` where files were changed since; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40",
               "--exclude=*", "--dirty=+"]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return ""


def load_unfinished(partial: Path, args: argparse.Namespace) -> tuple[DHRNet, dict[str, Any]]:
    """The network and the checkpoint of an unfinished run, whose settings replace those in `args`.

    Raises:
        ValueError: it does not exist, is finished, or lacks or contradicts something.
    """
    if not partial.exists():
        raise ValueError(f"{partial} does not exist: nothing to resume, leave --resume out")
    model, saved = load_checkpoint(partial)
    if "optimizer_states" not in saved:
        raise ValueError(f"{partial} is a finished network: nothing to resume, rename it")
    stored = {name: saved["train_args"].get(name) for name in STORED_ARGS}
    if any(type(value) is not type(getattr(args, name)) for name, value in stored.items()):
        raise ValueError(f"{partial} lacks settings of its run: remove it and start anew")
    vars(args).update(stored)
    off = "" if saved["epoch"] in range(1, args.epochs + 1) else f"epoch {saved['epoch']}"
    if off := off or range_error(args):
        raise ValueError(f"{partial} is damaged ({off}): remove it and start anew")
    try:
        kinds = {tuple(type(row[name]) for name in COURSE) for row in saved["course"]}
    except Exception:  # nothing of the kind
        kinds = {()}
    if kinds != {(int, *[float] * 6)}:
        raise ValueError(f"{partial} does not tell the course of its run; remove it")
    return model, saved


def check_batch_size(batch_size: int, count: int) -> None:
    """Refuse a batch of more than all images, or one that the processes cannot share.

    Raises:
        ValueError: it is one of these.
    """
    if batch_size > count:
        raise ValueError(f"--batch-size is {batch_size}; expected at most {count}, all images")
    if batch_size % world_size() or batch_size == world_size():
        raise ValueError(
            f"--batch-size is {batch_size}; expected a multiple of {world_size()}, the number "
            "of processes, with at least two images each"
        )


def broken_step(losses: Tensor, model: DHRNet) -> int:
    """First of the steps [S, 3] with a loss that is not finite, or the last where weights are not;
    0 where all is well."""
    bad_steps = (~losses.isfinite()).any(dim=1).nonzero()
    if len(bad_steps):
        return 1 + int(bad_steps[0])
    finite = all(weight.isfinite().all() for weight in model.state_dict().values())
    return 0 if finite else len(losses)


def finish(
    out: Path,
    model: DHRNet,
    saved: dict[str, Any],
    data: KnownData,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
) -> None:
    """Write the trained network to `out`, with its open-set rule, and the picture of its course.

    Args:
        out: path of the checkpoint.
        model: the network.
        saved: entries of the checkpoint of its last epoch.
        data: images; the rule is fitted to those of training and validation.
        batch_size: images sent to the device at once.
        device, autocast: what to run the network on.
    """
    model.eval()
    train, val = (
        extract(model, images, title, batch_size, device, autocast)
        for title, images in (("train", data.train), ("val", data.val))
    )
    try:
        rule = fit_rule(train, val, min(TAIL_SIZE, len(val.labels)))
        saved = {**saved, "open_set_rule": pack_rule(rule, val)}
    except ValueError as error:
        print(f"no open-set rule is stored: {error}")
    save_checkpoint(out, model, **saved)
    from report import draw_training  # matplotlib, only now

    picture = out.with_suffix(".png")
    replace_file(picture, lambda file: file.write(draw_training(saved["course"])))
    test_accuracy = accuracy(model, data.test_known, batch_size, device, autocast)
    print(f"accuracy on the {len(data.test_known.labels):,} test images: {test_accuracy:.4f}")
    print(f"wrote {out} and {picture}; measure it with")
    print(f"  python compute_openmax.py --checkpoint {shlex.quote(str(out))}")


def train(args: argparse.Namespace, partial: Path) -> None:
    if not rank():
        for path in (args.out, partial):
            try_writing(path, CHECKPOINT_ROOM)
    if args.resume:
        model, saved = load_unfinished(partial, args)
    elif partial.exists() and not args.dry_run:
        raise ValueError(f"{partial} holds an unfinished run: go on with --resume, or remove it")
    device, autocast = prepare_device(args.device)

    # Data: one uint8 tensor on the device
    data = first_process_first(lambda: load_known(args.dataset, args.data_dir, args.known_classes))
    images = torch.from_numpy(data.train.images).to(device)
    labels = torch.from_numpy(data.train.labels).to(device)
    count, size, _, channels = images.shape
    check_batch_size(args.batch_size, count)
    if args.cutout > size:
        raise ValueError(f"--cutout is {args.cutout}; expected at most {size}, the images' side")

    # Network and optimisers
    if args.resume:
        fits = {"num_classes": len(data.classes), "in_channels": channels, "image_size": size}
        same_classes = saved["known_classes"] == list(data.classes)
        if not (fits.items() <= model.config.items() and same_classes):
            raise ValueError(
                f"{args.dataset} is not what {partial} was trained on: has it changed?"
            )
    else:
        torch.manual_seed(args.seed)
        mirrored = args.dataset not in NOT_MIRRORED
        model = DHRNet(len(data.classes), channels, size, args.arch, mirrored)
        some = data.train.images[:: -(-count // STATISTICS_IMAGES)]  # of every class
        model.fit_input_statistics(torch.from_numpy(some).permute(0, 3, 1, 2))
    model.to(device).to(memory_format=torch.channels_last)
    network = replicated(model)
    optimizers = build_optimizers(model, args.lr)
    first_epoch, steps = 0, count // args.batch_size
    course: list[dict[str, float]] = []  # one row an epoch
    if args.resume:
        first_epoch, course = saved["epoch"], saved["course"]
        restore(optimizers, saved["optimizer_states"], model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.arch} DHR network, {parameters:,} parameters, {len(data.classes)} classes; "
        f"{count:,} training images; {device}, {'bfloat16' if autocast._enabled else 'float32'}"
    )
    keep_freed_memory()
    print("epoch  seconds  images/s    rate  cross-entropy     MSE  train acc  val acc")

    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        model.train()
        history = []
        draws = args.batch_size, model.config["mirrored"], args.cutout, args.seed, epoch
        bar = tqdm(
            batches(images, labels, *draws), f"epoch {epoch + 1}", steps, unit="step", leave=False,
            disable=rank() > 0,
        )  # fmt: skip
        for step, (batch, target) in enumerate(bar, epoch * steps):
            rate = one_cycle(step, args.epochs * steps)
            for group in chain(*(optimizer.param_groups for optimizer in optimizers)):
                group["lr"] = rate * group["peak_lr"]
            terms = args.loss, args.reconstruction_weight
            history.append(training_step(network, optimizers, batch, target, *terms, autocast))
            if args.dry_run:
                print("dry run: took one step, wrote nothing")
                return
        seconds = time.perf_counter() - start
        losses = average(torch.stack(history).double().cpu())
        if bad_step := broken_step(losses, model):
            raise ValueError(
                f"loss not finite at step {bad_step} of epoch {epoch + 1}; try a smaller --lr"
                + (f" ({partial} holds epoch {epoch})" if epoch else "")
            )
        if rank():
            continue
        val_accuracy = accuracy(model, data.val, args.batch_size, device, autocast)
        images_per_second = steps * args.batch_size / seconds
        cross_entropy, mse, train_accuracy = losses.mean(dim=0).tolist()
        print(
            f"{epoch + 1:5d}  {seconds:7.1f}  {images_per_second:8.0f}  {rate * args.lr:6.4f}  "
            f"{cross_entropy:13.4f}  {mse:6.4f}  {train_accuracy:9.4f}  {val_accuracy:7.4f}",
            flush=True,
        )
        row = (epoch + 1, seconds, rate * args.lr, cross_entropy, mse, train_accuracy, val_accuracy)
        course.append(dict(zip(COURSE, row, strict=True)))
        saved = {
            "known_classes": list(data.classes),
            "train_args": {name: getattr(args, name) for name in STORED_ARGS},
            "epoch": epoch + 1,
            "val_accuracy": val_accuracy,
            "seed": args.seed,
            "versions": software_versions(),
            "git_commit": git_commit(),
            "course": course,
        }
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(partial, model, **saved, optimizer_states=states)

    if not rank():
        entries = {name: saved[name] for name in (*RUN_KEYS, "course")}
        finish(args.out, model, entries, data, args.batch_size, device, autocast)
        partial.unlink()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    partial = Path(f"{args.out}.partial")
    try:
        with joined_processes():
            train(args, partial)
    except (ImagesUnavailable, ValueError, OSError) as error:
        print(f"train_dhr_nn.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "add --resume to go on" if partial.exists() else "no epoch was complete"
        print(f"\nstopped; {kept} ({partial})", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
