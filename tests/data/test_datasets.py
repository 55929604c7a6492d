import contextlib
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from kd.data import DATASETS, cache_dir, load_splits
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
