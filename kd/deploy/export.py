"""``kd export``: a student's checkpoint as a file that runs elsewhere, compared with the checkpoint on real images."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kd.data import LabeledImages, Splits, load_splits, match_classes, plain_view
from kd.deploy.formats import FORMATS, METADATA_KEY, Array, Student, open_student
from kd.errors import UserError
from kd.models import Classifier, load_classifier
from kd.training.predictions import prediction_arrays, write_predictions

LARGEST_DIFFERENCE = 1e-4
"""Between the logits of a float32 file and those of its checkpoint."""

_CALIBRATED = 128
_AT_ONCE = 64
_OPSET = 18


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what was measured of it.

    Args:
        path: The file.
        megabytes: Its size, in 10^6 bytes.
        images: On how many validation images it was compared with the checkpoint: all of them.
        difference: The largest difference of a logit from the checkpoint's.
        agreement: Share of them on which both decide alike.
        accuracy: Of the file on them, a fraction of 1.
        checkpoint_accuracy: Of the checkpoint.
        quantized: What the weights were quantized to, or ``None``.
        about: What the file says of itself.
    """

    path: Path
    megabytes: float
    images: int
    difference: float
    agreement: float
    accuracy: float
    checkpoint_accuracy: float
    quantized: str | None
    about: dict[str, Any] = field(repr=False)


def splits_of(checkpoint: Path, *, dataset: str | None, data_dir: str | None, val_data: str | None = None) -> Splits:
    """Read the images that a checkpoint was trained and validated on, as its training wrote them down beside it.

    Args:
        checkpoint: The checkpoint.
        dataset: Another data set, or ``None``.
        data_dir: Another folder, or ``None``.
        val_data: Another name of the folder of validation images, or ``None``.

    Raises:
        UserError: If nothing was written down and nothing is named, or the images can't be read.
    """
    known = dict[str, Any]()
    try:
        written = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text(encoding="utf-8"))
        known = written if isinstance(written, dict) else known
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if dataset is None and data_dir is None:
            config = checkpoint.parent.parent / "config.yaml"
            why = "there is no config.yaml" if isinstance(error, FileNotFoundError) else f"{config} can't be read"
            raise UserError(f"{checkpoint}: it is not known what it was trained on, as {why}; say --data_dir") from None
    named = {"dataset": dataset, "data_dir": data_dir, "val_data": val_data}
    chosen = known | {name: value for name, value in named.items() if value is not None}
    return load_splits(
        chosen.get("dataset", "imagefolder"),
        chosen.get("data_dir"),
        train_data=chosen.get("train_data", "train"),
        val_data=chosen.get("val_data", "val"),
    )


def export_student(
    checkpoint: str | Path,
    output: str | Path,
    *,
    file_format: str,
    splits: Splits,
    quantize: str | None = None,
    model: str | None = None,
) -> list[Exported]:
    """Write a student into a file, and compare it with its checkpoint on validation images.

    A file in float32 that differs from the checkpoint is not left behind.

    Args:
        checkpoint: The checkpoint.
        output: The file to write; its suffix must be the format's.
        file_format: ``onnx``, ``torch`` (torch.export) or ``safetensors``.
        splits: The images; those of training calibrate a quantization.
        quantize: ``int8`` writes a quantized ONNX file besides, ``NAME.int8.onnx``.
        model: The network, where the checkpoint names a Python file.

    Returns:
        What was written: the file in float32 and, where asked for, the quantized one.

    Raises:
        UserError: If a package is missing, the output's suffix is not the format's, the classes of checkpoint and
            images differ, or the file's logits are not the checkpoint's.
    """
    output = Path(output).expanduser()
    _check_request(output, file_format, quantize)
    classifier = load_classifier(checkpoint, architecture=model)
    if classifier.description.classes != splits.classes:
        raise UserError(f"{checkpoint}: its classes are not those of {splits.name}, which it would be compared on")
    labels = np.asarray(splits.val.labels)
    expected = _logits_of(_as_student(classifier), splits.val)
    accuracy = float((expected.argmax(axis=1) == labels).mean())
    about = classifier.description.plain() | {
        "val_acc": accuracy,
        "data": splits.name,
        "format": file_format,
        "parameters": classifier.count_parameters(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as beside:
        whole = Path(beside) / output.name
        _WRITERS[file_format](classifier, about, whole)
        done = [_compared(whole, output, splits.val, expected, about, None, model)]
        if done[0].difference > LARGEST_DIFFERENCE:
            raise UserError(
                f"{output}: its logits differ from the checkpoint's by up to {done[0].difference:.2g} on "
                f"{done[0].images} validation images, more than {LARGEST_DIFFERENCE:g}; it was not kept"
            )
        if quantize is not None:
            small = Path(beside) / f"{output.stem}.{quantize}{output.suffix}"
            _quantize(whole, small, splits.train, about | {"quantized": quantize})
            done.append(_compared(small, output.parent / small.name, splits.val, expected, about, quantize, model))
            small.replace(done[1].path)
        whole.replace(output)
    return done


def _check_request(output: Path, file_format: str, quantize: str | None) -> None:
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: there are {', '.join(FORMATS)}")
    if output.suffix != FORMATS[file_format]:
        raise UserError(f"--output {output}: a file of --format {file_format} ends in {FORMATS[file_format]}")
    if quantize not in (None, "int8"):
        raise UserError(f"--quantize {quantize}: there is int8")
    if quantize is not None and file_format != "onnx":
        raise UserError(f"--quantize {quantize} --format {file_format}: quantized files are ONNX files")
    packages = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("safetensors",)}
    missing = [package for package in packages.get(file_format, ()) if find_spec(package) is None]
    if missing:
        raise UserError(f"--format {file_format} takes {' and '.join(missing)}: pip install {' '.join(missing)}")


def _compared(
    path: Path,
    place: Path,
    images: LabeledImages,
    expected: Array,
    about: dict[str, Any],
    quantize: str | None,
    model: str | None,
) -> Exported:
    logits = _logits_of(open_student(path, model=model), images)
    labels, decisions = np.asarray(images.labels), logits.argmax(axis=1)
    return Exported(
        path=place,
        megabytes=path.stat().st_size / 1e6,
        images=len(logits),
        difference=float(np.abs(logits - expected).max()),
        agreement=float((decisions == expected.argmax(axis=1)).mean()),
        accuracy=float((decisions == labels).mean()),
        checkpoint_accuracy=float((expected.argmax(axis=1) == labels).mean()),
        quantized=quantize,
        about=about,
    )


def answer_images(path: str | Path, images: LabeledImages, *, keep: Path, model: str | None = None) -> None:
    """Ask a student in a file about images, and write what it said of each.

    Args:
        path: The file.
        images: The images; their classes are matched with the student's by name.
        keep: The file to write to, as :func:`kd.training.predictions.write_predictions` does.
        model: The network, where the file names a Python file.

    Raises:
        UserError: If the file can't be read, or the images have a class that it does not know.
    """
    student = open_student(path, model=model)
    images = match_classes(images, student.about["classes"], network=str(path))
    write_predictions(prediction_arrays(images, _logits_of(student, images), np.arange(len(images))), keep)


def _as_student(classifier: Classifier) -> Student:
    def logits(images: Array) -> Array:
        with torch.no_grad():
            answer: Array = classifier(torch.from_numpy(images)).float().numpy()
        return answer

    return Student(classifier.description.plain(), logits)


def _logits_of(student: Student, images: LabeledImages) -> Array:
    """Ask a student about all images; return its logits ``(N, C)``."""
    about = student.about
    batches = _batches(images, range(len(images)), int(about["image_size"]), str(about["resize"]))
    return np.concatenate([student.logits(batch) for batch in batches])


def _batches(images: LabeledImages, indices: Sequence[int], size: int, resize: str) -> Iterator[Array]:
    view = plain_view(size, resize)
    for start in range(0, len(indices), _AT_ONCE):
        seen = torch.stack([view(images.load(index)) for index in indices[start : start + _AT_ONCE]])
        yield seen.float().div(255).contiguous().numpy()


def _write_onnx(classifier: Classifier, about: dict[str, Any], path: Path) -> None:
    import onnx

    with _quietly():
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
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(about)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_exported(classifier: Classifier, about: dict[str, Any], path: Path) -> None:
    with _quietly():
        program = torch.export.export(
            classifier, (_example(classifier),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": json.dumps(about)})


def _write_safetensors(classifier: Classifier, about: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    save_file(state, path, metadata={METADATA_KEY: json.dumps(about)})


_WRITERS = {"onnx": _write_onnx, "torch": _write_exported, "safetensors": _write_safetensors}


def _example(classifier: Classifier) -> torch.Tensor:
    # Two, as a dimension of one would be taken for one that is always so.
    size = classifier.description.image_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _quantize(whole: Path, small: Path, training: LabeledImages, about: dict[str, Any]) -> None:
    """Quantize weights and activations to 8 bits, each layer's range measured on training images."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    indices = torch.linspace(0, len(training) - 1, min(_CALIBRATED, len(training))).round().long().tolist()
    batches = _batches(training, indices, int(about["image_size"]), str(about["resize"]))

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
        def get_next(self) -> dict[str, Array] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch}

    prepared = small.with_suffix(".prepared")
    with _quietly():
        quant_pre_process(str(whole), str(prepared))
        quantize_static(
            str(prepared),
            str(small),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    prepared.unlink()
    model = onnx.load(small)
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(about)})
    onnx.save(model, small)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what exporters say about their own workings; what they raise is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
