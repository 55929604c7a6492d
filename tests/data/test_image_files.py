"""A zoo of dirty folders and files: what `kd check` says to a person who brings each of them."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from kd.cli import main
from kd.models import Classifier, build_classifier
from kd.models.checkpoint import CLASSIFIER_KEY, STATE_PREFIX
from tests.conftest import CLASSES, MakeFolder

TINY = {
    "--image_size": "16",
    "--batch_size": "8",
    "--augment": "none",
    "--accelerator": "cpu",
    "--image_cache": "none",
    "--teacher_model": "linear",
    "--student_model": "linear",
    "--max_epochs": "20",
}


def noise(*shape: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def one_bit_png(width: int, height: int, *, content: bytes | None = None) -> bytes:
    """Return a white PNG of any size, of a few kilobytes."""
    if content is None:
        content = zlib.compress(b"\0" + b"\xff" * ((width + 7) // 8))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def ant(root: Path) -> Path:
    return root / "train" / "ant"


# What is done to a sound folder; where it returns flags, these are given besides.
Spoil = Callable[[Path], str | None]


def put(name: str, content: bytes) -> Spoil:
    """Put a file among the training images of the first class."""

    def spoil(root: Path) -> None:
        (ant(root) / name).write_bytes(content)

    return spoil


def renamed(old: str, new: str, *, splits: tuple[str, ...] = ("train", "val")) -> Spoil:
    """Give a class folder another name."""

    def spoil(root: Path) -> None:
        for split in splits:
            (root / split / old).rename(root / split / new)

    return spoil


def flags(text: str) -> Spoil:
    """Change nothing about the folder."""
    return lambda _: text


def without(*places: str) -> Spoil:
    """Take folders away."""

    def spoil(root: Path) -> None:
        for place in places:
            shutil.rmtree(root / place)

    return spoil


def emptied(place: str) -> Spoil:
    """Take all from a folder, and leave it there."""

    def spoil(root: Path) -> None:
        shutil.rmtree(root / place)
        (root / place).mkdir()

    return spoil


def truncated(kind: str) -> Spoil:
    whole = encoded(noise(64, 64, 3), kind)
    return put("half." + ("jpg" if kind == "JPEG" else kind.lower()), whole[: len(whole) // 2])


def of_garbage(root: Path) -> None:
    whole = bytearray(encoded(noise(64, 64, 3), "JPEG"))
    middle = len(whole) // 2
    # A marker that no JPEG has in its pixels, and more after it.
    whole[middle : middle + 40] = b"\xff\xc4\x00\x08" * 10
    (ant(root) / "garbage.jpg").write_bytes(bytes(whole))


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(10, 20, 3).save(ant(root) / "turned.jpg", exif=exif)


def unreadable(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("whoever runs this may read everything")
    (ant(root) / "0.png").chmod(0)


def unreadable_folder(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("whoever runs this may read everything")
    ant(root).chmod(0)


def dangling(root: Path) -> None:
    (ant(root) / "gone.png").symlink_to(root / "nowhere.png")


def looped(root: Path) -> None:
    (ant(root) / "loop.png").symlink_to(ant(root) / "loop.png")


def looped_folder(root: Path) -> None:
    (ant(root) / "loop").symlink_to(root / "train", target_is_directory=True)


def dangling_class(root: Path) -> None:
    (root / "train" / "dog").symlink_to(root / "nowhere", target_is_directory=True)


def nested(root: Path) -> None:
    deep = ant(root) / "2019" / "summer"
    deep.mkdir(parents=True)
    (ant(root) / "0.png").rename(deep / "0.png")


def one_folder_too_deep(root: Path) -> None:
    """Leave the folders as an archive that was unpacked into a folder of its own has them."""
    inner = root / "photos"
    inner.mkdir()
    for split in ("train", "val"):
        (root / split).rename(inner / split)


def no_class_folders(root: Path) -> None:
    for image in ant(root).iterdir():
        image.rename(root / "train" / image.name)
    for name in CLASSES:
        shutil.rmtree(root / "train" / name)


def littered(root: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "._0.png"):
        (ant(root) / name).write_bytes(b"litter")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "README.txt").write_text("of the folder")


def archived_by_a_mac(root: Path) -> None:
    for split in ("train", "val"):
        place = root / split / "__MACOSX"
        place.mkdir()
        (place / "._0.png").write_bytes(b"litter")


def few_images(root: Path) -> None:
    for number in range(3, 12):
        (root / "train" / "bee" / f"{number}.png").unlink()


def in_both(root: Path) -> None:
    shutil.copy(root / "train" / "bee" / "3.png", root / "val" / "bee" / "again.png")


def not_utf8(root: Path) -> None:
    try:
        encoded_name = os.fsencode(root / "train" / "ant") + b"/\xff\xfe.png"
        Path(os.fsdecode(encoded_name)).write_bytes(encoded(noise(8, 8, 3), "PNG"))
    except OSError:
        pytest.skip("this disk takes no such name")


def write_classifier(
    path: Path, classes: tuple[str, ...] = CLASSES, *, architecture: str = "linear", size: int = 16, **about: Any
) -> None:
    torch.manual_seed(0)
    made = build_classifier(architecture, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
    write_network(made, path, **about)


def write_network(made: Classifier, path: Path, **about: Any) -> None:
    state = {STATE_PREFIX + name: value for name, value in made.state_dict().items()}
    torch.save({CLASSIFIER_KEY: made.description.plain() | about, "state_dict": state}, path)


def taught(classes: tuple[str, ...] = CLASSES, *, more: str = "", **about: Any) -> Spoil:
    """Put a teacher beside the images."""

    def spoil(root: Path) -> str:
        write_classifier(root / "teacher.ckpt", classes, **about)
        return f"--distill --teacher_checkpoint {root / 'teacher.ckpt'} --allow_weak_teacher {more}"

    return spoil


def taught_by(content: Callable[[bytes], bytes]) -> Spoil:
    """Put a teacher whose file was spoilt beside the images."""

    def spoil(root: Path) -> str:
        path = root / "teacher.ckpt"
        write_classifier(path)
        path.write_bytes(content(path.read_bytes()))
        return f"--distill --teacher_checkpoint {path}"

    return spoil


def taught_by_a_stranger(root: Path) -> str:
    torch.save({"weight": torch.zeros(3)}, root / "teacher.ckpt")
    return f"--distill --teacher_checkpoint {root / 'teacher.ckpt'}"


def file_for_a_folder(root: Path) -> str:
    (root / "file").touch()
    return f"--data_dir {root / 'file'}"


def doubled_and_strict(root: Path) -> str:
    in_both(root)
    return "--strict"


class Beast(NamedTuple):
    """One of the zoo.

    Args:
        spoil: What is done to a sound folder.
        words: What a person reads.
        level: ``error``, ``Warning``, ``Note``; or ``fine``, where nothing is said of it.
    """

    spoil: Spoil
    words: str = ""
    level: str = "error"


RGB = noise(10, 10, 3)

ZOO = {
    # Folders.
    "no data_dir": Beast(without(""), "--data_dir {root}: there is no such folder"),
    "data_dir is a file": Beast(file_for_a_folder, "--data_dir {root}/file: this is a file, not a folder"),
    "no train folder": Beast(
        without("train"), "{root}/train: there is no such folder (--train_data names it; folders in {root}: val)"
    ),
    "no val folder": Beast(
        without("val"), "{root}/val: there is no such folder (--val_data names it; folders in {root}: train)"
    ),
    "empty data_dir": Beast(without("train", "val"), "{root}/train: there is no such folder"),
    "one folder too deep": Beast(one_folder_too_deep, "folders in {root}: photos); is --data_dir {root}/photos meant?"),
    "empty train folder": Beast(emptied("train"), "{root}/train: this folder has no class folders; images belong in"),
    "images without class folders": Beast(
        no_class_folders, "has no class folders; images belong in {root}/train/CLASS"
    ),
    "one class": Beast(
        without("train/bee", "train/cat"), "{root}/train: there is one class only, 'ant'; a classifier needs two"
    ),
    "class without images": Beast(emptied("train/bee"), "{root}/train/bee: this class has no images"),
    "class of val alone": Beast(without("train/cat"), "differ in their classes; only in {root}/val: cat"),
    "class of train alone": Beast(without("val/cat"), "differ in their classes; only in {root}/train: cat"),
    "case of a class": Beast(renamed("cat", "Cat", splits=("val",)), "the names differ in upper and lower case"),
    "few images": Beast(few_images, "classes with fewer than 10 training images: bee (3)", "Warning"),
    "images in both": Beast(
        in_both, "1 of 31 validation images stands in the training images, too, so that accuracies", "Warning"
    ),
    "strict": Beast(doubled_and_strict, "--strict: a warning, and nothing was begun:\n  1 of 31 validation images"),
    "nested": Beast(nested, level="fine"),
    "litter": Beast(littered, level="fine"),
    "a Mac's archive": Beast(archived_by_a_mac, level="fine"),
    "dangling class": Beast(dangling_class, "{root}/train/dog: this link leads nowhere"),
    # Names.
    "spaces": Beast(renamed("ant", "red ant, small"), level="fine"),
    "unicode": Beast(renamed("ant", "蟻 🐜"), level="fine"),
    "newline": Beast(
        renamed("ant", "two\nlines"), "{root}/train/two\\nlines: this name holds characters that can't be shown"
    ),
    "colors": Beast(renamed("ant", "\x1b[31mred"), "{root}/train/\\x1b[31mred: this name holds characters that"),
    "newline in a file": Beast(
        put("a\nb.png", encoded(noise(8, 8, 3), "PNG")), "{root}/train/ant/a\\nb.png: this name"
    ),
    "markup": Beast(renamed("ant", "[bold]ant"), level="fine"),
    "dash": Beast(renamed("ant", "--help"), level="fine"),
    "HTML": Beast(renamed("ant", "<script>alert(1)<!--"), level="fine"),
    "no UTF-8": Beast(not_utf8, "ant/\\udcff\\udcfe.png: this name holds characters that can't be shown"),
    # Files.
    "text": Beast(put("notes.txt", b"hello"), "ant/notes.txt: this file is no image (images end in .jpg .jpeg .png"),
    "text named .jpg": Beast(put("x.jpg", b"hello"), "ant/x.jpg: this file is no image, whatever its name says"),
    "pointer of Git LFS": Beast(
        put("x.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "ant/x.jpg: this file stands for an image that Git LFS keeps; `git lfs pull` fetches the image",
    ),
    "page named .png": Beast(put("x.png", b"<!DOCTYPE html>"), "ant/x.png: this file is no image, whatever its name"),
    "PNG named .jpg": Beast(put("x.jpg", encoded(RGB, "PNG")), level="fine"),
    "zero bytes": Beast(put("x.png", b""), "ant/x.png: this file is empty"),
    "signature alone": Beast(
        put("x.png", b"\x89PNG\r\n\x1a\n"), "ant/x.png: this image can't be decoded: it is of no known"
    ),
    "truncated PNG": Beast(truncated("PNG"), "ant/half.png: this image can't be decoded: image file is truncated"),
    "truncated JPEG": Beast(truncated("JPEG"), "ant/half.jpg: this image can't be decoded: image file is truncated"),
    "truncated WebP": Beast(
        truncated("WEBP"), "ant/half.webp: this image can't be decoded: it is cut short or damaged"
    ),
    "garbage in the middle": Beast(of_garbage, "ant/garbage.jpg: this image can't be decoded: "),
    "wrong checksum": Beast(
        put("x.png", encoded(noise(30, 30, 3), "PNG").replace(b"IDAT", b"IDAU", 1)), "x.png: this image can't be decode"
    ),
    "bomb": Beast(
        put("bomb.png", one_bit_png(60_000, 60_000)),
        "ant/bomb.png: this image can't be decoded: the 3,600,000,000 pixels that",
    ),
    "large": Beast(
        put("big.png", one_bit_png(8_000, 8_000, content=zlib.compress((b"\0" + b"\xff" * 1_000) * 8_000))),
        "one image is enormous, and slow to decode ({root}/train/ant/big.png: 8000 x 8000 pixels)",
        "Warning",
    ),
    "CMYK": Beast(put("x.jpg", encoded(RGB.convert("CMYK"), "JPEG")), "in printing colors (CMYK)", "Warning"),
    "16 bits": Beast(
        put("x.png", encoded(Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16)), "PNG")),
        "one image is of 16 bits a pixel ({root}/train/ant/x.png: of its 16 bits the upper 8 are taken)",
        "Note",
    ),
    "RGBA": Beast(put("x.png", encoded(noise(8, 8, 4), "PNG")), "one image is partly transparent", "Note"),
    "palette": Beast(
        put("x.png", encoded(RGB.quantize(4), "PNG", transparency=0)), "one image is partly transparent", "Note"
    ),
    "GIF named .png": Beast(
        put("x.png", encoded(RGB, "GIF", save_all=True, append_images=[noise(10, 10, 3, seed=1)])),
        "ant/x.png: this file is no image, whatever its name says",
    ),
    "animated PNG": Beast(
        put("x.png", encoded(RGB, "PNG", save_all=True, append_images=[noise(10, 10, 3, seed=1)])),
        "one image is animated ({root}/train/ant/x.png: the first of its 2 pictures is taken)",
        "Warning",
    ),
    "animated WebP": Beast(
        put("x.webp", encoded(RGB, "WEBP", save_all=True, append_images=[noise(10, 10, 3, seed=1)])),
        "the first of its 2 pictures is taken",
        "Warning",
    ),
    "TIFF of two pages": Beast(
        put("x.tiff", encoded(RGB, "TIFF", save_all=True, append_images=[noise(10, 10, 3, seed=1)])),
        "the first of its 2 pictures is taken",
        "Warning",
    ),
    "turned": Beast(turned, "turned by the camera ({root}/train/ant/turned.jpg: it is set upright, as the", "Note"),
    "one pixel": Beast(put("x.png", encoded(noise(1, 1, 3), "PNG")), "one image is tiny", "Note"),
    "elongated": Beast(
        put("x.png", encoded(noise(1, 2_000, 3), "PNG")), "one image is very long and thin ({root}/train", "Warning"
    ),
    "unreadable": Beast(unreadable, "ant/0.png: this file can't be read: Permission denied"),
    "unreadable folder": Beast(unreadable_folder, "train/ant: this folder can't be read: Permission denied"),
    "dangling": Beast(dangling, "ant/gone.png: this file can't be read: No such file or directory"),
    "loop": Beast(looped, "ant/loop.png: this file can't be read: Too many levels of symbolic links"),
    "loop of folders": Beast(looped_folder, level="fine"),
    "folder named .png": Beast(lambda root: (ant(root) / "folder.png").mkdir(), level="fine"),
    # Teachers.
    "teacher of other classes": Beast(
        taught(("ant", "bee", "dog")), "was trained for other classes: only it has dog; only photos has cat"
    ),
    "teacher of other order": Beast(
        taught(("bee", "ant", "cat")), "they are in another order: class 0 is 'bee' to it, and 'ant' in photos"
    ),
    "teacher of more classes": Beast(
        taught((*CLASSES, "dog")), "it has 4 classes (ant, bee, cat, dog), photos has 3 (ant, bee, cat)"
    ),
    "teacher of another size": Beast(taught(size=20), "was trained on images of 20 px, and it would be shown 16 px"),
    "another network": Beast(taught(architecture="mlp"), "holds mlp, and --teacher_model says linear"),
    "no teacher": Beast(
        flags("--distill --teacher_checkpoint absent.ckpt"), "absent.ckpt: there is no such checkpoint"
    ),
    "truncated checkpoint": Beast(
        taught_by(lambda whole: whole[: len(whole) // 2]), "of plain weights: it is cut short or damaged"
    ),
    "empty checkpoint": Beast(
        taught_by(lambda _: b""), "teacher.ckpt: this can't be read as a checkpoint of plain weights: it is empty"
    ),
    "text for a checkpoint": Beast(
        taught_by(lambda _: b"version https://git-lfs"), "plain weights: it is no file of weights"
    ),
    "weights of somebody else": Beast(
        taught_by_a_stranger, "teacher.ckpt: this is no checkpoint of a classifier that this tool trained"
    ),
    "no better than chance": Beast(taught(), "the teacher's accuracy, ", "Warning"),
    "larger than its teacher": Beast(
        taught(more="--student_model mlp"), "the student mlp has more parameters than the teacher linear", "Note"
    ),
    # Flags.
    "temperature of nobody": Beast(
        taught(more="--temperature 4 --loss ce=1 mse=1"),
        "--temperature 4: no term of the objective has one (ce mse)",
        "Warning",
    ),
    "long warm-up": Beast(flags("--warmup_epochs 30"), "--warmup_epochs 30: these are 150 steps", "Warning"),
    "few steps": Beast(flags("--max_epochs 2"), "the training has 10 steps, too few to learn much in", "Warning"),
    "large batch": Beast(flags("--batch_size 64"), "there are 36 training images: an epoch is a single step", "Note"),
    "number of classes": Beast(flags("--num_classes 4"), "--num_classes 4: photos has 3"),
    "name of a folder": Beast(flags("--name ../x"), "--name ../x: this is no name for a folder"),
}


@pytest.mark.parametrize("beast", ZOO)
def test_each_is_met_with_words_for_a_newcomer(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str], beast: str
) -> None:
    spoil, words, level = ZOO[beast]
    root = make_folder(train=12, val=10)
    more = (spoil(root) or "").split()
    given = {"--data_dir": str(root)} | TINY
    plain = [word for flag, value in given.items() if flag not in more for word in (flag, value)]
    status = main(["check", *plain, *more])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    expected = words.format(root=root) if "{root}" in words else words
    if level == "error":
        assert status == 2
        assert err.startswith("error: ")
        assert err.count("error:") == 1
        assert expected in err
        return
    assert (status, err) == (0, "")
    if level == "fine":
        assert "Warning" not in out
        assert "Nothing stands in the way" in out
        return
    assert any(line.startswith(f"{level}: ") and expected in line for line in out.splitlines()), out
