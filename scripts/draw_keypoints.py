"""Draw the keypoints of a volume, as in docs/keypoints.md.

    python scripts/draw_keypoints.py phantom docs/images/keypoints.png   # a synthetic torso
    python scripts/draw_keypoints.py torso.nii.gz keypoints.png
    python scripts/draw_keypoints.py brain.nii.gz keypoints.png --sigma0 1.6 --window 0 800

Three planes with the keypoints next to them: circles are as wide as the balls that answer most at their scale, bright
ones yellow, dark ones blue.
"""

import argparse
import tempfile
from pathlib import Path

from medssl.data.prepare import prepare_store
from medssl.data.sources import Folder
from medssl.data.store import VolumeStore
from medssl.models.keypoints import DifferenceOfGaussians
from medssl.phantoms.source import Phantoms
from medssl.tables.derived import derive, table_of
from medssl.tables.keypoint_pictures import keypoint_figure, planes_of
from medssl.tables.keypoints import KeypointTables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path, help="a file, or phantom")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--sigma0", type=float, default=0.8)
    parser.add_argument("--window", type=float, nargs=2, default=(-160.0, 240.0), help="of CT, in HU")
    parser.add_argument("--dpi", type=int, default=80)
    args = parser.parse_args()
    detector = DifferenceOfGaussians(sigma0=args.sigma0, value_range=(0.0, 1.0))
    derivation = KeypointTables(detector=detector, window_hu=tuple(args.window))
    with tempfile.TemporaryDirectory() as folder:
        source: Folder | Phantoms = Phantoms(num_cases=1, size_voxel=128, spacing_mm=3.0)
        if str(args.volume) != "phantom":
            images = Path(folder) / "images"
            images.mkdir()
            (images / args.volume.name).symlink_to(args.volume.resolve())
            source = Folder(root=images)
        prepare_store(source, Path(folder) / "store", num_workers=0, progress=False)
        store = VolumeStore(Path(folder) / "store")
        derive(store.root, derivation, num_workers=0, progress=False)
        table = table_of(store, derivation, 0)
        count = int(derivation.quality(table)["points"])
        low, high, *_ = derivation.normalisation.limits(store.record(0), 0)
        planes = planes_of(store, 0, table["points_voxel"], table["features"])
        figure = keypoint_figure(planes, low=low, high=high, title=f"{args.volume.name}: {count} keypoints")
        figure.savefig(args.picture, dpi=args.dpi)
    print(f"{count} keypoints -> {args.picture}")


if __name__ == "__main__":
    main()
