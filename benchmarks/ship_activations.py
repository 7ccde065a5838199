"""Fit the open-set rule into dhr_net.pt anew, and write the activation vectors that ship with it,
for machines without images or network.

    python benchmarks/ship_activations.py      # after training, or after a change of the rule

Logits are kept as float16, latents as uint8 between their smallest and largest value over all
images, which moves no figure of the table by more than 0.002 (tested).
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compute_openmax as script
from models import (
    MODEL_KEYS,
    extract,
    fit_rule,
    load_checkpoint,
    pack_rule,
    prepare_device,
    save_checkpoint,
)

UNKNOWN_SETS = ("tiny-imagenet-crop", "tiny-imagenet-resize", "cifar100")


def main() -> None:
    path = ROOT / "dhr_net.pt"
    model, meta = load_checkpoint(path)
    device, autocast = prepare_device("auto")
    model.to(device).to(memory_format=torch.channels_last)
    names = ("train", "val", "test_known", *UNKNOWN_SETS)
    image_sets = script.load_image_sets(meta, names, ROOT / "data", seed=0)
    sets = {
        name: extract(model, images, name, 500, device, autocast)
        for name, images in image_sets.items()
    }

    rule = fit_rule(sets["train"], sets["val"])
    entries = {key: entry for key, entry in meta.items() if key not in MODEL_KEYS}
    entries["open_set_rule"] = pack_rule(rule, sets["val"])
    save_checkpoint(path, model, **entries)

    arrays = {"checkpoint": np.array(hashlib.sha256(path.read_bytes()).hexdigest())}
    for field in ("latents_max", "latents_avg"):
        values = np.concatenate([getattr(activations, field) for activations in sets.values()])
        arrays[f"range/{field}"] = np.stack([values.min(axis=0), values.max(axis=0)])
    for name, activations in sets.items():
        arrays[f"{name}/labels"] = activations.labels.astype(np.int16)
        arrays[f"{name}/logits"] = activations.logits.astype(np.float16)
        for field in ("latents_max", "latents_avg"):
            low, high = arrays[f"range/{field}"]
            levels = (getattr(activations, field) - low) / np.maximum(high - low, 1e-12) * 255
            arrays[f"{name}/{field}"] = np.rint(levels).astype(np.uint8)
    script.replace_file(
        script.SHIPPED_ACTIVATIONS,
        lambda file: np.savez_compressed(file, allow_pickle=False, **arrays),
    )
    size = script.SHIPPED_ACTIVATIONS.stat().st_size / 1e6
    print(f"wrote {script.SHIPPED_ACTIVATIONS} ({size:.1f} MB)")


if __name__ == "__main__":
    main()
