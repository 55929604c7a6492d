"""Writing checkpoints that survive a crash, and reading them without running code."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from kd.errors import UserError
from kd.files import write_atomically
from kd.models import read_plain


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; reads plain values and tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ANN401, ARG002 (Lightning's signature)
        """Write a checkpoint; after a crash, the file is the old one or the new one.

        Raises:
            UserError: If it can't be written, such as on a full disk.
        """
        path = Path(path)
        try:
            with write_atomically(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's writer reports a full disk as a RuntimeError of its own.
            kept = f"; the previous one is intact: {path}" if path.is_file() else ""
            raise UserError(f"can't write the checkpoint {path}: {_reason(error)}{kept}") from error

    def load_checkpoint(
        self,
        path: Any,  # noqa: ANN401
        map_location: Any = None,  # noqa: ANN401, ARG002
        weights_only: bool | None = None,  # noqa: ARG002, FBT001
    ) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only=True``.

        Raises:
            UserError: If it can't be read, or holds more than plain values and tensors.
        """
        checkpoint: dict[str, Any] = read_plain(Path(path))
        return checkpoint


def _reason(error: Exception) -> str:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return cause.strerror or str(cause) if isinstance(cause, OSError) else str(cause).splitlines()[0]
