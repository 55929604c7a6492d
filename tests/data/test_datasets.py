import contextlib
import gzip
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from kd.data import DATASETS, Layout, cache_dir, load_splits
from kd.errors import UserError


def test_digits_are_scikit_learns_and_are_written_once() -> None:
    from sklearn.datasets import load_digits

    splits = load_splits("digits")
    assert (len(splits.train), len(splits.val), splits.classes) == (1437, 360, tuple("0123456789"))
    path = cache_dir() / "digits" / "digits" / "train" / "1" / "0001.png"
    bunch = load_digits()
    pixels = splits.train.load(splits.train.keys.index("1/0001.png"))
    np.testing.assert_allclose(pixels[0].numpy() / 255 * 16, bunch.images[1], atol=0.05)
    assert bunch.target[1] == 1
    modified = path.stat().st_mtime_ns
    load_splits("digits")
    assert path.stat().st_mtime_ns == modified


def test_an_image_folder_needs_data_dir() -> None:
    with pytest.raises(UserError, match="--dataset imagefolder: set --data_dir"):
        load_splits()
    with pytest.raises(UserError, match=r"no data set 'mnits'; did you mean 'mnist'\?"):
        load_splits("mnits")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_the_error_for_a_missing_data_set_suggests_download(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"there is no folder {tmp_path}/there; download it with --download"):
        load_splits(name, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/empty: .* is not in this folder; download it with --download"):
        load_splits(name, tmp_path / "empty")


def test_a_file_as_data_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--dataset digits: .*File exists"):
        load_splits("digits", tmp_path / "file")


def test_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 4, 28, 28) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + bytes([3, 1, 4, 1]))
    splits = load_splits("mnist", tmp_path)
    assert list(splits.train.labels) == [3, 1, 4, 1]
    assert len(splits.classes) == 10
    assert splits.train.keys[2] != splits.val.keys[2]
    torch.testing.assert_close(splits.val.load(2), torch.from_numpy(pixels[2]).expand(3, 28, 28))


def test_cifar_channels_are_in_rgb_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        classes = ("cat", "dog")

        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            self.data = np.zeros((2, 32, 32, 3), dtype=np.uint8)
            self.data[..., 1] = 7 if train else 9
            self.targets = [0, 1]

    reader = DATASETS["cifar10"]
    splits = reader.func(tmp_path, download=False, kind=Small, name="cifar10")  # type: ignore[attr-defined]
    assert splits.train.load(1)[:, 0, 0].tolist() == [0, 7, 0]
    assert splits.val.load(0).shape == (3, 32, 32)


def save_image(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


def write_pets(root: Path) -> None:
    for split, names in (("trainval", ("cat_a_1", "dog_b_1")), ("test", ("cat_a_2", "dog_b_2"))):
        lines = [f"{name} {label} {label} 1" for label, name in enumerate(names, 1)]
        for name in names:
            save_image(root / "oxford-iiit-pet" / "images" / f"{name}.jpg", 100)
        path = root / "oxford-iiit-pet" / "annotations" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


def write_food(root: Path) -> None:
    for split, number in (("train", 1), ("test", 2)):
        for name in ("pie", "rice"):
            save_image(root / "food-101" / "images" / name / f"{number}.jpg", 100)
        path = root / "food-101" / "meta" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: [f"{name}/{number}"] for name in ("pie", "rice")}))


def write_signs(root: Path) -> None:
    base = root / "gtsrb" / "GTSRB"
    for label in range(2):
        save_image(base / "Training" / f"{label:05d}" / "0.ppm", 100)
        save_image(base / "Final_Test" / "Images" / f"{label}.ppm", 100)
    rows = "".join(f"{label}.ppm;8;8;0;0;8;8;{label}\n" for label in range(2))
    (root / "gtsrb" / "GT-final_test.csv").write_text(f"Filename;Width;Height;A;B;C;D;ClassId\n{rows}")


def write_textures(root: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{name}/{name}_{number}.jpg" for name in ("dotted", "lined")]
        for name in names:
            save_image(root / "dtd" / "dtd" / "images" / name, 100)
        path = root / "dtd" / "dtd" / "labels" / f"{split}1.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names))


def write_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    for number, split in enumerate(("train", "val", "test")):
        for name in ("A380", "Cessna"):
            save_image(folder / "images" / f"{name}{number}.jpg", 100)
        (folder / f"images_variant_{split}.txt").write_text(
            "\n".join(f"{name}{number} {name}" for name in ("A380", "Cessna"))
        )
    (folder / "variants.txt").write_text("A380\nCessna\n")


def write_numbers(root: Path) -> None:
    for split in ("train", "test"):
        pixels = np.full((32, 32, 3, 2), 100, dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[1], [10]])})


def write_stl(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("bird\ncar\n")
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(bytes([100]) * (2 * 3 * 96 * 96))
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 2]))


def write_flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 7):
        save_image(folder / "jpg" / f"image_{number:05d}.jpg", 100)
    savemat(folder / "imagelabels.mat", {"labels": np.array([1, 2, 1, 2, 1, 2])})
    savemat(folder / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})


WRITERS = {
    "oxford_pets": (write_pets, False),
    "food101": (write_food, False),
    "gtsrb": (write_signs, False),
    "svhn": (write_numbers, False),
    "stl10": (write_stl, False),
    "dtd": (write_textures, True),
    "fgvc_aircraft": (write_aircraft, True),
    "flowers102": (write_flowers, True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_data_sets_of_torchvision_are_read_with_their_official_splits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checksums are those of the complete files.
    for module in ("stl10", "flowers102", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    write, has_validation = WRITERS[name]
    write(tmp_path)
    splits = load_splits(name, tmp_path)
    assert splits.name == name
    assert (splits.test is not None) == has_validation
    parts = [splits.train, splits.val, *([splits.test] if splits.test else [])]
    for images in parts:
        expected = [1, 0] if name == "svhn" else [0, 1]
        assert list(images.labels) == expected
        assert abs(int(images.load(0)[0, 0, 0]) - 100) <= 2
        assert images.classes == splits.classes
    assert len({key for images in parts for key in images.keys}) == 2 * len(parts)
    if has_validation:
        with pytest.raises(UserError, match=f"--val_fraction 0.2: {name} has validation images of its own"):
            load_splits(name, tmp_path, Layout(val_fraction=0.2))
    else:
        # Divided training images leave the official test images for the end.
        divided = load_splits(name, tmp_path, Layout(val_fraction=0.5))
        assert divided.test is not None
        assert (len(divided.val), divided.test.keys) == (0, splits.val.keys)


def test_eurosat_has_no_splits_of_its_own(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        save_image(tmp_path / "eurosat" / "2750" / name / "0.jpg", 100)
    with pytest.raises(UserError, match=r"--dataset eurosat: has no validation images; add --val_fraction 0.2"):
        load_splits("eurosat", tmp_path)
    splits = load_splits("eurosat", tmp_path, Layout(val_fraction=0.2))
    assert (splits.classes, splits.train.labels, len(splits.val)) == (("Forest", "River"), [0, 1], 0)


def hugging_face_data(split: str) -> Any:
    """Return a data set of two images with an EXIF orientation."""
    package = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = []
    for number in range(2):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 12), (100 + number, 0, len(split))).save(buffer, format="JPEG", exif=exif, quality=100)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = package.Features(image=package.Image(), label=package.ClassLabel(names=["cat", "dog"]))
    return package.Dataset.from_dict({"image": encoded, "label": [1, 0]}, features=features)


@pytest.mark.parametrize("form", ["save_to_disk", "parquet", "parquet in folders"])
def test_data_sets_of_hugging_face_are_read_from_a_folder(form: str, tmp_path: Path) -> None:
    package = pytest.importorskip("datasets")
    parts = {split: hugging_face_data(split) for split in ("train", "validation", "test")}
    if form == "save_to_disk":
        package.DatasetDict(parts).save_to_disk(tmp_path)
    for split, data in parts.items() if form != "save_to_disk" else ():
        path = tmp_path / (f"{split}-00000-of-00001.parquet" if form == "parquet" else f"{split}/0.parquet")
        path.parent.mkdir(exist_ok=True)
        data.to_parquet(path)
    splits = load_splits(f"hf:{tmp_path}")
    assert splits.test is not None
    assert (splits.name, splits.classes) == (tmp_path.name, ("cat", "dog"))
    for images, split in ((splits.train, "train"), (splits.val, "validation"), (splits.test, "test")):
        assert images.labels == [1, 0]
        assert tuple(images.load(0).shape) == (3, 8, 12)
        assert abs(int(images.load(1)[2, 4, 4]) - len(split)) <= 3
        assert images.fingerprint is not None
    copied = pickle.loads(pickle.dumps(splits.train.load))  # noqa: S301 (for a worker process)
    assert torch.equal(copied(0), splits.train.load(0))


def test_data_sets_of_hugging_face_that_can_not_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=rf"--dataset hf:{tmp_path}: this folder holds neither a data set of save_to_disk"
    ):
        load_splits(f"hf:{tmp_path}")
    with pytest.raises(
        UserError, match=r"--dataset hf:nobody/nothing: can't be loaded: .*; download it with --download"
    ):
        load_splits("hf:nobody/nothing")
    hugging_face_data("train").rename_column("label", "what").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"hf:.*: has no validation images; add --val_fraction 0.2"):
        load_splits(f"hf:{tmp_path}")
    with pytest.raises(UserError, match=r"no column of classes; its columns: image, what; name it with --label_column"):
        load_splits(f"hf:{tmp_path}", layout=Layout(val_fraction=0.5, label_column=("who",)))
    assert load_splits(f"hf:{tmp_path}", layout=Layout(val_fraction=0.5)).train.labels == [1, 0]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP on localhost."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


WNIDS = {"n01440764": "tench", "n02102040": "English springer"}


def test_imagenette_is_downloaded_and_its_class_names_are_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "imagenette2-160.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for split in ("train", "val"):
            for wnid in WNIDS:
                picture = io.BytesIO()
                Image.new("RGB", (8, 8)).save(picture, format="JPEG")
                member = tarfile.TarInfo(f"imagenette2-160/{split}/{wnid}/1.JPEG")
                member.size = picture.tell()
                tar.addfile(member, io.BytesIO(picture.getvalue()))
    checksum = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    with serve(tmp_path) as address:
        monkeypatch.setitem(datasets.Imagenette._ARCHIVES, "160px", (f"{address}/{archive.name}", checksum))
        splits = load_splits("imagenette_160px", download=True)
    assert splits.classes == tuple(WNIDS.values())
    assert splits.name == "imagenette_160px"
    assert splits.train.keys == ["n01440764/1.JPEG", "n02102040/1.JPEG"]
    assert len(load_splits("imagenette_160px").val) == 2


def test_a_failed_download_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not the images"))
    with serve(tmp_path / "wrong") as address:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}/"])
        with pytest.raises(UserError, match="MNIST could not be downloaded into"):
            load_splits("mnist", tmp_path / "there", download=True)


def test_the_cache_folder_needs_no_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("KD_CACHE")
    with pytest.raises(UserError, match="there is no home directory for the caches; set KD_CACHE"):
        cache_dir()
