import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.pipeline.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from kd.pipeline.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_told_who_holds_the_lock_until_it_is_killed(repository: Path) -> None:
    folder = Path("logs/pets")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"another process is writing to {folder} \(process {process.pid} on "):
            locked(folder).__enter__()
        process.send_signal(signal.SIGKILL)
    with locked(folder):
        pass


def test_files_left_by_a_killed_process_are_removed() -> None:
    left = Path("logs/pets/teacher/version_0/.metrics.json.1234.tmp")
    left.parent.mkdir(parents=True)
    left.touch()
    with locked(Path("logs/pets")):
        assert not left.exists()
    assert sorted(path.name for path in Path("logs/pets").iterdir()) == [".lock", "teacher"]
