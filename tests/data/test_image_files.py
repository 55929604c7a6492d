"""Messages of `kd check` about unusual folders, files, teachers and flags."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd.cli import main
from kd.models import build_classifier
from kd.models.checkpoint import CLASSIFIER_KEY, STATE_PREFIX
from tests.conftest import CLASSES, MakeFolder

DEFAULTS = {
    "--image_size": "16",
    "--batch_size": "8",
    "--augment": "none",
    "--accelerator": "cpu",
    "--image_cache": "none",
    "--teacher_model": "linear",
    "--student_model": "linear",
    "--max_epochs": "20",
}

# Modifies a valid image folder; may return additional flags.
Change = Callable[[Path], object]


def noise(*shape: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


RGB = noise(10, 10, 3)
TWO_FRAMES = {"save_all": True, "append_images": [noise(10, 10, 3, seed=1)]}


def one_bit_png(width: int, height: int, content: bytes) -> bytes:
    """Return a white PNG file of any size in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


def damaged_jpeg() -> bytes:
    data = bytearray(encoded(noise(64, 64, 3), "JPEG"))
    middle = len(data) // 2
    # A marker that doesn't occur in the pixels of a JPEG file.
    data[middle : middle + 40] = b"\xff\xc4\x00\x08" * 10
    return bytes(data)


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(10, 20, 3), "JPEG", exif=exif)


def truncated(kind: str) -> bytes:
    data = encoded(noise(64, 64, 3), kind)
    return data[: len(data) // 2]


def ant_folder(root: Path) -> Path:
    return root / "train" / "ant"


def add_file(name: str, content: bytes) -> Change:
    """Add a file to the training images of the first class."""
    return lambda root: (ant_folder(root) / name).write_bytes(content)


def add_link(name: str, target: str) -> Change:
    """Add a symbolic link to the training folder, to a path relative to the root."""

    def change(root: Path) -> None:
        (root / "train" / name).symlink_to(root / target)

    return change


def rename_class(old: str, new: str, *, splits: tuple[str, ...] = ("train", "val")) -> Change:
    """Rename a class folder in the given splits."""
    return lambda root: [(root / split / old).rename(root / split / new) for split in splits]


def remove(*folders: str) -> Change:
    def change(root: Path) -> None:
        for folder in folders:
            shutil.rmtree(root / folder)

    return change


def empty(folder: str) -> Change:
    def change(root: Path) -> None:
        shutil.rmtree(root / folder)
        (root / folder).mkdir()

    return change


def make_unreadable(path: str) -> Change:
    def change(root: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("root can read every file")
        (root / path).chmod(0)

    return change


def nested(root: Path) -> None:
    (ant_folder(root) / "2019" / "summer").mkdir(parents=True)
    (ant_folder(root) / "0.png").rename(ant_folder(root) / "2019" / "summer" / "0.png")


def one_folder_too_deep(root: Path) -> None:
    (root / "photos").mkdir()
    for split in ("train", "val"):
        (root / split).rename(root / "photos" / split)


def no_class_folders(root: Path) -> None:
    for image in ant_folder(root).iterdir():
        image.rename(root / "train" / image.name)
    remove(*(f"train/{name}" for name in CLASSES))(root)


def system_files(root: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "._0.png"):
        (ant_folder(root) / name).write_bytes(b"system file")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "README.txt").write_text("about the folder")
    for split in ("train", "val"):
        (root / split / "__MACOSX").mkdir()
        (root / split / "__MACOSX" / "._0.png").write_bytes(b"system file")


def few_images(root: Path) -> None:
    for number in range(3, 12):
        (root / "train" / "bee" / f"{number}.png").unlink()


def in_both_splits(root: Path) -> None:
    shutil.copy(root / "train" / "bee" / "3.png", root / "val" / "bee" / "again.png")


def in_two_classes(root: Path) -> None:
    shutil.copy(root / "train" / "bee" / "3.png", root / "train" / "cat" / "again.png")


def leaked_into_unlabeled(root: Path) -> str:
    (root / "more").mkdir()
    shutil.copy(root / "val" / "bee" / "3.png", root / "more")
    return f"--unlabeled_data {root / 'more'}"


def leaked_into_test(root: Path) -> str:
    shutil.copytree(root / "val", root / "test")
    return "--test_data test"


def alike_names(root: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(root / split / "cat", root / split / "Cat")
        for path in (root / split / "Cat").iterdir():
            noise(10, 10, 3, seed=int(path.stem) + 1_000 * (split == "val")).save(path)


def uneven(root: Path) -> None:
    for name in ("ant", "bee"):
        for number in range(10, 12):
            (root / "train" / name / f"{number}.png").unlink()
    for number in range(100, 120):
        noise(10, 10, 3, seed=number).save(root / "train" / "cat" / f"{number}.png")


def no_validation_images(root: Path) -> str:
    shutil.rmtree(root / "val" / "bee")
    return "--allow_missing_classes"


def no_training_images(root: Path) -> str:
    shutil.rmtree(root / "train" / "bee")
    return "--allow_missing_classes"


def many_bad_files(root: Path) -> str:
    """Add files of many kinds that are no images, and skip them."""
    for name, content in {
        "page.jpg": b"<!DOCTYPE html><html>",
        "empty.png": b"",
        "half.jpg": truncated("JPEG"),
        "notes.txt": b"hello",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1",
    }.items():
        (ant_folder(root) / name).write_bytes(content)
    (ant_folder(root) / "link.png").symlink_to(root / "nowhere.png")
    return "--on_bad_image skip"


def in_both_splits_and_strict(root: Path) -> str:
    in_both_splits(root)
    return "--strict"


def not_utf8(root: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(ant_folder(root)) + b"/\xff\xfe.png")).write_bytes(encoded(RGB, "PNG"))
    except OSError:
        pytest.skip("this file system refuses such names")


def flags(text: str) -> Change:
    return lambda _: text


def file_as_data_dir(root: Path) -> str:
    (root / "file").touch()
    return f"--data_dir {root / 'file'}"


def teacher(
    classes: tuple[str, ...] = CLASSES,
    *,
    architecture: str = "linear",
    size: int = 16,
    more_flags: str = "--allow_weak_teacher",
    damage: Callable[[bytes], bytes] = bytes,
) -> Change:
    """Add an untrained teacher's checkpoint."""

    def change(root: Path) -> str:
        torch.manual_seed(0)
        network = build_classifier(architecture, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
        state = {STATE_PREFIX + name: value for name, value in network.state_dict().items()}
        path = root / "teacher.ckpt"
        torch.save({CLASSIFIER_KEY: network.description.plain(), "state_dict": state}, path)
        path.write_bytes(damage(path.read_bytes()))
        return f"--distill --teacher_checkpoint {path} {more_flags}"

    return change


def foreign_checkpoint(root: Path) -> str:
    torch.save({"weight": torch.zeros(3)}, root / "teacher.ckpt")
    return f"--distill --teacher_checkpoint {root / 'teacher.ckpt'}"


ERRORS: dict[str, tuple[Change, str]] = {
    # Folders
    "no data_dir": (remove(""), "--data_dir {root}: there is no such folder"),
    "data_dir is a file": (file_as_data_dir, "--data_dir {root}/file: this is a file, not a folder"),
    "no train folder": (remove("train"), "{root}/train: there is no such folder (set by --train_data; folders in"),
    "no val folder": (remove("val"), "{root}/val: there is no such folder (set by --val_data; folders in"),
    "empty data_dir": (remove("train", "val"), "{root}/train: there is no such folder"),
    "one folder too deep": (one_folder_too_deep, "folders in {root}: photos); did you mean --data_dir {root}/photos?"),
    "empty train folder": (empty("train"), "{root}/train: this folder has no class folders; images belong in"),
    "no class folders": (no_class_folders, "has no class folders; images belong in {root}/train/CLASS"),
    "one class": (remove("train/bee", "train/cat"), "{root}/train: there is only one class, 'ant'"),
    "class without images": (empty("train/bee"), "{root}/train/bee: this class has no images"),
    "class only in val": (remove("train/cat"), "have different classes; only in {root}/val: cat"),
    "class only in train": (remove("val/cat"), "have different classes; only in {root}/train: cat"),
    "case of a class name": (rename_class("cat", "Cat", splits=("val",)), "the names differ only in case"),
    "duplicates under --strict": (in_both_splits_and_strict, "1 of 31 validation images"),
    "broken link to a class": (add_link("dog", "nowhere"), "{root}/train/dog: this link is broken; fix or remove it"),
    "unreadable folder": (make_unreadable("train/ant"), "train/ant: this folder can't be read: Permission denied"),
    # Names
    "line break in a class": (rename_class("ant", "two\nlines"), "{root}/train/two\\nlines: this name has unprintable"),
    "escape code in a class": (
        rename_class("ant", "\x1b[31mred"),
        "{root}/train/\\x1b[31mred: this name has unprintable",
    ),
    "line break in a file": (add_file("a\nb.png", encoded(RGB, "PNG")), "{root}/train/ant/a\\nb.png: this name"),
    "not UTF-8": (not_utf8, "ant/\\udcff\\udcfe.png: this name has unprintable characters"),
    # Files
    "text": (add_file("notes.txt", b"hello"), "ant/notes.txt: this image can't be decoded: it is no image, or"),
    "text named .jpg": (add_file("x.jpg", b"hello"), "ant/x.jpg: this image can't be decoded: it is no image, or"),
    "Git LFS pointer": (
        add_file("x.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "ant/x.jpg: this image can't be decoded: it is a Git LFS pointer; run `git lfs pull` to fetch the image",
    ),
    "HTML named .png": (
        add_file("x.png", b"<!DOCTYPE html>"),
        "ant/x.png: this image can't be decoded: it is a web page, not an image",
    ),
    "empty file": (add_file("x.png", b""), "ant/x.png: this image can't be decoded: it is empty"),
    "PNG signature only": (add_file("x.png", b"\x89PNG\r\n\x1a\n"), "ant/x.png: this image can't be decoded: "),
    "truncated PNG": (
        add_file("x.png", truncated("PNG")),
        "ant/x.png: this image can't be decoded: image file is truncated",
    ),
    "truncated JPEG": (
        add_file("x.jpg", truncated("JPEG")),
        "ant/x.jpg: this image can't be decoded: image file is truncated",
    ),
    "truncated WebP": (add_file("x.webp", truncated("WEBP")), "ant/x.webp: this image can't be decoded: "),
    "damaged JPEG": (add_file("x.jpg", damaged_jpeg()), "ant/x.jpg: this image can't be decoded: "),
    "wrong checksum": (
        add_file("x.png", encoded(noise(30, 30, 3), "PNG").replace(b"IDAT", b"IDAU", 1)),
        "ant/x.png: this image can't be decoded: ",
    ),
    "decompression bomb": (
        add_file("x.png", one_bit_png(60_000, 60_000, b"\0" + b"\xff" * 7_500)),
        "ant/x.png: this image can't be decoded: the 3,600,000,000 pixels that",
    ),
    "unreadable file": (
        make_unreadable("train/ant/0.png"),
        "ant/0.png: this image can't be decoded: it can't be read: Permission",
    ),
    "broken link": (
        add_link("ant/x.png", "nowhere.png"),
        "ant/x.png: this image can't be decoded: it can't be read: No such file or directory",
    ),
    "circular link to a folder": (
        add_link("ant/loop", "train"),
        "{root}/train/ant/loop: this link leads back to {root}/train, the folder that it lies in",
    ),
    "circular link": (
        add_link("ant/x.png", "train/ant/x.png"),
        "ant/x.png: this image can't be decoded: it can't be read: Too many levels of",
    ),
    # Teachers
    "teacher of other classes": (teacher(("ant", "bee", "dog")), "only the teacher has dog; only photos has cat"),
    "teacher of fewer classes": (teacher(CLASSES[:2]), "only photos has cat"),
    "teacher of another size": (teacher(size=20), "trained on images of 20 px, but --image_size is 16"),
    "teacher of another architecture": (teacher(architecture="mlp"), "--teacher_model linear: "),
    "missing teacher": (flags("--distill --teacher_checkpoint absent.ckpt"), "absent.ckpt: there is no such"),
    "truncated checkpoint": (
        teacher(damage=lambda data: data[: len(data) // 2]),
        "can't be read as a checkpoint: it is truncated or damaged",
    ),
    "empty checkpoint": (teacher(damage=lambda _: b""), "can't be read as a checkpoint: it is empty"),
    "text as a checkpoint": (teacher(damage=lambda _: b"version https://git-lfs"), "it was not written by torch.save"),
    "foreign checkpoint": (
        foreign_checkpoint,
        "teacher.ckpt: its weights don't fit linear: 2 missing (1.weight, 1.bias); 1 unexpected",
    ),
    # Flags
    "wrong number of classes": (flags("--num_classes 4"), "--num_classes 4: photos has 3"),
    "invalid name": (flags("--name ../x"), "--name ../x: not a valid folder name"),
}

WARNINGS: dict[str, tuple[Change, str]] = {
    "few images": (few_images, "classes with fewer than 10 training images: bee (3)"),
    "file in both splits": (in_both_splits, "1 of 31 validation images are also training images"),
    "image in two classes": (
        in_two_classes,
        "images in two classes: 1 ({root}/train/cat/again.png is {root}/train/bee/3.png)",
    ),
    "validation image without a label": (leaked_into_unlabeled, "1 of 30 validation images are also unlabeled images"),
    "test image in the validation set": (leaked_into_test, "30 of 30 test images are also validation images"),
    "names that look alike": (
        alike_names,
        "classes whose names differ in case, spaces or Unicode form alone: 'Cat' and 'cat'",
    ),
    "class without validation images": (
        no_validation_images,
        "classes without validation images: bee; metrics are over the others",
    ),
    "class without training images": (
        no_training_images,
        "classes without training images: bee; the network can't learn them",
    ),
    "files that are no images": (many_bad_files, "6 images can't be decoded: {root}/train/ant/empty.png (it is empty)"),
    "large": (
        add_file("x.png", one_bit_png(8_000, 8_000, (b"\0" + b"\xff" * 1_000) * 8_000)),
        "({root}/train/ant/x.png: 8000 x 8000 pixels)",
    ),
    "CMYK": (add_file("x.jpg", encoded(RGB.convert("CMYK"), "JPEG")), "(CMYK)"),
    "GIF named .png": (
        add_file("x.png", encoded(RGB, "GIF", **TWO_FRAMES)),
        "images that are animated: 1 ({root}/train/ant/x.png: only the first of its 2 frames is used)",
    ),
    "animated PNG": (
        add_file("x.png", encoded(RGB, "PNG", **TWO_FRAMES)),
        "images that are animated: 1 ({root}/train/ant/x.png: only the first of its 2 frames is used)",
    ),
    "animated WebP": (add_file("x.webp", encoded(RGB, "WEBP", **TWO_FRAMES)), "only the first of its 2 frames is used"),
    "TIFF of two pages": (
        add_file("x.tiff", encoded(RGB, "TIFF", **TWO_FRAMES)),
        "only the first of its 2 frames is used",
    ),
    "elongated": (add_file("x.png", encoded(noise(1, 2_000, 3), "PNG")), "; --resize crop shows only its center)"),
    "untrained teacher": (teacher(), "the teacher's accuracy of "),
    "unused temperature": (
        teacher(more_flags="--allow_weak_teacher --temperature 4 --loss ce=1 mse=1"),
        "--temperature 4: no term of the objective has a temperature (ce mse)",
    ),
    "long warm-up": (flags("--warmup_epochs 30"), "--warmup_epochs 30: "),
    "few steps": (flags("--max_epochs 2"), "the training has only 10 steps"),
}

NOTES: dict[str, tuple[Change, str]] = {
    "uneven classes": (
        uneven,
        "training images by class are uneven: from 10 (ant) to 32 (cat); --class_weights balanced or --sampler",
    ),
    "16 bits": (
        add_file("x.png", encoded(Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16)), "PNG")),
        "({root}/train/ant/x.png: stretched from its smallest to its largest value unless",
    ),
    "RGBA": (add_file("x.png", encoded(noise(8, 8, 4), "PNG")), "images that are partly transparent: 1 ("),
    "palette": (
        add_file("x.png", encoded(RGB.quantize(4), "PNG", transparency=0)),
        "images that are partly transparent: 1 (",
    ),
    "EXIF orientation": (add_file("x.jpg", rotated_jpeg()), "x.jpg: rotated upright by its EXIF orientation)"),
    "one pixel": (add_file("x.png", encoded(noise(1, 1, 3), "PNG")), "images that are tiny: 1 ("),
    "student larger than its teacher": (
        teacher(more_flags="--allow_weak_teacher --student_model mlp"),
        "more parameters than the teacher linear",
    ),
    "large batch": (flags("--batch_size 64"), "an epoch is a single step, as there are 36 training images"),
}

ACCEPTED: dict[str, Change] = {
    "nested folders": nested,
    "files of operating systems": system_files,
    "spaces": rename_class("ant", "red ant, small"),
    "Unicode": rename_class("ant", "蟻 🐜"),
    "rich markup": rename_class("ant", "[bold]ant"),
    "a flag's name": rename_class("ant", "--help"),
    "HTML": rename_class("ant", "<script>alert(1)<!--"),
    "PNG named .jpg": add_file("x.jpg", encoded(RGB, "PNG")),
    "folder named .png": lambda root: (ant_folder(root) / "folder.png").mkdir(),
}


@pytest.fixture
def check(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> Callable[[Change], tuple[int, str, str, Path]]:
    """Return a function that runs `kd check` on a modified folder and returns status, output, errors and folder."""

    def run(change: Change) -> tuple[int, str, str, Path]:
        root = make_folder(train=12, val=10)
        returned = change(root)
        more_flags = returned.split() if isinstance(returned, str) else []
        settings = {"--data_dir": str(root)} | DEFAULTS
        status = main(
            ["check", *(word for flag in settings.items() if flag[0] not in more_flags for word in flag), *more_flags]
        )
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err, root

    return run


Check = Callable[[Change], tuple[int, str, str, Path]]


@pytest.mark.parametrize("name", ERRORS)
def test_an_invalid_input_is_one_error_that_names_it(check: Check, name: str) -> None:
    change, message = ERRORS[name]
    status, _, err, root = check(change)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("error:") == 1
    assert message.replace("{root}", str(root)) in err


@pytest.mark.parametrize(
    ("level", "change", "message"),
    [
        pytest.param(level, *case, id=name)
        for level, cases in (("Warning", WARNINGS), ("Note", NOTES))
        for name, case in cases.items()
    ],
)
def test_an_unusual_input_is_reported(check: Check, level: str, change: Change, message: str) -> None:
    status, out, err, root = check(change)
    assert (status, err) == (0, "")
    expected = message.replace("{root}", str(root))
    assert any(line.startswith(f"{level}: ") and expected in line for line in out.splitlines()), out


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_valid_folder_is_accepted_without_a_warning(check: Check, name: str) -> None:
    status, out, err, _ = check(ACCEPTED[name])
    assert (status, err) == (0, "")
    assert "Warning" not in out
    assert "No problems found" in out
