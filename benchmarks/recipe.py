"""Compare changes to the training recipe of `deep`, one at a time, on classes left out.

    python benchmarks/recipe.py                            # all changes, two seeds; hours
    python benchmarks/recipe.py base turned --seeds 0      # some of them
    python benchmarks/recipe.py base one-fractal --second-cycle    # in 9 more epochs of `base`

Each network is a `fast` one under the recipe of `deep`: one-vs-rest, cutout, Muon. It knows six of
CIFAR-10's classes, different ones for each seed, and trains on 1,500 images of each. Its test
images are other training images of CIFAR-10. Unknown are those of the four classes left out, and
photographs of other kinds, as patches or scaled down (see zoo.py). No image of a reported table
takes part. Finished networks are kept, as activations, and not trained again.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from zoo import (
    ANIMALS,
    DATA,
    UNKNOWN_KINDS,
    VEHICLES_AND_HOOFED,
    compare,
    load,
    means,
    photos_beside,
    store,
)

from activations import autocast, keep_freed_memory, prepare_device
from command_line import make_parser
from fractals import fractals
from methods import DHROpenMax, OpenMaxSettings, build_methods
from models import DHRNet
from open_set_data import as_unknown, load_known
from openmax import UNKNOWN
from pictures import ImageSet
from training import (
    batches,
    blend,
    build_optimizers,
    gflop_per_image,
    mix,
    one_cycle,
    one_vs_rest,
    plateau,
    rotate,
)

EPOCHS, BATCH_SIZE, RATE, CUTOUT = 20, 500, 0.2, 12
SECOND_EPOCHS = 9  # of a second cycle, at half the rate
TRAIN_PER_CLASS, TEST_PER_CLASS = 1500, 500


class Spread(DHROpenMax):
    """The rule with another evidence, -||y - mean of y||: something unknown excites all classes
    alike. A network that was taught "none of these" pushes all of them away, so that ||y|| is large
    there."""

    def statistics(self, logits: Tensor, features: Tensor, latents_max: Tensor) -> Tensor:
        _, *others = super().statistics(logits, features, latents_max).T
        spread = logits.double() - logits.double().mean(dim=1, keepdim=True)
        return torch.stack([-torch.linalg.vector_norm(spread, dim=1), *others], dim=1)


class Base:
    """the recipe of `deep`"""

    cost = 1.0  # images seen per training image
    schedule = staticmethod(one_cycle)

    def __init__(self, num_classes: int, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.network = self.build(num_classes)

    def build(self, num_classes: int) -> DHRNet:
        return DHRNet(num_classes)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.network, "muon", RATE)

    def views(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown of a batch: images [N, C, H, W] uint8, labels [N]."""
        return images, labels

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits, reconstruction, _ = self.network(images)
        mse = F.mse_loss(reconstruction, self.network.normalize(images))
        return self.classify(logits, labels) + mse

    def classify(self, logits: Tensor, labels: Tensor) -> Tensor:
        return one_vs_rest(logits, labels)

    def after(self, step: int, steps: int) -> None:
        """What follows a step."""


class T2FNorm(Base):
    """softmax on W f / (0.1 |f|) in training, on W f afterwards (T2FNorm)"""

    def build(self, num_classes: int) -> DHRNet:
        network = super().build(num_classes)
        network.head.insert(len(network.head) - 1, NormalisedInTraining())
        return network

    def classify(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)


class NormalisedInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.normalize(x, dim=1) if self.training else x


class Nesterov(Base):
    """Nesterov SGD in place of Muon, batch-norm biases at 64 times its rate (airbench)"""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        muon, adam = super().optimizers()
        filters = muon.param_groups[0]["params"]
        norms = [m.bias for m in self.network.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        of_norms = {id(bias) for bias in norms}
        for group in adam.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in of_norms]
        decay = 0.012 * BATCH_SIZE / (1024 * (1 + 1 / 0.15))
        groups = [
            {"params": filters, "lr": 1.0, "weight_decay": decay},
            {"params": norms, "lr": 64.0, "weight_decay": decay / 64},
        ]
        sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
        for group in sgd.param_groups:
            group["peak_lr"] = group["lr"]
        return [sgd, adam]


class Lookahead(Base):
    """Lookahead every fifth step (airbench)"""

    def after(self, step: int, steps: int) -> None:
        state = [v for v in self.network.state_dict().values() if v.is_floating_point()]
        if not step:
            self.slow = [value.clone() for value in state]
        if step % 5 == 4 or step == steps - 1:
            decay = 0.95**5 * (step / steps) ** 3 if step < steps - 1 else 1.0
            for slow, value in zip(self.slow, state, strict=True):
                slow.lerp_(value, 1 - decay)
                value.copy_(slow)


class Turned(Base):
    """with a quarter as many images turned by quarters as "none of these\""""

    cost = 1.25

    def views(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        none = torch.full_like(labels[::4], UNKNOWN)
        changed = self.change(images[::4]).contiguous(memory_format=torch.channels_last)
        return torch.cat([images, changed]), torch.cat([labels, none])

    def change(self, images: Tensor) -> Tensor:
        turns = torch.randint(1, 4, (), generator=self.generator, device=images.device)
        return images.rot90(int(turns), (2, 3))


class TurnedHalf(Turned):
    """the same, told to be each class with a probability of 1/2 (entropic open-set loss)"""

    def classify(self, logits: Tensor, labels: Tensor) -> Tensor:
        halves = logits[labels == UNKNOWN].float().sum() / 2  # BCE(y, t) = BCE(y, 0) - t y
        return one_vs_rest(logits, labels) - halves / len(labels)


class TurnedOrShuffled(Turned):
    """with a quarter as many images, turned or of exchanged quadrants, as "none of these\""""

    def change(self, images: Tensor) -> Tensor:
        """Turn one half; in the other, exchange left and right, top and bottom, or both."""
        half, side = len(images) // 2, images.shape[-1] // 2
        turned = super().change(images[:half])
        which = torch.randint(3, (), generator=self.generator, device=images.device)
        axes = [(3,), (2,), (2, 3)][int(which)]
        return torch.cat([turned, images[half:].roll((side,) * len(axes), axes)])


def coloured_noise(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """[count, size, size, 3] uint8 noise whose amplitude falls with the frequency f as f^-a, with a
    drawn from 0.5..2, in three random colours each."""
    row, column = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    frequency = np.hypot(row, column)
    frequency[0, 0] = np.inf  # no constant part
    slope = rng.uniform(0.5, 2, (count, 1, 1, 1))
    phases = rng.standard_normal((2, count, 3, size, size // 2 + 1))
    noise = np.fft.irfft2((phases[0] + 1j * phases[1]) * frequency**-slope, (size, size))
    noise /= noise.std(axis=(2, 3), keepdims=True)
    colours, ground = rng.standard_normal((count, 3, 3)), rng.uniform(0, 1, (count, 1, 1, 3))
    pictures = ground + 0.15 * np.einsum("nchw,ncd->nhwd", noise, colours)
    return (255 * pictures).clip(0, 255).astype(np.uint8)


class Fractals(Base):
    """each image mixed up to four times with a fractal or a distorted copy of itself (PixMix)"""

    rounds = 4

    def __init__(self, num_classes: int, device: torch.device, seed: int) -> None:
        super().__init__(num_classes, device, seed)
        size = self.network.config["image_size"]
        self.pictures = torch.from_numpy(self.draw_pictures(size)).to(device)

    def draw_pictures(self, size: int) -> np.ndarray:
        return fractals(size, 3)

    def views(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        plain = images / 255
        mixed = torch.where(self.coin(images), self.distorted(images), plain)
        rounds = self.draw(images, self.rounds + 1)
        for done in range(self.rounds):
            other = self.pictures[self.draw(images, len(self.pictures)).flatten()]
            other = other.permute(0, 3, 1, 2) / 255
            other = torch.where(self.coin(images), self.distorted(images), other)
            blended = blend(mixed, other, self.generator)
            mixed = torch.where(rounds > done, blended, mixed)
        mixed = (255 * mixed).round().to(torch.uint8)
        return mixed.contiguous(memory_format=torch.channels_last), labels

    def uniform(self, images: Tensor) -> Tensor:
        shape, device = (len(images), 1, 1, 1), images.device
        return torch.rand(shape, generator=self.generator, device=device)

    def coin(self, images: Tensor) -> Tensor:
        return self.uniform(images) < 0.5

    def draw(self, images: Tensor, count: int) -> Tensor:
        return (self.uniform(images) * count).long()

    def distorted(self, images: Tensor) -> Tensor:
        """Rotated and shifted, with fewer grey levels, solarised, or with stretched contrast."""
        index = torch.arange(len(images), device=images.device)
        unmirrored = torch.zeros_like(index, dtype=torch.bool)
        turned = rotate(images.permute(0, 2, 3, 1), index, unmirrored, self.generator)
        pixels = images.float() / 255
        low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
        choices = torch.stack([
            turned.permute(0, 3, 1, 2).float() / 255,
            (images // 32 * 32).float() / 255,
            torch.where(pixels > 0.7, 1 - pixels, pixels),
            (pixels - low) / (high - low).clamp_min(0.05),
        ])  # fmt: skip
        return choices[self.draw(images, 4).flatten(), index]


class OneFractal(Fractals):
    """half of the images mixed once with a fractal, none distorted"""

    def views(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return mix(images, self.pictures, self.generator), labels


class Averaged(Base):
    """weights averaged over the second half, where the rate stays at a plateau"""

    schedule = staticmethod(plateau)

    def views(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shown = super().views(images, labels)
        self.last_shown = [*getattr(self, "last_shown", [])[-9:], shown[0]]
        return shown

    def after(self, step: int, steps: int) -> None:
        if step == steps // 2:
            self.average = AveragedModel(self.network)
        if step >= steps // 2:
            self.average.update_parameters(self.network)
        if step == steps - 1:
            update_bn(self.last_shown, self.average)
            self.network.load_state_dict(self.average.module.state_dict())


class AveragedNoise(Averaged, OneFractal):
    """half of the images mixed once with coloured noise, and weights averaged"""

    def draw_pictures(self, size: int) -> np.ndarray:
        return coloured_noise(2000, size, np.random.default_rng(0))


VARIANTS = {
    "base": Base, "t2fnorm": T2FNorm, "nesterov": Nesterov, "lookahead": Lookahead,
    "turned": Turned, "turned-half": TurnedHalf, "turned-or-shuffled": TurnedOrShuffled,
    "fractals": Fractals, "one-fractal": OneFractal, "averaged": Averaged,
    "averaged-noise": AveragedNoise,
}  # fmt: skip


def image_sets(seed: int) -> dict[str, ImageSet]:
    """train, val and test_known of the known classes; unknown ones by their kind."""
    known = (VEHICLES_AND_HOOFED, ANIMALS)[seed % 2]
    data = load_known("cifar10", DATA, known)
    rank = np.zeros(len(data.train.labels), int)  # of an image within its class
    for label in range(len(data.classes)):
        members = np.flatnonzero(data.train.labels == label)
        rank[members] = np.arange(len(members))
    test = data.train.where((rank >= TRAIN_PER_CLASS) & (rank < TRAIN_PER_CLASS + TEST_PER_CLASS))
    others = {*ANIMALS.split(","), *VEHICLES_AND_HOOFED.split(",")} - {*data.classes}
    left_out = load_known("cifar10", DATA, ",".join(sorted(others))).train
    return {
        "train": data.train.where(rank < TRAIN_PER_CLASS),
        "val": data.val,
        "test_known": test,
        "classes": as_unknown(left_out.images[:3000]),
        **{kind: as_unknown(images) for kind, images in photos_beside(known).items()},
    }


def train(
    variant: type[Base],
    sets: dict[str, ImageSet],
    device: torch.device,
    seed: int,
    start: dict[str, Tensor] | None = None,
) -> tuple[DHRNet, float]:
    """The trained network, and the PFLOP it took; with weights to start from, a second cycle."""
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(array).to(device) for array in sets["train"])
    num_classes = int(labels.max()) + 1
    recipe = variant(num_classes, device, seed)
    network = recipe.network
    network.fit_input_statistics(images[::5].permute(0, 3, 1, 2).cpu())
    epochs, height = (SECOND_EPOCHS, 0.5) if start else (EPOCHS, 1.0)
    if start:
        network.load_state_dict(start)
    network.to(device).to(memory_format=torch.channels_last)
    optimizers = recipe.optimizers()
    per_epoch = len(images) // BATCH_SIZE
    network.train()
    bar = tqdm(total=epochs * per_epoch, desc=variant.__name__, leave=False)
    for epoch in range(epochs):
        drawn = batches(
            images, labels, BATCH_SIZE, True, "shift", CUTOUT, seed,
            epoch + (EPOCHS if start else 0),
        )  # fmt: skip
        for step, (batch, label) in enumerate(drawn, epoch * per_epoch):
            for group in (group for each in optimizers for group in each.param_groups):
                group["lr"] = recipe.schedule(step, epochs * per_epoch) * height * group["peak_lr"]
            shown = recipe.views(batch, label)
            with autocast(device):
                loss = recipe.loss(*shown)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recipe.after(step, epochs * per_epoch)
            bar.update()
    bar.close()
    if not loss.isfinite():
        raise ValueError(f"{variant.__name__}: the loss is not finite")
    pflop = gflop_per_image(network) * recipe.cost * epochs * per_epoch * BATCH_SIZE / 1e6
    return network.eval(), pflop


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("variants", nargs="*", choices=[*VARIANTS, []], default=list(VARIANTS))
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="(default 0 1)")
    add(
        "--second-cycle",
        action="store_true",
        help="train `base`, and from its weights each change for 9 more epochs at half the rate",
    )
    add("--device", default="auto", metavar="NAME", help="(default auto)")
    add("--folder", type=Path, default=DATA / "recipe", metavar="DIR",
        help="for the activations (default data/recipe)")  # fmt: skip
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    device, costs = prepare_device(args.device), args.folder / "costs.json"
    keep_freed_memory()
    runs = {name: VARIANTS[name] for name in args.variants}
    if args.second_cycle:
        runs = {"base": Base} | {f"+ {name}": variant for name, variant in runs.items()}
    for seed in args.seeds:
        sets, weights = image_sets(seed), args.folder / f"base {seed}.pt"
        for name, variant in runs.items():
            path = args.folder / f"{name} {seed}.npz"
            if path.exists():
                continue
            started, start = time.perf_counter(), None
            if name.startswith("+"):
                start = torch.load(weights, device, weights_only=True)
            network, pflop = train(variant, sets, device, seed, start)
            if name == "base":
                torch.save(network.state_dict(), weights)
            store(network, sets, path)
            known = json.loads(costs.read_text()) if costs.exists() else {}
            costs.write_text(json.dumps(known | {name: pflop}))
            print(f"{name} {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    show(runs, args.seeds, args.folder)


def show(runs: dict[str, type[Base]], seeds: Sequence[int], folder: Path) -> None:
    """One row per change: its cost, and figures in %, means over the seeds."""
    costs = json.loads((folder / "costs.json").read_text())
    rules = ("dhr_openmax", "other")
    titles = ["dhr_openmax", "with the spread of y as evidence"]
    columns = "".join(f"{column:>9}" for column in (*UNKNOWN_KINDS, "mean"))
    print(f"{'AUROC in %':38}" + "".join(f"{title:>37}" for title in titles))
    print(f"{'':19}{'PFLOP':>9}{'accuracy':>10} {columns} {columns}  best published method")
    for name, variant in runs.items():
        networks = {f"{name} {seed}": load(folder / f"{name} {seed}.npz") for seed in seeds}
        accuracy = np.mean([sets["test_known"].accuracy for sets in networks.values()])
        figures = compare(
            networks, lambda _: {**build_methods(OpenMaxSettings()), "other": Spread()}
        )
        of = {method: mean["auroc"] for method, mean in means(figures).items()}
        row = f"{costs[name]:9.3f}{100 * accuracy:10.2f}"
        for rule in rules:
            areas = [figures[f"{name}, {kind}"][rule]["auroc"] for kind in UNKNOWN_KINDS]
            row += " " + "".join(f"{100 * area:9.2f}" for area in (*areas, of[rule]))
        best = max(of.keys() - {*rules}, key=of.__getitem__)
        print(f"{name:19}{row}  {best:10}{100 * of[best]:6.2f}  {variant.__doc__}")


if __name__ == "__main__":
    main()
