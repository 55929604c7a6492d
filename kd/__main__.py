"""The command ``kd``, also run by ``python -m kd``."""

import sys


def main() -> int:
    """Run the ``kd`` command; return the exit status."""
    if sys.argv[1:2] == ["predict"]:
        # Imports nothing else: an ONNX file needs only onnxruntime, numpy and Pillow.
        from kd.deploy.prediction import main as predict

        return predict(sys.argv[2:])
    from kd.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
