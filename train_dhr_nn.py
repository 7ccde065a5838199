"""Train a DHR network: a classifier with a decoder that rebuilds the image from its latents.

    python train_dhr_nn.py                              # CIFAR-10, the fast network
    python train_dhr_nn.py --arch deep                  # repeats the shipped dhr_net.pt
    python train_dhr_nn.py --dataset folder:my/photos   # one sub-folder per class
    python train_dhr_nn.py --resume                     # go on after a stop
    torchrun --nproc-per-node 8 train_dhr_nn.py         # on eight GPUs

Every epoch is saved to OUT.partial. When the run is done, OUT is written, with
the open-set rule fitted to the network, and its course is drawn in OUT.png.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from activations import autocast, extract, keep_freed_memory, number_format, prepare_device
from command_line import check_writable, git_commit, make_parser, number, run, software_versions
from distributed import average, first_process_first, rank, replicated, world_size
from fractals import fractals
from methods import DHROpenMax, check_classes
from models import NETWORK_KEYS, DHRNet, load_checkpoint, replace_file, save_checkpoint
from open_set_data import KNOWN_SETS, KnownData, check_same_images, fingerprint, load_known
from training import (
    SCHEDULES,
    batches,
    build_optimizers,
    gflop_per_image,
    one_vs_rest,
    second_cycle,
)


class Recipe(NamedTuple):
    """Settings that `--arch` carries; a flag of the same name overrides one of the first five.

    The schedule `two-cycles` also mixes in fractals and averages the weights, see `train`.
    """

    epochs: int
    batch_size: int
    lr: float
    loss: str
    cutout: int
    optimizer: str = "muon"
    augmentation: str = "shift"
    schedule: str = "one-cycle"


RECIPES = {
    "fast": Recipe(epochs=11, batch_size=500, lr=0.1, loss="softmax", cutout=0),
    "deep": Recipe(64, 1000, 0.2, "one-vs-rest", 12, schedule="two-cycles"),
    "vgg": Recipe(36, 128, 0.05, "softmax", 0, "sgd", "rotate", "halving"),
    "tuned": Recipe(11, 500, 0.02, "one-vs-rest", 12, optimizer="tuning"),
}
SHIPPED_NETWORK = Path(__file__).resolve().parent / "dhr_net.pt"  # where `tuned` starts
# A small set takes smaller batches, for about 10 steps per epoch, and more epochs, for at least 300
# steps, or 100 where the encoder is trained already.
MIN_BATCH, MIN_STEPS_PER_EPOCH, MIN_STEPS, MIN_TUNING_STEPS = 16, 10, 300, 100
NOT_MIRRORED = ("mnist", "svhn", "digits")  # a mirrored digit is another sign
STATISTICS_IMAGES = 5000  # at most, for the input's statistics; fewer of more than 64x64 pixels
COURSE = ("epoch", "seconds", "rate", "cross_entropy", "mse", "train_accuracy", "val_accuracy")
STORED_ARGS = (
    "dataset", "known_classes", "image_size", "arch", *Recipe._fields, "reconstruction_weight",
    "seed", "no_mirror",
)  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "%(prog)s [option ...]")
    # fmt: off
    add = parser.add_argument
    add("--dataset", default="cifar10", metavar="NAME",
        help=f"{', '.join(KNOWN_SETS)}, or folder:PATH with one sub-folder of images per class "
        "(default cifar10)")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="where images are found or downloaded to (default data)")
    add("--known-classes", default="", metavar="LIST",
        help="names or indices, comma-separated; the others stay unknown (default: all are known)")
    add("--image-size", type=number(16, 1024), metavar="PIXELS",
        help="side that images are scaled and cut to, 16..1024 (default: the data set's own; "
        "48 for a folder)")
    add("--arch", choices=RECIPES,
        help="network and recipe: fast; deep, the shipped network's; vgg, the published network; "
        "tuned, which goes on from the shipped network's weights (default: tuned for a folder, "
        "otherwise fast). The recipe sets the five flags below, each of which overrides it")
    add("--epochs", type=number(1), metavar="N", help="passes over the training images, 1 or more")
    add("--batch-size", type=number(2), metavar="N", help="images per step, 2 or more")
    add("--lr", type=number(1e-9, kind=float), metavar="RATE",
        help="peak rate of SGD (vgg) or Muon, 1e-9 or more; AdamW's rates are proportional to it")
    add("--loss", choices=("softmax", "one-vs-rest"),
        help="cross-entropy of the softmax, as published, or of every logit's sigmoid")
    add("--cutout", type=number(0), metavar="PIXELS",
        help="side of a grey square at a random place of each training image; 0 for none")
    add("--reconstruction-weight", type=number(0, kind=float), default=1.0, metavar="W",
        help="of the mean squared error beside the cross-entropy, 0 for none (default 1)")
    add("--seed", type=number(0), default=0, metavar="N",
        help="of the initial weights, the batches and the augmentation (default 0)")
    add("--no-mirror", action="store_true",
        help="the mirror image of a picture is another thing, as with letters, or left and right "
        "hands (default: only for digits)")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU if there is one)")
    add("--out", type=Path, default=Path("trained.pt"), metavar="PATH",
        help="checkpoint to write (default trained.pt)")
    add("--resume", action="store_true",
        help="go on from OUT.partial, with the settings stored in it; name --dataset if it moved")
    add("--dry-run", action="store_true", help="check everything, take one step, write nothing")
    # fmt: on
    return parser.parse_args(argv)


def complete_settings(args: argparse.Namespace, count: int, image_size: int) -> None:
    """Fill in what no flag gave from the recipe, adapted to the number of training images.

    Raises:
        ValueError: a batch has more than all images, or the processes cannot share it; the square
            of cutout is larger than the images.
    """
    args.arch = args.arch or ("tuned" if args.dataset.startswith("folder:") else "fast")
    recipe, processes = RECIPES[args.arch], world_size()
    if args.batch_size is None:
        fitting = max(MIN_BATCH, count // MIN_STEPS_PER_EPOCH)
        whole = min(recipe.batch_size, fitting) // processes * processes
        args.batch_size = max(whole, 2 * processes)
    if args.batch_size > count:
        raise ValueError(f"--batch-size is {args.batch_size}; expected at most {count}, all images")
    if args.batch_size % processes or args.batch_size == processes:
        raise ValueError(
            f"--batch-size is {args.batch_size}; expected a multiple of {processes}, the number "
            "of processes, with at least two images each"
        )
    if args.epochs is None:
        steps = MIN_TUNING_STEPS if args.arch == "tuned" else MIN_STEPS
        args.epochs = max(recipe.epochs, math.ceil(steps / (count // args.batch_size)))
    for name in Recipe._fields[2:]:
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(recipe, name))
    if args.cutout > image_size:
        raise ValueError(f"--cutout is {args.cutout}; expected at most {image_size} pixels")


def load_unfinished(partial: Path, args: argparse.Namespace) -> tuple[DHRNet, dict[str, Any]]:
    """The network and the checkpoint of an unfinished run, whose settings replace those in `args`.

    Raises:
        ValueError: there is no unfinished run, another version of this script wrote it, or `args`
            differ from its settings.
    """
    if not partial.exists():
        raise ValueError(f"{partial} does not exist: nothing to resume, leave --resume out")
    network, saved = load_checkpoint(partial)
    if "optimizer_states" not in saved:
        raise ValueError(f"{partial} is a finished network: nothing to resume, rename it")
    if tuple(saved["train_args"]) != STORED_ARGS:
        raise ValueError(f"{partial} was written by another version: remove it and start again")
    stored, given, defaults = saved["train_args"], vars(args), vars(parse_args([]))
    if all(each.startswith("folder:") for each in (args.dataset, stored["dataset"])):
        stored["dataset"] = args.dataset  # its new place
    changed = [
        f"--{name.replace('_', '-')}"
        for name in stored.keys() & defaults.keys()
        if given[name] not in (defaults[name], stored[name])
    ]
    if changed:
        problem = f"--resume goes on with the settings in {partial}: leave out"
        raise ValueError(f"{problem} {', '.join(sorted(changed))}, or remove the file")
    given.update(stored)
    return network, {key: saved[key] for key in saved.keys() - NETWORK_KEYS}


def build_network(args: argparse.Namespace, data: KnownData) -> DHRNet:
    """A new network with the input statistics of the training images. For `tuned`: with statistics
    and weights of the shipped network, except the last layer and layers of another shape.

    Raises:
        ValueError: `tuned` is to learn from grey images.
    """
    torch.manual_seed(args.seed)
    count, size, _, channels = data.train.images.shape
    mirrored = not args.no_mirror and args.dataset not in NOT_MIRRORED
    if args.arch == "tuned":
        if channels != 3:
            raise ValueError("--arch tuned needs colour images; for grey ones, take --arch fast")
        start, _ = load_checkpoint(SHIPPED_NETWORK)
        network = DHRNet(len(data.classes), channels, size, start.config["arch"], mirrored)
        new = network.state_dict()
        for name, weight in start.state_dict().items():
            if not name.startswith("head.") and weight.shape == new[name].shape:
                new[name] = weight
        network.load_state_dict(new)
        return network
    network = DHRNet(len(data.classes), channels, size, args.arch, mirrored)
    most = STATISTICS_IMAGES * min(1, (64 / size) ** 2)
    some = data.train.images[:: math.ceil(count / most)]  # of every class
    network.fit_input_statistics(torch.from_numpy(some).permute(0, 3, 1, 2))
    return network


def describe(data: KnownData) -> str:
    """The classes and the number of images, in two lines."""
    labels = np.concatenate([data.train.labels, data.val.labels, data.test_known.labels])
    counts = np.bincount(labels, minlength=len(data.classes))
    classes = f"{len(data.classes)} classes of {counts.min():,} to {counts.max():,} images"
    if len(data.classes) <= 30:
        named = ", ".join(f"{c} {n:,}" for c, n in zip(data.classes, counts, strict=True))
        classes = f"{len(data.classes)} classes: {named}"
    size = data.train.images.shape[1]
    return (
        f"{classes}\n{len(data.train.labels):,} training, {len(data.val.labels):,} validation and "
        f"{len(data.test_known.labels):,} test images of {size}x{size} pixels"
    )


def finish(
    args: argparse.Namespace, network: DHRNet, saved: dict[str, Any], data: KnownData
) -> None:
    """Write the trained network with its open-set rule, and draw the course of the run."""
    network.eval()
    train = extract(network, data.train, args.batch_size, "train")
    val = extract(network, data.val, args.batch_size, "val")
    try:
        check_classes(train, data.classes)
        saved["open_set_rule"] = DHROpenMax().fit(train, val).state_dict()
    except ValueError as error:
        print(f"no open-set rule is stored: {error}", file=sys.stderr)
    save_checkpoint(args.out, network, **saved)
    print(f"wrote {args.out}")
    try:  # a picture cannot undo the run
        from report import draw_training  # matplotlib, only now

        picture, drawn = Path(f"{args.out}.png"), draw_training(saved["course"])
        replace_file(picture, lambda file: file.write(drawn))
        print(f"wrote {picture}")
    except Exception as error:
        print(f"the course of the run could not be drawn: {error}", file=sys.stderr)
    accuracy = extract(network, data.test_known, args.batch_size).accuracy
    print(f"accuracy on the {len(data.test_known.labels):,} test images: {100 * accuracy:.2f} %")
    print_next_commands(args, "open_set_rule" in saved)


def print_next_commands(args: argparse.Namespace, with_rule: bool) -> None:
    """What to do with the network."""
    measure = f"python compute_openmax.py --checkpoint {shlex.quote(str(args.out))}"
    if with_rule:
        print(f"say what a picture shows, or that it is unknown:\n  {measure} --images photo.jpg")
    if args.data_dir != Path("data"):
        measure += f" --data-dir {shlex.quote(str(args.data_dir))}"
    if args.dataset.startswith("folder:") and not args.known_classes:
        measure += " --unknown folder:PATH"
    print(f"measure it against unknown images:\n  {measure}")


def batches_of(
    args: argparse.Namespace, network: DHRNet, images: Tensor, labels: Tensor, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, from 0. In a second cycle, fractals are mixed in."""
    pictures = None
    if args.schedule == "two-cycles" and epoch in second_cycle(args.epochs):
        pictures = torch.from_numpy(fractals(*images.shape[2:])).to(images.device)
    return batches(
        images, labels, args.batch_size, network.config["mirrored"], args.augmentation,
        args.cutout, args.seed, epoch, pictures,
    )  # fmt: skip


def train(
    args: argparse.Namespace, network: DHRNet, optimizers: list[torch.optim.Optimizer],
    data: KnownData, saved: dict[str, Any], partial: Path,
) -> None:  # fmt: skip
    """Train from epoch `saved["epoch"]` on. Save every epoch, and keep the checkpoint's entries in
    `saved`.

    Raises:
        ValueError: a loss, or a weight, is not finite.
    """
    device = network.mean.device
    images, labels = (torch.from_numpy(array).to(device) for array in data.train)
    steps = len(images) // args.batch_size
    loss = one_vs_rest if args.loss == "one-vs-rest" else F.cross_entropy
    schedule, replica = SCHEDULES[args.schedule], replicated(network)
    averaged = AveragedModel(network) if args.schedule == "two-cycles" else None
    cycle = second_cycle(args.epochs * steps)
    if averaged and "averaged" in saved:
        averaged.load_state_dict(saved.pop("averaged"))
    print("epoch  seconds  images/s    rate  cross-entropy     MSE  train acc  val acc")
    for epoch in range(saved["epoch"], args.epochs):
        start, history = time.perf_counter(), []
        network.train()
        drawn = batches_of(args, network, images, labels, epoch)
        bar = tqdm(drawn, f"epoch {epoch + 1}", steps, unit="step", leave=False, disable=None)
        for step, (batch, target) in enumerate(bar, epoch * steps):
            if averaged and step == cycle.stop:
                network.load_state_dict(averaged.module.state_dict())
            with autocast(device):
                logits, reconstruction, _ = replica(batch)
                cross_entropy = loss(logits, target)
                mse = F.mse_loss(reconstruction, network.normalize(batch))
            (cross_entropy + args.reconstruction_weight * mse).backward()
            rate = schedule(step, args.epochs * steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["peak_lr"]
                optimizer.step()
                optimizer.zero_grad()
            if averaged and step in cycle[len(cycle) // 2 :]:
                averaged.update_parameters(network)
            right = (logits.argmax(dim=1) == target).float().mean()
            history.append(torch.stack([cross_entropy, mse, right]).detach())
            if args.dry_run:
                return
        losses = average(torch.stack(history).cpu().double())  # waits for the device
        seconds = time.perf_counter() - start
        if not (losses.isfinite().all() and network.is_finite()):
            remedy = f"remove {partial} and start again" if epoch else "start again"
            raise ValueError(f"loss not finite in epoch {epoch + 1}; {remedy} with a smaller --lr")
        if not rank():
            val_accuracy = extract(network.eval(), data.val, args.batch_size).accuracy
            row = (epoch + 1, seconds, rate * args.lr, *losses.mean(dim=0).tolist(), val_accuracy)
            saved["course"].append(dict(zip(COURSE, row, strict=True)))
            print_epoch(saved["course"][-1], steps * args.batch_size / seconds)
            saved |= {"epoch": epoch + 1, "val_accuracy": val_accuracy}
            mean = {"averaged": averaged.state_dict()} if averaged else {}
            states = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(partial, network, **saved, **mean, optimizer_states=states)


def print_epoch(row: dict[str, float], images_per_second: float) -> None:
    print(
        f"{row['epoch']:5d}  {row['seconds']:7.1f}  {images_per_second:8.0f}  {row['rate']:6.4f}  "
        f"{row['cross_entropy']:13.4f}  {row['mse']:6.4f}  {row['train_accuracy']:9.4f}  "
        f"{row['val_accuracy']:7.4f}",
        flush=True,
    )


def prepare_and_train(args: argparse.Namespace, partial: Path) -> None:
    check_writable(args.out)
    if args.out.exists() and not args.dry_run:
        print(f"{args.out} exists and will be replaced")
    saved: dict[str, Any] = {"epoch": 0, "course": []}
    if args.resume:
        network, saved = load_unfinished(partial, args)
    elif partial.exists() and not args.dry_run:
        raise ValueError(f"{partial} holds an unfinished run: go on with --resume, or remove it")
    device = prepare_device(args.device)

    # Images
    pixels = network.config["image_size"] if args.resume else args.image_size
    data = first_process_first(
        lambda: load_known(args.dataset, args.data_dir, args.known_classes, pixels)
    )
    print(describe(data))
    count, size = data.train.images.shape[:2]
    complete_settings(args, count, size)

    # Network and optimisers
    if args.resume:
        check_same_images(saved, data)
    else:
        network = build_network(args, data)
    network.to(device).to(memory_format=torch.channels_last)
    optimizers = build_optimizers(network, args.optimizer, args.lr)
    if args.resume:
        for optimizer, state in zip(optimizers, saved.pop("optimizer_states"), strict=True):
            optimizer.load_state_dict(state)
    parameters, steps = sum(p.numel() for p in network.parameters()), count // args.batch_size
    pflop = gflop_per_image(network) * steps * args.batch_size * args.epochs / 1e6
    print(
        f"{args.arch} network, {parameters:,} parameters; {args.epochs} epochs of {steps} steps of "
        f"{args.batch_size} images, {pflop:.3g} PFLOP; {device}, {number_format(device)}"
    )
    keep_freed_memory()

    # Training
    saved |= {
        "known_classes": list(data.classes),
        "train_args": {name: getattr(args, name) for name in STORED_ARGS},
        "seed": args.seed,
        "versions": software_versions(),
        "git_commit": git_commit(),
        "images": fingerprint(data),
        "pflop": pflop,
    }
    train(args, network, optimizers, data, saved, partial)
    if args.dry_run:
        print("dry run: took one step, wrote nothing")
    elif not rank():
        finish(args, network, saved, data)
        partial.unlink()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    partial = Path(f"{args.out}.partial")

    def kept() -> str:
        return f"add --resume to go on ({partial})" if partial.exists() else "no epoch was complete"

    return run("train_dhr_nn.py", lambda: prepare_and_train(args, partial), kept)


if __name__ == "__main__":
    raise SystemExit(main())
