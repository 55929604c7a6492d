"""``kd``, and ``python -m kd``."""

import sys


def main() -> int:
    """Run the ``kd`` command; return the exit status."""
    if sys.argv[1:2] == ["predict"]:
        # Before anything else is imported: with an ONNX file it takes onnxruntime, numpy and Pillow alone.
        from kd.deploy.prediction import main as predict

        return predict(sys.argv[2:])
    from kd.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
