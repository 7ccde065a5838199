"""Break the method in many ways, one at a time, and see that a test notices each.

    python tests/mutations.py             # all; prints mutant | caught by, exits 1 if one survives
    python tests/mutations.py hazard OSCR # those whose name holds one of these words

Each mutant is a textual replacement in a temporary copy of the project, on which the fast test
files of what it breaks are run.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHOD = ("test_openmax.py",)
SCORES = ("test_metrics.py",)
NETWORK = ("test_models.py",)
IMAGES = ("test_open_set_data.py",)
RULES = ("test_methods.py",)
TRAINING = ("test_training.py",)
SPLITS_KEPT = (
    "test_scripts.py::test_no_test_or_unknown_image_reaches_fit_or_threshold",
    "test_scripts.py::test_train_then_evaluate",
)
RESUME = ("test_scripts.py::test_resumed_run_ends_in_the_same_weights",)

# name, file, text, replacement, test files that should notice
MUTANTS = [
    ("rank weight dropped", "openmax.py",
     "top, (alpha - np.arange(alpha)) / alpha, axis=1", "top, np.ones(alpha), axis=1", METHOD),
    ("rank weight one step off", "openmax.py",
     "top, (alpha - np.arange(alpha))", "top, (alpha - 1 - np.arange(alpha))", METHOD),
    ("ranks ascending", "openmax.py", "np.argsort(-y, axis=1", "np.argsort(y, axis=1", METHOD),
    ("unknown column first", "openmax.py",
     "np.column_stack([known, np.maximum(1 - known.sum(axis=1), 0)])",
     "np.column_stack([np.maximum(1 - known.sum(axis=1), 0), known])", METHOD),
    ("unknown logit first", "openmax.py",
     "np.vstack([(y * (1 - w)).T, (y * w).sum(axis=1)]).T",
     "np.vstack([(y * w).sum(axis=1), (y * (1 - w)).T]).T", METHOD),
    ("all images, not the correct ones", "openmax.py",
     "correct = activations[:, :num_classes].argmax(axis=1) == labels",
     "correct = np.ones(len(labels), bool)", METHOD),
    ("tail of one more", "openmax.py",
     "np.partition(values, len(values) - tail_size)[-tail_size:]",
     "np.sort(values)[-tail_size - 1:]", METHOD),
    ("smallest distances as tail", "openmax.py",
     "np.partition(values, len(values) - tail_size)[-tail_size:]",
     "np.sort(values)[:tail_size]", METHOD),
    ("location without the 1", "openmax.py",
     "float(np.min(tail)) - 1", "float(np.min(tail))", METHOD),
    ("hazard not clipped at 0", "openmax.py",
     "reach = (np.asarray(distances, np.float64) - self.location) / self.scale",
     "reach = np.abs(np.asarray(distances, np.float64) - self.location) / self.scale", METHOD),
    ("hazard unbounded", "openmax.py", "LARGEST_LOG_HAZARD = 690", "LARGEST_LOG_HAZARD = np.inf",
     ("test_openmax.py", "test_properties.py")),
    ("w is its complement", "openmax.py",
     "-np.expm1(-self.hazard(distances))", "np.exp(-self.hazard(distances))", METHOD),
    ("softmax over images", "openmax.py",
     "softmax(np.asfortranarray(y), axis=1)", "softmax(y, axis=0)", METHOD),
    ("softmax without max-subtraction", "openmax.py",
     "softmax(np.asfortranarray(y), axis=1)",
     "(np.exp(y) / np.exp(y).sum(axis=1, keepdims=True))",
     ("test_openmax.py", "test_properties.py")),
    ("mean of the wrong class", "openmax.py",
     "correct & (labels == label)", "correct & (labels == (label + 1) % num_classes)", METHOD),
    ("distance to the wrong class", "openmax.py",
     "class_distances(group, mean[None]", "class_distances(group, self.mean_activations_[:1]",
     METHOD),
    ("covariance without shrinkage", "openmax.py",
     "LedoitWolf(assume_centered=True).fit(deviations).precision_",
     "np.linalg.inv(deviations.T @ deviations / len(deviations))", METHOD),
    ("no whitening", "openmax.py",
     "activations, means = activations @ factor, means @ factor", "pass", METHOD),
    ("eucos scale", "openmax.py", "EUCOS_SCALE = 200", "EUCOS_SCALE = 100", METHOD),
    ("latents of the true order ignored", "openmax.py",
     "self.latent_means_[level][predicted]", "self.latent_means_[level][0]", METHOD),
    ("hazard subtracted", "openmax.py",
     "total + hazard - self.offset_", "total - hazard - self.offset_", METHOD),
    ("offset dropped", "openmax.py",
     "total + hazard - self.offset_", "total + hazard", METHOD),
    ("levels fitted on training images", "openmax.py",
     "list(self.latent_distances(held_out).T)", "list(self.latent_distances(X).T)", METHOD),
    ("scipy slope sign", "openmax.py",
     "sigma + z.mean() - (z * weights)", "sigma + z.mean() + (z * weights)", METHOD),
    ("libMR tail negated", "openmax.py",
     "model.fit_high(np.sort(tail)", "model.fit_low(np.sort(tail)", METHOD),
    ("argmax over the unknown column too", "metrics.py",
     "[:, :UNKNOWN].argmax(axis=1)", ".argmax(axis=1)", SCORES),
    ("known and unknown swapped", "metrics.py",
     "np.repeat([False, True], [len(known), len(unknown)])",
     "np.repeat([True, False], [len(known), len(unknown)])", SCORES),
    ("sign of the known scores", "metrics.py",
     "average_precision_score(~is_unknown, -ranks)", "average_precision_score(~is_unknown, ranks)",
     SCORES),
    ("OSCR rejects ties", "metrics.py",
     'np.searchsorted(np.sort(known[correct]), thresholds, side="right")',
     'np.searchsorted(np.sort(known[correct]), thresholds, side="left")', SCORES),
    ("OSCR over correct images only", "metrics.py",
     'thresholds, side="right") / len(known)', 'thresholds, side="right") / correct.sum()', SCORES),
    ("OSCR without its origin", "metrics.py",
     "return np.append(0, ccr), np.append(0, fpr)", "return ccr, fpr", SCORES),
    ("threshold one image lower", "metrics.py",
     'np.quantile(scores, share, method="inverted_cdf")',
     'np.quantile(scores, share, method="lower")', SCORES),
    ("score at the threshold rejected", "metrics.py",
     "np.where(scores > _checked(", "np.where(scores >= _checked(",
     SCORES),
    ("FPR excludes the threshold", "metrics.py",
     '"unknown_scores") <= threshold', '"unknown_scores") < threshold', SCORES),
    ("macro-F1 without the unknown class", "metrics.py",
     "[*range(num_classes), UNKNOWN]", "[*range(num_classes)]", SCORES),
    ("a half counts as yes", "metrics.py", "probabilities > 0.5", "probabilities >= 0.3", SCORES),
    ("ReLU on the reconstruction", "models.py",
     "            x = self.deconvs[level](F.relu(x) + self.expansions[level](latents[level]))\n"
     "        return x",
     "            x = self.deconvs[level](F.relu(x) + self.expansions[level](latents[level]))\n"
     "        return F.relu(x)", NETWORK),
    ("ReLU on the logits", "models.py",
     "DHROutput(self.head(x)", "DHROutput(F.relu(self.head(x))", NETWORK),
    ("dropout on at test", "models.py", "nn.Dropout(0.5)", "AlwaysDropout(0.5)", NETWORK),
    ("images normalised twice", "models.py",
     "self.stem(self.normalize(images))", "self.stem(self.normalize(self.normalize(images)))",
     NETWORK),
    ("latents before the ReLU", "models.py",
     "latents.append(F.relu(bottleneck(x)))", "latents.append(bottleneck(x))", NETWORK),
    ("pixels left in 0..255", "models.py",
     "images.float() / 255 if", "images.float() if", NETWORK),
    ("damaged weights loaded unnoticed", "models.py",
     "model.load_state_dict(checkpoint[\"model_state_dict\"])",
     "model.load_state_dict(checkpoint[\"model_state_dict\"], strict=False)", NETWORK),
    ("validation images in train", "open_set_data.py",
     "_select(train, ~in_val), ", "train, ", IMAGES),
    ("test images in train", "open_set_data.py",
     "_select(train, ~in_test), _select(train, in_test)", "train, _select(train, in_test)",
     IMAGES),
    ("frame of the crops left on", "open_set_data.py",
     "    if frame:\n", "    if False:\n", IMAGES),
    ("labels in sorted order", "open_set_data.py",
     "ImageSet(images.images, is_class.argmax(axis=1))",
     "ImageSet(images.images, np.searchsorted(np.sort(known), images.labels))", IMAGES),
    ("known classes among the unknown", "open_set_data.py",
     "test.images[~np.isin(test.labels, known)]", "test.images", IMAGES),
    ("resize without antialiasing", "open_set_data.py",
     "Image.Resampling.BILINEAR", "Image.Resampling.NEAREST", IMAGES),
    ("crops at the corner", "open_set_data.py",
     "rng.integers(0, height - size + 1, count)", "np.zeros(count, int)", IMAGES),
    ("threshold from test images", "compute_openmax.py",
     "measure(scores, thresholds,",
     'measure(scores, {n: threshold_accepting(s["test_known"].unknownness) '
     "for n, s in scores.items()},", SPLITS_KEPT),
    ("fit on test images", "compute_openmax.py",
     'fitted(wanted, sets["train"]',
     'fitted(wanted, sets.get("test_known", sets["train"])', SPLITS_KEPT),
    ("held-out images are test images", "compute_openmax.py",
     'sets["val"], rule)', 'sets.get("test_known", sets["val"]), rule)', SPLITS_KEPT),
    ("max logit is known", "compute_openmax.py",
     "unknownness = -logits.max(axis=1)", "unknownness = logits.max(axis=1)", RULES),
    ("msp is known", "compute_openmax.py",
     "unknownness = 1 - known.max(axis=1)", "unknownness = known.max(axis=1)", RULES),
    ("known and unknown sets swapped", "compute_openmax.py",
     'sets["test_known"], test.labels, its, thresholds[name]',
     'its, np.full(len(its.unknownness), UNKNOWN), sets["test_known"], thresholds[name]',
     SPLITS_KEPT),
    ("max and average pooling swapped", "openmax.py",
     'images.latents_max if latents == "max"', 'images.latents_avg if latents == "max"', RULES),
    ("resume forgets the optimiser", "train_dhr_nn.py",
     "restore(optimizers, saved[\"optimizer_states\"], model)", "pass", RESUME),
    ("resume shuffles anew", "train_dhr_nn.py",
     "generator = torch.Generator(images.device).manual_seed(seed * 100_003 + epoch)",
     "generator = torch.Generator(images.device); generator.seed()", RESUME),
    ("reconstruction loss dropped", "train_dhr_nn.py",
     "(cross_entropy + reconstruction_weight * mse).backward()", "cross_entropy.backward()",
     TRAINING),
    ("one-vs-rest averaged over classes", "train_dhr_nn.py",
     "entropies.sum(dim=1).mean()", "entropies.mean()", TRAINING),
    ("losses swapped", "train_dhr_nn.py",
     'one_vs_rest if loss == "one-vs-rest"', 'one_vs_rest if loss == "softmax"', TRAINING),
    ("cross-entropy dropped", "train_dhr_nn.py",
     "(cross_entropy + reconstruction_weight * mse).backward()",
     "(0 * cross_entropy + reconstruction_weight * mse).backward()", TRAINING),
    ("mirrored images where none should be", "train_dhr_nn.py",
     "torch.where(mirrored[:, None], columns.flip(1), columns)", "columns.flip(1)", TRAINING),
    ("digits mirrored", "train_dhr_nn.py",
     "mirrored = args.dataset not in NOT_MIRRORED", "mirrored = True", TRAINING),
    ("wrong labels for the batch", "train_dhr_nn.py",
     "labels[index][mine]", "labels[index.flip(0)][mine]", TRAINING),
    ("shift without reflection", "train_dhr_nn.py",
     "(pixels + shift).abs()", "(pixels + 0 * shift).abs()", TRAINING),
    ("cutout at one place", "train_dhr_nn.py",
     "pixels < corner + cutout)", "pixels < cutout)", TRAINING),
    ("residual without its input", "models.py",
     "return x + super().forward(x)", "return super().forward(x)", NETWORK),
    ("validation on test images", "train_dhr_nn.py",
     "val_accuracy = accuracy(model, data.val,", "val_accuracy = accuracy(model, data.test_known,",
     TRAINING),
]  # fmt: skip
PRELUDE = """

class AlwaysDropout(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p)
"""


def first_failure(copy: Path, tests: tuple[str, ...]) -> str:
    """Name of the first test that fails in this copy; empty if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in tests]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", result.stdout, re.MULTILINE)
    return found[1] if found else f"?? pytest ended with {result.returncode}"


def caught_by(copy: Path, file: str, text: str, replacement: str, tests: tuple[str, ...]) -> str:
    """Name of the first test that fails with the replacement made."""
    path = copy / file
    original = path.read_text()
    if text not in original:
        return "?? text not found: this mutant needs to follow the code"
    changed = original.replace(text, replacement)
    if "AlwaysDropout" in replacement:
        changed = changed.replace("\n\nclass DHROutput", PRELUDE + "\n\nclass DHROutput")
    path.write_text(changed)
    try:
        return first_failure(copy, tests)
    finally:
        path.write_text(original)


def main(words: list[str]) -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "cache", "cifar*", "tiny*", "*.pt")
        shutil.copytree(ROOT, copy, ignore=ignored)
        chosen = [m for m in MUTANTS if not words or any(word in m[0] for word in words)]
        for tests in {mutant[-1] for mutant in chosen}:
            if failure := first_failure(copy, tests):
                print(f"{failure} fails without any mutant: mend that first")
                return 1
        for name, *mutant in chosen:
            test = caught_by(copy, *mutant)
            survivors += test.startswith("??") or not test
            print(f"{name:36} | {mutant[0]:19} | {test or 'SURVIVES'}", flush=True)
    print(f"{survivors} survive" if survivors else "every mutant is caught")
    return bool(survivors)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
