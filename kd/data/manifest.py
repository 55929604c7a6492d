"""Content hashes and findings of image files, kept between runs so that an unchanged file is read only once."""

import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd.data.image_check import BROKEN, FileFinding, check_file
from kd.data.images import LabeledImages
from kd.files import content_digest, write_atomically

_VERSION = 2
_SAMPLE = 64
_DECODED = 256
_CHUNK = 256
# A file that was changed this recently may change again without another time of change.
_CLOCK_NS = 2_000_000_000

Stats = NDArray[np.int64]
"""Size, time of modification, time of change of the entry, and inode of each file, ``(N, 4)``."""


@dataclass
class Manifest:
    """The state of some files when they were read, and what was found.

    Args:
        names: Path of each file.
        stats: Their state, by which a changed file is recognized without being read.
        digests: Hash of the content of each file, ``(N, 16)``, uint8.
        findings: Findings by position of the file; most have none.
    """

    names: list[str]
    stats: Stats
    digests: NDArray[np.uint8]
    findings: dict[int, list[FileFinding]]


def examine(
    images: LabeledImages,
    *,
    cache: Path | None = None,
    verify: str = "sample",
    progress: Callable[[int, int], object] = lambda *_: None,
) -> tuple[LabeledImages, list[FileFinding]]:
    """Hash and check image files; those that haven't changed since an earlier call are not read again.

    A file counts as unchanged if its size, its times and its inode are. Of these, a random sample is read and compared
    at each call; if one differs, all are read.

    Args:
        images: The images; returned as they are, without findings, if they don't come from files.
        cache: Folder in which the results are kept; ``None``: nowhere.
        verify: ``sample``, or ``full`` to read all files.
        progress: Called with the number of files read and their total.

    Returns:
        The images with the hashes of their files, and the findings.
    """
    if not images.files:
        return images, []
    names = [str(path) for path in images.files]
    started, stats = time.time_ns(), _read_stats(names)
    path = None if cache is None else cache / f"{_digest_of_text(str(Path(os.path.commonpath(names)).absolute()))}.npz"
    known = None if path is None or verify == "full" else read_manifest(path)
    manifest, stale = _merge(known, names, stats)
    _read(manifest, stale, progress)
    unchanged = np.setdiff1d(np.arange(len(names)), stale)
    if len(unchanged) and not _agrees_on_sample(manifest, unchanged):
        _read(manifest, unchanged, progress)
        stale = unchanged
    if path is not None and (len(stale) or known is None or len(known.names) != len(names)):
        stats[stats[:, 1:3].max(axis=1) > started - _CLOCK_NS] = 0
        # If it can't be written, the files are read again next time.
        with suppress(OSError):
            _save(manifest, path)
    findings = [finding for index in sorted(manifest.findings) for finding in manifest.findings[index]]
    return images.with_digests(manifest.digests), findings


def _read_stats(names: Sequence[str]) -> Stats:
    return np.array([_read_state(name) for name in names], dtype=np.int64).reshape(-1, 4)


def _read_state(name: str) -> tuple[int, int, int, int]:
    try:
        facts = Path(name).stat()
    except OSError:
        # A broken link: never the state of a file that was read.
        return 0, 0, 0, 0
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino % 2**63


def _merge(known: Manifest | None, names: list[str], stats: Stats) -> tuple[Manifest, NDArray[np.intp]]:
    """Return a manifest of the present files with what is known of the unchanged, and the positions of the others."""
    merged = Manifest(names, stats, np.zeros((len(names), 16), dtype=np.uint8), {})
    if known is None:
        return merged, np.arange(len(names))
    positions = {name: index for index, name in enumerate(known.names)}
    stale = []
    for index, name in enumerate(names):
        position = positions.get(name)
        if position is None or not stats[index].any() or not np.array_equal(known.stats[position], stats[index]):
            stale.append(index)
            continue
        merged.digests[index] = known.digests[position]
        if position in known.findings:
            merged.findings[index] = known.findings[position]
    return merged, np.array(stale, dtype=np.intp)


def _read(manifest: Manifest, indices: NDArray[np.intp], progress: Callable[[int, int], object]) -> None:
    """Read, hash and check the files at some positions."""
    # Formats whose files show that they are complete are decoded in a sample only.
    decoded = set(np.random.default_rng(0).permutation(indices)[:_DECODED].tolist())

    def read(index: int) -> tuple[bytes, list[FileFinding]]:
        path = Path(manifest.names[index])
        try:
            content = path.read_bytes()
        except OSError as error:
            # Not a hash that a file can have; it is tried again at the next start.
            return bytes(16), [FileFinding(BROKEN, str(path), f"it can't be read: {error.strerror}")]
        return content_digest(content), check_file(path, io.BytesIO(content), decodes=index in decoded)

    # Threads suffice, as hashing and decoding don't hold the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for start in range(0, len(indices), _CHUNK):
            chunk = indices[start : start + _CHUNK].tolist()
            for index, (digest, findings) in zip(chunk, threads.map(read, chunk), strict=True):
                manifest.digests[index] = np.frombuffer(digest, dtype=np.uint8)
                manifest.findings.pop(index, None)
                if findings:
                    manifest.findings[index] = findings
            progress(start + len(chunk), len(indices))


def _agrees_on_sample(manifest: Manifest, indices: NDArray[np.intp]) -> bool:
    """Read a random sample of files, another at each call, and compare their hashes."""
    sample = secrets.SystemRandom().sample(indices.tolist(), min(_SAMPLE, len(indices)))
    return all(
        content_digest(Path(manifest.names[index]).read_bytes()) == manifest.digests[index].tobytes()
        for index in sample
    )


def _save(manifest: Manifest, path: Path) -> None:
    findings = {str(index): [list(each) for each in found] for index, found in manifest.findings.items()}
    text = json.dumps({"version": _VERSION, "names": manifest.names, "findings": findings})
    with write_atomically(path) as file:
        np.savez(file, about=np.array(text), stats=manifest.stats, digests=manifest.digests)


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; ``None`` if it is missing, damaged or of another version."""
    # Numpy's files are zip archives: a damaged part doesn't match its checksum.
    with suppress(Exception), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        about, stats, digests = json.loads(str(arrays["about"])), arrays["stats"], arrays["digests"]
        names = about["names"]
        if about["version"] == _VERSION and stats.shape == (len(names), 4) and digests.shape == (len(names), 16):
            findings = {
                int(index): [FileFinding(*values) for values in found] for index, found in about["findings"].items()
            }
            return Manifest(names, stats, digests, findings)
    return None


def _digest_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()
