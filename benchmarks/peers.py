"""What the benchmarks are measured against: the same work as textbooks and other projects do it."""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import distance
from scipy.stats import exponweib
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import DHRNet
from openmax import libmr

TEXTBOOK_BATCH = 128


def loop_openmax(
    train: np.ndarray, labels: np.ndarray, images: np.ndarray, num_classes: int,
    tail_size: int = 20, alpha: int = 0,
) -> np.ndarray:  # fmt: skip
    """Probabilities [N, K + 1] as public ports of CROSR compute them: one image, one class, one
    libMR object at a time; `alpha` as in `openmax.OpenMax`."""
    means, models = [], []
    for c in range(num_classes):
        rows = [x for x, y in zip(train, labels, strict=True) if y == c == x[:num_classes].argmax()]
        means.append(np.mean(rows, axis=0))
        models.append(libmr.MR())
        distances = sorted(distance.euclidean(means[c], x) for x in rows)
        models[c].fit_high(distances[-tail_size:], tail_size)
    probabilities = []
    for x in images:
        y = x[:num_classes]
        w = [models[c].w_score(distance.euclidean(means[c], x)) for c in range(num_classes)]
        if alpha == 0:
            exponentials = np.exp(y - y.max())
            known = [exponentials[c] / exponentials.sum() * (1 - w[c]) for c in range(num_classes)]
            probabilities.append([*known, 1 - sum(known)])
        else:
            weights = np.zeros(num_classes)
            for rank, c in enumerate(np.argsort(y)[::-1][:alpha]):
                weights[c] = (alpha - rank) / alpha
            revised = [y[c] * (1 - w[c] * weights[c]) for c in range(num_classes)]
            revised.append(sum(y[c] * w[c] * weights[c] for c in range(num_classes)))
            exponentials = np.exp(np.array(revised) - max(revised))
            probabilities.append(list(exponentials / exponentials.sum()))
    return np.array(probabilities)


class PytorchOodOpenMax:
    """OpenMax of pytorch-ood 0.4.0 (Kirchheim, Apache-2.0), with its defaults, without its logging.

    Source: https://github.com/kkirchheim/pytorch-ood, pytorch_ood/detector/openmax/numpy.py and
    libnotmr.py. It knows logits only, and loops over the images.
    """

    def __init__(self, tail_size: int = 25, alpha: int = 10) -> None:
        self.tail_size, self.alpha = tail_size, alpha

    def fit(self, x: np.ndarray, y: np.ndarray) -> "PytorchOodOpenMax":
        self.centers, self.tails = {}, {}
        for label in np.unique(y):
            self.centers[label] = np.mean(x[y == label], axis=0)
            distances = np.linalg.norm(x[y == label] - self.centers[label], axis=1)
            tail = sorted(distances)[-self.tail_size :]
            params = exponweib.fit([d + 10000 - np.min(tail) for d in tail], floc=0, f0=1)
            self.tails[label] = np.min(tail), params[1], params[3]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Probabilities [N, 1 + K], the unknown class first."""
        distances = np.zeros(x.shape)
        for label in np.unique(np.argmax(x, axis=1)):
            distances[:, label] = np.linalg.norm(x - self.centers[label], axis=1)
        top = np.argsort(x, axis=1)[:, -self.alpha :][:, ::-1]
        alpha_weights = [((self.alpha + 1) - i) / self.alpha for i in range(1, self.alpha + 1)]
        revised = np.zeros((len(x), x.shape[1] + 1))
        for j, (activation, ranked) in enumerate(zip(x, top, strict=True)):
            ranked_alpha = np.zeros(x.shape[1])
            ranked_alpha[ranked] = alpha_weights
            w = np.ones(x.shape[1])
            for label in ranked:
                smallest, shape, scale = self.tails[label]
                d = distances[j, label] + 10000 - smallest
                w[label] = exponweib.cdf(d, a=1, c=shape, loc=0, scale=scale)
            scores = 1 - w * ranked_alpha
            revised[j, 1:] = activation * scores
            revised[j, 0] = np.sum(activation * (1 - scores))
        exponentials = np.exp(np.minimum(revised, 709))
        return exponentials / exponentials.sum(axis=1)[:, None]


class TextbookImages(Dataset):  # type: ignore[type-arg]
    """Images in memory, augmented one by one with torchvision, as in most tutorials."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def textbook_steps(
    network: DHRNet, images: np.ndarray, labels: np.ndarray, workers: int = 2
) -> Iterator[None]:
    """Train in float32 and the default memory layout with momentum SGD; yields after each step.

    Rate, batch size and weight decay are those of the released CROSR code.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    batches = DataLoader(
        TextbookImages(images, labels), TEXTBOOK_BATCH, shuffle=True, num_workers=workers
    )
    for epoch in count():
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (epoch // 25)
        for batch, target in batches:
            logits, reconstruction, _ = network(batch)
            loss = F.cross_entropy(logits, target)
            loss = loss + F.mse_loss(reconstruction, network.normalize(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


@torch.no_grad()
def one_by_one(network: DHRNet, images: Tensor) -> list[list[Tensor]]:
    """Logits and pooled latents as public ports of CROSR extract them: one image at a time, in
    float32, decoder included; over both views where the network takes two."""
    features = []
    for image in images.split(1):
        for view in [image, image.flip(-1)] if network.config["mirrored"] else [image]:
            logits, _, latents = network(view)
            features.append([logits, *(F.adaptive_max_pool2d(z, 1).flatten(1) for z in latents)])
    return features
