"""The parts of training: augmented batches, the one-vs-rest loss, optimisers and their rate."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed import rank, world_size
from models import DHRNet

SHIFT_SHARE = 8  # the random translation is at most an eighth of the image's side
ROTATION, EXPANSION, CROP_SHARE = 15, 0.2, 28 / 32  # as published: degrees, shares of the side
GREY = 120  # of cutout's square and of rotate's canvas, about the mean of photographs
SGD_MOMENTUM, SGD_WEIGHT_DECAY, HALVINGS = 0.9, 5e-4, 8  # as published, but for HALVINGS: 19 there
WARMUP_SHARE = 0.1  # of a cycle's steps, before the rate falls linearly to 0
SECOND_CYCLE = 11 / 16, 15 / 16  # shares of all steps: where it starts and ends
PLATEAU = 0.4  # of the second cycle's peak rate
MUON_MOMENTUM = 0.6
ADAM_RATE, ADAM_BIAS_RATE = 0.02, 0.1  # as shares of Muon's rate: matrices, and biases
ADAM_BETAS, ADAM_WEIGHT_DECAY = (0.9, 0.95), 0.01
TUNING_FACTOR = 5  # of AdamW's rates, where the encoder is trained already


def augment(
    images: Tensor,
    index: Tensor,
    mirrored: Tensor,
    augmentation: str,
    cutout: int,
    generator: torch.Generator,
    pictures: Tensor | None = None,
) -> Tensor:
    """Take a batch of images, move and mirror them, cut a square out of each (DeVries and Taylor
    2017, arXiv 1708.04552), and mix pictures into half of them.

    Args:
        images: [N, H, W, C] uint8.
        index: [B] int64, which images.
        mirrored: [B] bool, which of them to mirror left to right.
        augmentation: "shift" or "rotate", see `shift` and `rotate`.
        cutout: side of the square in pixels, at most H; 0 for none.
        generator: source of all that is random, on the images' device.
        pictures: to mix into half of the images, see `mix`; None for none.

    Returns:
        [B, C, H, W] uint8.
    """
    move = {"shift": shift, "rotate": rotate}[augmentation]
    batch = move(images, index, mirrored, generator)
    if cutout:
        size, device = images.shape[1], index.device
        shape, pixels = (2, len(index), 1), torch.arange(size, device=device)
        corner = torch.randint(size - cutout + 1, shape, generator=generator, device=device)
        cut_rows, cut_columns = (pixels >= corner) & (pixels < corner + cutout)
        batch[cut_rows[:, :, None] & cut_columns[:, None, :]] = GREY
    batch = batch.permute(0, 3, 1, 2)
    return batch if pictures is None else mix(batch, pictures, generator)


def shift(images: Tensor, index: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """[B, H, W, C] images moved by up to an eighth of their side, with the border reflected."""
    size = images.shape[1]
    farthest = size // SHIFT_SHARE
    shape, device = (2, len(index), 1), index.device
    offset = torch.randint(-farthest, farthest + 1, shape, generator=generator, device=device)
    pixels = torch.arange(size, device=device)
    rows, columns = size - 1 - (size - 1 - (pixels + offset).abs()).abs()
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def rotate(images: Tensor, index: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """[B, H, W, C] images as published: rotated by up to 15 degrees, placed on a grey canvas of up
    to 1.2 times their side, and cut out of it.

    The window lies where the published 28x28 crop of 32x32 images would, but is as large as the
    images, so that the network trains on the size it is used on.
    """
    count, device = len(index), index.device
    angle, canvas = torch.rand((2, count), generator=generator, device=device)
    angle, canvas = (2 * angle - 1) * math.radians(ROTATION), 1 + EXPANSION * canvas
    place, crop = torch.rand((2, 2, count), generator=generator, device=device) - 0.5
    offset = crop * (canvas - CROP_SHARE) - place * (canvas - 1)  # in shares of the side
    cos, sin, sign = angle.cos(), angle.sin(), 1 - 2 * mirrored.float()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    column = turn @ (2 * offset.T[:, :, None])
    turn = turn * torch.stack([sign, torch.ones_like(sign)], dim=1)[:, None, :]
    batch = images[index].permute(0, 3, 1, 2).float() - GREY
    grid = F.affine_grid(torch.cat([turn, column], dim=2), list(batch.shape), align_corners=False)
    moved = F.grid_sample(batch, grid, align_corners=False) + GREY
    return moved.round().to(torch.uint8).permute(0, 2, 3, 1)


def mix(images: Tensor, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """`blend` half of the images with a random picture each: one round of PixMix.

    Args:
        images: [B, C, H, W] uint8.
        pictures: [P, H, W, C] uint8.
        generator: source of all that is random, on the images' device.
    """
    count, device = len(images), images.device
    drawn = torch.randint(len(pictures), (count,), generator=generator, device=device)
    blended = blend(images / 255, pictures[drawn].permute(0, 3, 1, 2) / 255, generator)
    chosen = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.5
    mixed = torch.where(chosen, (255 * blended).round().to(torch.uint8), images)
    return mixed.contiguous(memory_format=torch.channels_last)


def blend(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Add images in 0..1, [B, C, H, W], or multiply them, the first with more weight.

    Source: PixMix (Hendrycks et al. 2022, arXiv 2112.05135), with its weights, `much` from
    Beta(3, 1), `little` and `more` from Beta(1, 3). There each image goes through up to four such
    rounds, and is also mixed with itself.
    """
    uniform = torch.rand(5, len(first), 1, 1, 1, generator=generator, device=first.device)
    much, little, more = uniform[0] ** (1 / 3), *(1 - uniform[1:3] ** (1 / 3))
    added, against = uniform[3:] < 0.5
    a, b = torch.where(against, 1 + more, much), torch.where(against, -little, little)
    total = (a * (2 * first - 1) + b * (2 * second - 1) + 1) / 2
    product = (2 * first).clamp_min(1e-6) ** a * (2 * second).clamp_min(1e-6) ** b / 2
    return torch.where(added, total, product).clamp(0, 1)


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    mirrored: bool,
    augmentation: str,
    cutout: int,
    seed: int,
    epoch: int,
    pictures: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch of an epoch, augmented, with its labels.

    All that is random here is seeded at the start of each epoch, so that a resumed run draws what
    an uninterrupted one would have. Every image is mirrored every other epoch, as in airbench.

    Args:
        images: [N, H, W, C] uint8.
        labels: [N] int64.
        batch_size: of all processes together; what does not fill a batch is left out.
        mirrored: False mirrors no image.
        augmentation, cutout, pictures: as for `augment`.
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
        batch = augment(images, index, mirror[index], augmentation, cutout, generator, pictures)
        yield batch[mine], labels[index][mine]


def one_vs_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images of the summed cross-entropies of K sigmoids, each "this class or not".

    Softmax ignores a constant added to all logits. This loss fixes each logit's absolute value,
    which distances need.

    Args:
        logits: [N, K].
        labels: [N] int64; any number beyond 0..K-1 is none of the classes.
    """
    classes = torch.arange(logits.shape[1], device=labels.device)
    targets = (labels[:, None] == classes).float()
    entropies = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return entropies.sum(dim=1).mean()


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
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                buffer = state["momentum"]
                buffer.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(buffer, alpha=group["momentum"])
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(orthogonalize(update.flatten(1)).view_as(weight), alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Move the singular values of [m, n] to about 1 by three quintic Newton-Schulz iterations.

    Each multiplies x from the left by a polynomial in x x^T. The polynomials are multiplied first,
    as matrices of the shorter side, and x once: half the time, the same result.
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    gram = x @ x.T
    product = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(3):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


def build_optimizers(network: DHRNet, name: str, lr: float) -> list[torch.optim.Optimizer]:
    """Momentum SGD, as published; or Muon for the encoder's convolutions, and AdamW for the biases,
    the classifier and the decoder.

    Args:
        network: its trained parameters are handed to the optimisers.
        name: "sgd"; "muon"; or "tuning", for an encoder that is trained already: Muon with AdamW
            five times as fast beside it.
        lr: peak rate of SGD or Muon.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer]
    if name == "sgd":
        optimizers = [torch.optim.SGD(trained, lr, SGD_MOMENTUM, weight_decay=SGD_WEIGHT_DECAY)]
    else:
        filters = [p for p in network.encoder.parameters() if p.ndim == 4]
        others = [p for p in trained if all(p is not each for each in filters)]
        rate = lr * TUNING_FACTOR if name == "tuning" else lr
        groups = [
            {"params": [p for p in others if p.ndim > 1], "lr": ADAM_RATE * rate},
            {"params": [p for p in others if p.ndim == 1], "lr": ADAM_BIAS_RATE * rate},
        ]
        adam = torch.optim.AdamW(
            groups, betas=ADAM_BETAS, weight_decay=ADAM_WEIGHT_DECAY, fused=True
        )
        optimizers = [Muon(filters, lr, MUON_MOMENTUM), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def halving(step: int, total_steps: int) -> float:
    """Share of the peak rate at a step: halved at equal distances, as published."""
    return 0.5 ** (step * (HALVINGS + 1) // total_steps)


def one_cycle(step: int, total_steps: int) -> float:
    """Share of the peak rate at a step: a linear rise over the warm-up, then a linear fall to 0."""
    warmup = WARMUP_SHARE * total_steps
    return min((step + 1) / warmup, (total_steps - step) / (total_steps - warmup))


def two_cycles(step: int, total_steps: int) -> float:
    """Share of the peak rate at a step: one cycle; another, half as high, that ends on a plateau; a
    linear fall from there to 0."""
    cycle = second_cycle(total_steps)
    if step < cycle.start:
        return one_cycle(step, cycle.start)
    if step < cycle.stop:
        return plateau(step - cycle.start, len(cycle)) / 2
    return PLATEAU / 2 * (total_steps - step) / (total_steps - cycle.stop)


def second_cycle(total: int) -> range:
    """The epochs, or steps, of the second of `two_cycles`, without its fall to 0."""
    first, last = SECOND_CYCLE
    return range(round(first * total), round(last * total))


def plateau(step: int, total_steps: int) -> float:
    """Share of the peak rate at a step: one cycle that falls no lower than `PLATEAU`, where weights
    are averaged."""
    return max(one_cycle(step, max(1, total_steps * 2 // 3)), PLATEAU)


SCHEDULES = {"one-cycle": one_cycle, "two-cycles": two_cycles, "halving": halving}


def gflop_per_image(network: DHRNet) -> float:
    """Forward and backward operations of one training image, as PyTorch counts them."""
    trial = copy.deepcopy(network).eval()
    size, channels = network.config["image_size"], network.config["in_channels"]
    images = torch.zeros(1, channels, size, size, device=network.mean.device)
    with FlopCounterMode(display=False) as counter:
        logits, reconstruction, _ = trial(images)
        (logits.sum() + reconstruction.sum()).backward()
    return counter.get_total_flops() / 1e9
