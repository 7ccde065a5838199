"""Train a DHR network: a classifier that also reconstructs its input through latents at every level.

    python train_dhr_nn.py                              # CIFAR-10; writes dhr_net.pt
    python train_dhr_nn.py --resume                     # go on where a stopped run was
    python train_dhr_nn.py --known-classes 0,1,2,3,4,5  # leave four classes unknown

Images come from --data-dir or are downloaded. After every epoch the run is saved to OUT.partial; when
it is done, OUT is written and OUT.partial removed, so OUT is always a whole, trained network.
"""

import argparse
import math
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models import ARCHITECTURES, DHRNet, load_checkpoint, prepare_device, save_checkpoint
from open_set_data import KNOWN_SETS, ImageSet, ImagesUnavailable, load_known

NOT_MIRRORED = ("mnist", "svhn", "digits")  # a mirrored digit is another sign
MAX_SHIFT = 2  # pixels, of the random translation
WARMUP_SHARE = 0.1  # of the steps, before the rate falls linearly to 0
LABEL_SMOOTHING = 0.1
MUON_MOMENTUM = 0.6
ADAM_RATE, ADAM_BIAS_RATE = 0.01, 0.05  # as shares of --lr: matrices, and biases
ADAM_BETAS, ADAM_WEIGHT_DECAY = (0.9, 0.95), 0.01


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--dataset",
        default="cifar10",
        metavar="NAME",
        help=f"{', '.join(KNOWN_SETS)}, or folder:PATH with one sub-folder a class (default cifar10)",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where image sets lie or are downloaded to (default data)",
    )
    add(
        "--known-classes",
        default="",
        metavar="LIST",
        help="names or indices, comma-separated; the others stay unknown (default: know all)",
    )
    add(
        "--arch",
        choices=ARCHITECTURES,
        default="fast",
        help="vgg is the published network (default fast)",
    )
    add(
        "--epochs",
        type=positive_int,
        default=16,
        metavar="N",
        help="passes over the training images (default 16)",
    )
    add(
        "--batch-size",
        type=positive_int,
        default=1000,
        metavar="N",
        help="images a step (default 1000)",
    )
    add(
        "--lr",
        type=positive_float,
        default=0.2,
        metavar="RATE",
        help="peak rate of the convolutions' Muon steps; the other rates scale along (default 0.2)",
    )
    add(
        "--reconstruction-weight",
        type=non_negative_float,
        default=1.0,
        metavar="W",
        help="weight of the reconstruction loss, 0 to switch it off (default 1)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the initial weights, the batches and the augmentation (default 0)",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU where there is one)",
    )
    add(
        "--out",
        type=Path,
        default=Path("dhr_net.pt"),
        metavar="PATH",
        help="checkpoint to write (default dhr_net.pt)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from OUT.partial, with the settings stored there",
    )
    add("--dry-run", action="store_true", help="check everything, take one step, write nothing")
    return parser.parse_args(argv)  # fmt: skip


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


def non_negative_float(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return float(text)


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


def one_cycle(step: int, total_steps: int) -> float:
    """Share of the peak rate at a step: a linear rise over the warm-up, then a linear fall to 0."""
    warmup = WARMUP_SHARE * total_steps
    return min((step + 1) / warmup, (total_steps - step) / (total_steps - warmup))


def augment(images: Tensor, index: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Take a batch of images, randomly translated, with the border reflected, and mirrored.

    Args:
        images: [N, H, W, C] uint8.
        index: [B] int64, which images.
        mirrored: [B] bool, which of them to mirror left to right.
        generator: source of the translations, on the images' device.

    Returns:
        [B, C, H, W] uint8 in channels-last memory order.
    """
    size = images.shape[1]
    shape = (2, len(index), 1)
    shift = torch.randint(
        -MAX_SHIFT, MAX_SHIFT + 1, shape, generator=generator, device=index.device
    )
    position = (torch.arange(size, device=index.device) + shift).abs()
    rows, columns = size - 1 - (size - 1 - position).abs()
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(
    model: DHRNet, images: ImageSet, batch_size: int, device: torch.device, autocast: torch.autocast
) -> float:
    """Share of images in 0..1 whose largest logit is their label's."""
    model.eval()
    correct = 0
    for start in range(0, len(images.labels), batch_size):
        batch = torch.from_numpy(images.images[start : start + batch_size]).to(device)
        with autocast:
            logits = model(batch.permute(0, 3, 1, 2), decode=False).logits
        labels = torch.from_numpy(images.labels[start : start + batch_size]).to(device)
        correct += int((logits.argmax(dim=1) == labels).sum())
    return correct / len(images.labels)


def software_versions() -> dict[str, str]:
    names = ("torch", "torchvision", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_commit() -> str:
    """The commit of this code, with `+` where files were changed since; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40",
               "--exclude=*", "--dirty=+"]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return ""


def train(args: argparse.Namespace) -> None:
    partial = args.out.with_name(args.out.name + ".partial")
    resumed = None
    if args.resume:
        model, resumed = load_checkpoint(partial)
        vars(args).update(
            {**resumed["train_args"], "data_dir": args.data_dir, "device": args.device}
        )
    device, autocast = prepare_device(args.device)

    known_classes = [name for name in args.known_classes.split(",") if name]
    data = load_known(args.dataset, args.data_dir, known_classes)
    train_images = torch.from_numpy(data.train.images).to(device)
    train_labels = torch.from_numpy(data.train.labels).to(device)
    count, size, _, channels = train_images.shape
    if args.batch_size > count:
        raise ValueError(f"--batch-size {args.batch_size}: there are only {count} training images")

    torch.manual_seed(args.seed)
    if resumed is None:
        model = DHRNet(len(data.classes), channels, size, args.arch)
        model.fit_input_statistics(torch.from_numpy(data.train.images[:5000]).permute(0, 3, 1, 2))
    model.to(device, memory_format=torch.channels_last)
    optimizers = build_optimizers(model, args.lr)
    first_epoch = 0
    if resumed is not None:
        first_epoch = resumed["epoch"]
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    steps_per_epoch = count // args.batch_size
    total_steps = steps_per_epoch * args.epochs
    mirrored_first = torch.rand(count, generator=torch.Generator().manual_seed(args.seed)) < 0.5
    mirrored_first = mirrored_first.to(device)
    print(
        f"{args.arch} DHR network, {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{count:,} training images of {len(data.classes)} classes; {device}, "
        f"{'bfloat16' if autocast._enabled else 'float32'}"
    )
    print("epoch  seconds  images/s    rate  cross-entropy     MSE  train acc  val acc")

    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        # A seed an epoch makes a resumed run draw what the uninterrupted one would have.
        torch.manual_seed(args.seed * 100_003 + epoch)
        generator = torch.Generator(device).manual_seed(args.seed * 100_003 + epoch)
        order = torch.randperm(count, generator=generator, device=device)
        mirrored = mirrored_first ^ (epoch % 2 == 1)  # each image alternates: airbench
        if args.dataset in NOT_MIRRORED:
            mirrored = torch.zeros_like(mirrored)
        history = []
        model.train()
        bar = tqdm(range(steps_per_epoch), f"epoch {epoch + 1}", unit="step", leave=False)
        for step in bar:
            index = order[step * args.batch_size :][: args.batch_size]
            images = augment(train_images, index, mirrored[index], generator)
            labels = train_labels[index]
            scale = one_cycle(epoch * steps_per_epoch + step, total_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * scale
            with autocast:
                logits, reconstruction, _ = model(images)
                cross_entropy = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
                mse = F.mse_loss(reconstruction, model.normalize(images))
            (cross_entropy + args.reconstruction_weight * mse).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            train_accuracy = (logits.argmax(dim=1) == labels).float().mean()
            history.append(torch.stack([cross_entropy, mse, train_accuracy]).detach())
            if args.dry_run:
                break
        losses = torch.stack(history).cpu()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite().all(dim=1)).nonzero()[0]) + 1
            raise ValueError(
                f"the loss is not finite at step {bad} of epoch {epoch + 1}: try a smaller --lr; "
                f"{'no checkpoint was written' if epoch == 0 else f'{partial} holds the last epoch'}"
            )
        if args.dry_run:
            print("dry run: one step taken, nothing written")
            return
        seconds = time.perf_counter() - start
        val_accuracy = accuracy(model, data.val, args.batch_size, device, autocast)
        rate = steps_per_epoch * args.batch_size / seconds
        entropy, error, train_accuracy = losses.mean(dim=0).tolist()
        print(
            f"{epoch + 1:5d}  {seconds:7.1f}  {rate:8.0f}  {args.lr * scale:6.4f}  {entropy:13.4f}  "
            f"{error:6.4f}  {train_accuracy:9.4f}  {val_accuracy:7.4f}",
            flush=True,
        )
        entries = {
            "known_classes": list(data.classes),
            "train_args": {k: v for k, v in vars(args).items() if isinstance(v, str | int | float)},
            "epoch": epoch + 1,
            "val_accuracy": val_accuracy,
            "seed": args.seed,
            "versions": software_versions(),
            "git_commit": git_commit(),
        }
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(partial, model, **entries, optimizers=states)

    save_checkpoint(args.out, model, **entries)
    partial.unlink()
    test_accuracy = accuracy(model, data.test_known, args.batch_size, device, autocast)
    print(f"accuracy on the {len(data.test_known.labels):,} test images: {test_accuracy:.4f}")
    print(
        f"wrote {args.out}; next: python compute_openmax.py --checkpoint {shlex.quote(str(args.out))}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        train(args)
    except (ImagesUnavailable, ValueError, OSError) as error:
        print(f"train_dhr_nn.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
