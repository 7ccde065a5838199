"""The names that flags choose from, apart from the code that they name: with these alone, bad
arguments and --help are answered without the seconds that importing PyTorch takes."""

ARCHITECTURES = ("fast", "vgg")
DISTANCES = ("euclidean", "cosine", "eucos", "mahalanobis")
KNOWN_SETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "tiny-imagenet", "digits")
KNOWN_SPLITS = ("train", "val", "test_known")
UNKNOWN_SETS = (
    "tiny-imagenet-crop", "tiny-imagenet-resize", "lsun-crop", "lsun-resize", "isun", "svhn",
    "cifar100", "mnist", "textures", "gaussian-noise", "uniform-noise",
)  # fmt: skip
