"""A teacher whose logits were computed elsewhere: a table of images and logits, looked up by the pixels of a view."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from xxhash import xxh3_128_digest

from kd.data import LabeledImages
from kd.errors import DamagedFile, UserError
from kd.files import DIGEST_SIZE
from kd.models import Classifier, Ensemble, read_safetensors

TABLES = (".npz", ".parquet", ".safetensors")
"""Suffixes of the files that may hold a table of logits."""

_SUM_TOLERANCE = 1e-3
_NAME_COLUMNS = ("keys", "key", "path", "image", "file")


@dataclass(frozen=True)
class LogitTable:
    """A teacher's logits for some images.

    Args:
        names: Path or key of each image, ``(N,)``.
        logits: ``(N, C)``, of the plain view of each image.
        flipped: ``(N, C)``, of its mirror image; ``None``: not stored.
        digests: Hash of the content of each image file, ``(N, 16)``, uint8, by which images are then found.
        classes: Class names in the order of the logits, if they are stored.
    """

    names: Sequence[str]
    logits: NDArray[np.float32]
    flipped: NDArray[np.float32] | None = None
    digests: NDArray[np.uint8] | None = None
    classes: tuple[str, ...] | None = None


def read_table(path: Path) -> LogitTable | None:
    """Read a table of logits; ``None`` if a safetensors file holds something else.

    Args:
        path: ``.npz`` with the arrays ``keys`` (or ``path``) and ``logits``, and optionally ``flipped``, ``digests``
            and ``classes``; ``.safetensors`` with the tensors ``logits`` and ``flipped``, and ``keys`` and ``classes``
            as JSON in its metadata; or ``.parquet`` with the columns ``path`` (or ``key``), ``logits`` and ``flipped``.

    Raises:
        UserError: If it can't be read, or its arrays don't fit each other.
    """
    values: dict[str, Any]
    if path.suffix == ".safetensors":
        texts, tensors = read_safetensors(path)
        if "logits" not in tensors or not any(name in texts for name in _NAME_COLUMNS):
            return None
        values = {name: json.loads(text) for name, text in texts.items() if name in (*_NAME_COLUMNS, "classes")}
        values |= {name: tensor.numpy() for name, tensor in tensors.items()}
    elif path.suffix == ".parquet":
        values = _read_parquet(path)
    else:
        try:
            with np.load(path, allow_pickle=False) as file:
                values = dict(file)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except Exception as error:  # noqa: BLE001 (arbitrary bytes make numpy raise anything)
            raise DamagedFile(f"{path}: can't be read as a table of logits: {error}") from None
    column = next((name for name in _NAME_COLUMNS if name in values), None)
    if column is None or "logits" not in values:
        raise UserError(
            f"{path}: a table of logits needs keys (or path) and logits; it has {', '.join(values) or 'none'}"
        )
    names, logits = [str(name) for name in values[column]], np.asarray(values["logits"], dtype=np.float32)
    flipped = None if values.get("flipped") is None else np.asarray(values["flipped"], dtype=np.float32)
    is_matrix = logits.ndim == 2 and len(logits) == len(names)  # noqa: PLR2004 (N, C)
    if not is_matrix or (flipped is not None and flipped.shape != logits.shape):
        raise UserError(f"{path}: logits must have one row for each of the {len(names):,} images, and flipped likewise")
    for kind, array in (("logits", logits), ("flipped", flipped)):
        if array is not None:
            _check_logits(array, names, f"{path}: {kind}")
    _check_names(names, logits, path)
    classes = None if values.get("classes") is None else tuple(map(str, values["classes"]))
    return LogitTable(names, logits, flipped, _checked_digests(values.get("digests"), len(names), path), classes)


def _checked_digests(values: object, number: int, path: Path) -> NDArray[np.uint8] | None:
    """Refuse hashes of another length or number."""
    if values is None:
        return None
    digests = np.asarray(values)
    if digests.dtype != np.uint8 or digests.shape != (number, DIGEST_SIZE):
        raise UserError(
            f"{path}: digests must be a hash of {DIGEST_SIZE} bytes for each of the {number:,} images, uint8 "
            f"({number}, {DIGEST_SIZE}), not {digests.dtype} {digests.shape}"
        )
    return digests


def _check_logits(logits: NDArray[np.float32], names: Sequence[str], what: str) -> None:
    """Refuse values that are no numbers, and probabilities."""
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{what} of {(~finite).sum():,} images hold NaN or infinity, such as those of {names[int(finite.argmin())]}"
        )
    if len(logits) and (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=_SUM_TOLERANCE):
        raise UserError(f"{what} are probabilities: each row sums to 1; store the logits before the softmax")


def _check_names(names: Sequence[str], logits: NDArray[np.float32], path: Path) -> None:
    """Refuse an image that is listed with different logits."""
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if not np.array_equal(logits[rows.setdefault(name, row)], logits[row]):
            raise UserError(f"{path}: {name} is listed twice, with different logits")


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: can't be read as a Parquet file: {error}") from None
    values: dict[str, Any] = {name: table.column(name).to_pylist() for name in table.column_names}
    classes = (table.schema.metadata or {}).get(b"classes")
    return values | ({} if classes is None else {"classes": json.loads(classes)})


class StoredLogits(nn.Module):
    """Looks up the logits of views by their pixels, once :meth:`index` has seen the images.

    Args:
        table: The logits.
        path: Where they were read, for messages.

    Attributes:
        is_lookup: That it can only be run on known images.
    """

    digest: Tensor
    is_lookup = True

    def __init__(self, table: LogitTable, path: Path) -> None:
        super().__init__()
        self.table = table
        self._path = path
        self._rows: dict[bytes, tuple[int, bool]] = {}
        self._logits = torch.from_numpy(table.logits)
        self._flipped = None if table.flipped is None else torch.from_numpy(table.flipped)
        # Identifies the table, which isn't among the weights.
        content = hashlib.sha256(json.dumps([list(table.names), table.classes]).encode())
        for array in (table.logits, table.flipped, table.digests):
            content.update(b"\n" if array is None else np.ascontiguousarray(array).tobytes())
        self.register_buffer("digest", torch.tensor(list(content.digest()), dtype=torch.uint8))

    def __deepcopy__(self, memo: object) -> "StoredLogits":
        """Return itself: it doesn't change."""
        return self

    @property
    def has_flipped(self) -> bool:
        """Whether the logits of mirror images are stored."""
        return self._flipped is not None

    def index(self, images: LabeledImages, view: Callable[[Tensor], Tensor], *, kind: str, root: Path | None) -> None:
        """Compute the pixels by which the logits of images are looked up.

        Args:
            images: The images.
            view: Their plain view, ``(3, H, W)`` to ``(3, S, S)``, uint8.
            kind: What they are, for messages: ``training``, ``validation`` or ``unlabeled``.
            root: The folder to which names in the table are relative.

        Raises:
            UserError: If the table lacks one of them.
        """
        rows = self._find(images, root)
        missing = [index for index, row in enumerate(rows) if row is None]
        if missing:
            first = images.files[missing[0]] if images.files else images.keys[missing[0]]
            raise UserError(
                f"{self._path}: has no logits for {len(missing):,} of the {len(images):,} {kind} images, such as "
                f"{first}; images are found by their content where the file records it, or else by their path in "
                "--data_dir; write them all with kd predict TEACHER DATA_DIR --logits FILE"
            )
        for index, row in enumerate(rows):
            pixels = view(images.load(index))
            # A symmetric image counts as not mirrored.
            self._rows.setdefault(_digest(pixels.flip(-1)), (row or 0, True))
            self._rows[_digest(pixels)] = (row or 0, False)

    def _find(self, images: LabeledImages, root: Path | None) -> list[int | None]:
        """Return the row of each image, or ``None``."""
        if self.table.digests is not None and images.digests is not None:
            by_content = {digest.tobytes(): row for row, digest in enumerate(self.table.digests)}
            return [by_content.get(digest.tobytes()) for digest in images.digests]
        by_name = {Path(name).as_posix(): row for row, name in enumerate(self.table.names)}
        found = list[int | None]()
        for index, key in enumerate(images.keys):
            names = [key]
            if images.files:
                file = images.files[index].absolute()
                within = root is not None and file.is_relative_to(root.absolute())
                names = [file.as_posix(), *([file.relative_to(root.absolute()).as_posix()] if within and root else [])]
            found.append(next((by_name[name] for name in names if name in by_name), None))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` of images ``(B, 3, S, S)`` in [0, 1]."""
        pixels = (images.detach().float() * 255).round().to(torch.uint8).cpu()
        rows = []
        for view in pixels:
            found = self._rows.get(_digest(view))
            if found is None or (found[1] and self._flipped is None):
                raise UserError(
                    f"{self._path}: an image is shown in a view whose logits aren't stored; use --augment none, or "
                    "flip with logits from kd predict --flip, without mixing"
                )
            row, is_flipped = found
            rows.append(self._flipped[row] if is_flipped and self._flipped is not None else self._logits[row])
        return torch.stack(rows).to(images.device)


def has_stored_logits(network: Classifier | Ensemble) -> bool:
    """Return whether some of a teacher's logits are looked up, so that it can't be run on other images."""
    return any(isinstance(module, StoredLogits) for module in network.modules())


def _digest(pixels: Tensor) -> bytes:
    return xxh3_128_digest(np.ascontiguousarray(pixels.numpy()).data)
