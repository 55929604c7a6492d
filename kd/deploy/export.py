"""``kd export``: write a student's checkpoint in a format for deployment, and verify the file on real images."""

import contextlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kd.data import LabeledImages, Layout, Splits, load_splits, plain_view
from kd.deploy.loading import FORMATS, Array, Student, as_student, open_student
from kd.errors import DamagedFile, UserError
from kd.exported import METADATA_KEY
from kd.files import write_atomically
from kd.metrics import decide
from kd.models import Classifier, load_classifier, read_accuracy

LARGEST_DIFFERENCE = 1e-4
"""Largest accepted difference between a logit of a float32 file and the checkpoint's."""

_CALIBRATION_IMAGES = 128
_BATCH_SIZE = 64
_OPSET = 18
_LARGEST_ONNX = 2**31
"""Bytes of the largest file that protobuf, the format of ONNX, can hold."""
_PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("safetensors",)}


@dataclass(frozen=True)
class Exported:
    """An exported file, with its verification against the checkpoint on all validation images.

    Args:
        path: The file.
        megabytes: Its size, in 10^6 bytes.
        images: Number of validation images, or of random ones.
        difference: Largest absolute difference between its logits and the checkpoint's.
        agreement: Fraction of images on which both predict the same class.
        accuracy: Its accuracy, in [0, 1]; ``None`` on random images.
        metadata: Its metadata; ``val_acc`` is the checkpoint's accuracy on the same images, or else as it records it.
    """

    path: Path
    megabytes: float
    images: int
    difference: float
    agreement: float
    accuracy: float | None
    metadata: dict[str, Any] = field(repr=False)


def load_checkpoint_splits(checkpoint: Path, **replacements: str | None) -> Splits:
    """Load the images that a checkpoint was trained and validated on, as recorded in the config.yaml of its run.

    Args:
        checkpoint: The checkpoint.
        replacements: ``dataset``, ``data_dir`` and ``val_data`` to use instead, unless ``None``.
    """
    config, settings = checkpoint.parent.parent / "config.yaml", dict[str, Any]()
    replacements = {name: value for name, value in replacements.items() if value is not None}
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        settings = content if isinstance(content, dict) else settings
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if not replacements.keys() & {"dataset", "data_dir"}:
            is_missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if is_missing else "can't be read"
            raise (UserError if is_missing else DamagedFile)(
                f"{checkpoint}: its training images are unknown, as {config} {reason}; name them with --data_dir"
            ) from None
    settings = {"dataset": "imagefolder"} | settings | replacements
    return load_splits(settings["dataset"], settings.get("data_dir"), Layout.of(settings), recorded_in=config.parent)


def export_student(
    checkpoint: Path,
    output: str | Path,
    *,
    file_format: str,
    splits: Splits | None,
    quantize: bool = False,
    model: str | None = None,
) -> list[Exported]:
    """Export a student, and verify the file against its checkpoint on the validation images.

    Nothing is written if the logits of the float32 file differ from the checkpoint's.

    Args:
        checkpoint: The checkpoint.
        output: The file to write, with the suffix of its format.
        file_format: ``onnx``, ``torch`` (torch.export) or ``safetensors``.
        splits: The images; quantization is calibrated on training images. ``None``: random images, without accuracy.
        quantize: Also write an 8-bit ONNX file, ``NAME.int8.onnx``.
        model: Architecture; required if the checkpoint names a Python file, whose code then runs.

    Returns:
        The float32 file and, if requested, the quantized one.
    """
    output = Path(output).expanduser()
    _check_request(output, file_format, quantize=quantize)
    classifier = load_classifier(checkpoint, architecture=model)
    if splits is None and quantize:
        raise UserError("--quantize int8: is calibrated on training images; name them with --data_dir")
    if splits is not None and classifier.description.classes != splits.classes:
        raise UserError(f"{checkpoint}: its classes are not those of {splits.name}; name its images with --data_dir")
    metadata = classifier.description.plain()
    images = None if splits is None else splits.val
    expected = _compute_logits(as_student(classifier, metadata), images)
    metadata |= {
        "val_acc": read_accuracy(checkpoint) if images is None else _accuracy(expected, images),
        "data": None if splits is None else splits.name,
        "format": file_format,
        "parameters": classifier.count_parameters(),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / output.name
        _WRITERS[file_format](classifier, metadata, file)
        if file_format == "torch":
            # Safe, as this process just wrote it; torch.export files from elsewhere are never loaded.
            student = as_student(torch.export.load(file).module(), metadata)
        else:
            student = open_student(file, model=model)
        exported = [_verify(student, file, output, images, expected, metadata)]
        # Also of logits that are no numbers.
        if not exported[0].difference <= LARGEST_DIFFERENCE:
            raise UserError(
                f"{output}: not written, as its logits differ from the checkpoint's by up to "
                f"{exported[0].difference:.2g} on {exported[0].images} images (limit "
                f"{LARGEST_DIFFERENCE:g}); try another --format"
            )
        files = {output: file}
        if quantize and splits is not None:
            quantized, target = (path.with_suffix(f".int8{path.suffix}") for path in (file, output))
            metadata = metadata | {"quantized": "int8"}
            _quantize(file, quantized, splits.train, metadata)
            files[target] = quantized
            exported.append(_verify(open_student(quantized), quantized, target, images, expected, metadata))
        for target, source in files.items():
            with source.open("rb") as content, write_atomically(target) as written:
                shutil.copyfileobj(content, written)
    return exported


def _check_request(output: Path, file_format: str, *, quantize: bool) -> None:
    if output.suffix != FORMATS[file_format]:
        raise UserError(f"--output {output}: the suffix must be {FORMATS[file_format]} for --format {file_format}")
    if quantize and file_format != "onnx":
        raise UserError(f"--quantize int8: not available for --format {file_format}; use --format onnx")
    missing = [package for package in _PACKAGES.get(file_format, ()) if find_spec(package) is None]
    if missing:
        raise UserError(f"--format {file_format}: needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _verify(
    student: Student, file: Path, path: Path, images: LabeledImages | None, expected: Array, metadata: dict[str, Any]
) -> Exported:
    """Compare a student's logits with the checkpoint's; ``path`` is where the file will be."""
    logits, multilabel = _compute_logits(student, images), bool(metadata.get("multilabel"))
    decisions, wanted = (decide(torch.from_numpy(values), multilabel=multilabel) for values in (logits, expected))
    return Exported(
        path=path,
        megabytes=file.stat().st_size / 1e6,
        images=len(logits),
        difference=float(np.abs(logits - expected).max()),
        agreement=float((decisions == wanted).float().mean()),
        accuracy=None if images is None else _accuracy(logits, images),
        metadata=metadata,
    )


def _accuracy(logits: Array, images: LabeledImages) -> float:
    """Return the fraction of images whose class, or whose labels of several, are just the right ones."""
    decisions = decide(torch.from_numpy(logits), multilabel=images.multilabel)
    correct = decisions == images.targets(range(len(images)))
    return float((correct.all(dim=1) if images.multilabel else correct).float().mean())


def _compute_logits(student: Student, images: LabeledImages | None) -> Array:
    if images is None:
        size = int(student.metadata["image_size"])
        return student.logits(np.random.default_rng(0).random((_BATCH_SIZE, 3, size, size), dtype=np.float32))
    return np.concatenate([student.logits(batch) for batch in _batches(images, range(len(images)), student.metadata)])


def _batches(images: LabeledImages, indices: Sequence[int], metadata: Mapping[str, Any]) -> Iterator[Array]:
    view = plain_view(int(metadata["image_size"]), str(metadata["resize"]))
    for start in range(0, len(indices), _BATCH_SIZE):
        views = torch.stack([view(images.load(index)) for index in indices[start : start + _BATCH_SIZE]])
        yield views.float().div(255).contiguous().numpy()


def _write_onnx(classifier: Classifier, metadata: dict[str, Any], path: Path) -> None:
    size = sum(value.nbytes for value in classifier.state_dict().values())
    if size >= _LARGEST_ONNX:
        raise UserError(
            f"--format onnx: the weights take {size / 1e9:.1f} GB, and an ONNX file holds at most "
            f"{_LARGEST_ONNX / 1e9:.1f} GB; use --format safetensors"
        )
    with _silenced(), _traced(classifier, "onnx"):
        torch.onnx.export(
            classifier,
            (_example(classifier),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    _add_onnx_metadata(path, metadata)


def _add_onnx_metadata(path: Path, metadata: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(path)
    # Where the exporter falls back to another way of tracing, it fixes the batch size without an error.
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError(
            "--format onnx: tracing fixed the number of images per batch, as the network computes with it as a Python "
            "number; --format safetensors doesn't trace"
        )
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_program(classifier: Classifier, metadata: dict[str, Any], path: Path) -> None:
    with _silenced(), _traced(classifier, "torch"):
        program = torch.export.export(
            classifier, (_example(classifier),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": json.dumps(metadata)})


def _write_safetensors(classifier: Classifier, metadata: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    # A layer under two names is written once.
    once = {
        (value.data_ptr(), value.shape) if value.numel() else name: name
        for name, value in classifier.state_dict().items()
    }
    state = {name: value.contiguous() for name, value in classifier.state_dict().items() if name in once.values()}
    save_file(state, path, metadata={METADATA_KEY: json.dumps(metadata)})


_WRITERS = {"onnx": _write_onnx, "torch": _write_program, "safetensors": _write_safetensors}


def _example(classifier: Classifier) -> torch.Tensor:
    """Return example inputs for tracing: two images, as torch.export treats a dimension of one as constant."""
    size = classifier.description.image_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _quantize(source: Path, target: Path, training: LabeledImages, metadata: dict[str, Any]) -> None:
    """Quantize weights and activations of an ONNX file to 8 bits, with ranges calibrated on training images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    indices = torch.linspace(0, len(training) - 1, min(_CALIBRATION_IMAGES, len(training))).round().long().tolist()
    batches = _batches(training, indices, metadata)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
        def get_next(self) -> dict[str, Array] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch}

    preprocessed = target.with_suffix(".preprocessed")
    with _silenced():
        quant_pre_process(str(source), str(preprocessed))
        quantize_static(
            str(preprocessed),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    _add_onnx_metadata(target, metadata)


@contextlib.contextmanager
def _traced(classifier: Classifier, file_format: str) -> Iterator[None]:
    """Report in one message that torch.export can't trace a network."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(
            f"--format {file_format}: torch.export can't trace {classifier.description.architecture}: {reason}; "
            "--format safetensors doesn't trace"
        ) from error


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Silence exporters' log records, warnings and prints; their exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
