"""Write the activations that ship with dhr_net.pt, for machines without images or network.

python benchmarks/ship.py            # after training a new dhr_net.pt
python benchmarks/ship.py --refit    # after a change of the open-set rule: fit it again first
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from activations import SHIPPED_PATH, extract, file_sha256, load_network, write_shipped
from command_line import make_parser
from methods import DHROpenMax
from models import NETWORK_KEYS, save_checkpoint
from open_set_data import load_image_sets

UNKNOWN_SETS = ("tiny-imagenet-crop", "tiny-imagenet-resize", "cifar100")


def ship(path: Path, out: Path, refit: bool, unknown_sets: Sequence[str] = UNKNOWN_SETS) -> None:
    network, saved = load_network(path)
    dataset = saved["train_args"]["dataset"]
    image_sets = load_image_sets(saved, dataset, unknown_sets, ROOT / "data")
    sets = {name: extract(network, images, 250, name) for name, images in image_sets.items()}
    if refit:
        saved["open_set_rule"] = DHROpenMax().fit(sets["train"], sets["val"]).state_dict()
        entries = {key: entry for key, entry in saved.items() if key not in NETWORK_KEYS}
        save_checkpoint(path, network.cpu(), **entries)
    write_shipped(file_sha256(path), sets, out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--refit", action="store_true", help="fit the rule and write dhr_net.pt")
    ship(ROOT / "dhr_net.pt", SHIPPED_PATH, parser.parse_args().refit)
