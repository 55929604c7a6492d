"""The Optuna study that the workers of a sweep share."""

import errno
import re
import warnings
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from kd.errors import UserError
from kd.randomness import derive_seed
from kd.sweep.plan import Plan

_DEFINITION = "definition"
# For a trial that kills its workers, for example because it runs out of memory.
_MAX_RETRY = 2
_DRIVERS = {"postgresql": ("psycopg", "psycopg[binary]"), "mysql": ("pymysql", "pymysql")}
"""Driver of a kind of database, and the package that it comes from."""


class SeededTPESampler(optuna.samplers.TPESampler):
    """TPE with a random seed for each trial: a draw depends on the trial's number, not on the worker."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._search_seed = seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Reset the random generators."""
        super().__init__(seed=derive_seed(self._search_seed, trial.number) % 2**32)
        super().before_trial(study, trial)


def open_study(plan: Plan, storage: str | None = None) -> optuna.Study:
    """Open the study of a sweep, or create it; another definition of a sweep of this name is an error."""
    shown = str(plan.folder / "sweep.db") if storage is None else f"--storage {redacted(storage)}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            study_name=plan.folder.name,
            storage=_open_storage(plan, storage),
            direction="maximize",
            load_if_exists=True,
            sampler=SeededTPESampler(plan.sampler_seed),
            pruner=optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner(),
        )
    except (SQLAlchemyError, OptunaError, ImportError, OSError, ValueError, RuntimeError) as error:
        reason = redacted(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UserError(f"{shown}: can't open this database: {reason}{_explain(storage, error)}") from None
    new = plan.definition()
    old: dict[str, Any] = study.user_attrs.get(_DEFINITION, new)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if names:
        changes = "; ".join(f"{name} was {old.get(name)} and is now {new.get(name)}" for name in names)
        problem = f"the sweep was started with other settings: {changes}; restore them, or change the name"
        raise UserError(f"{plan.file}: {problem}")
    study.set_user_attr(_DEFINITION, new)
    return study


def redacted(text: str) -> str:
    """Return a URL, or a message that quotes one, without user and password."""
    return re.sub(r"(?i)((?:user|password|passwd|pwd)=)[^&\s]*", r"\1...", re.sub(r"//[^/\s]*@", "//...@", text))


def _explain(storage: str | None, error: Exception) -> str:
    """Return which package is missing, or which storages there are."""
    scheme = (storage or "").partition("://")[0].partition("+")[0]
    # Optuna replaces the error of the import by one of its own.
    missing = isinstance(error, ImportError) or "Failed to import DB access module" in str(error)
    if missing and scheme in _DRIVERS:
        return f"; install the driver: pip install '{_DRIVERS[scheme][1]}'"
    if storage is not None and scheme not in (*_DRIVERS, "sqlite"):
        return (
            f"; there are: the path of a journal file (journal.log), sqlite:///FILE, {', '.join(_DRIVERS)}://HOST/NAME"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS):
        return "; this file system has no locks: choose another folder"
    return ""


def _open_storage(plan: Plan, storage: str | None) -> BaseStorage:
    if storage is not None and "://" not in storage:
        return JournalStorage(JournalFileBackend(storage))
    url = storage or f"sqlite:///{(plan.folder / 'sweep.db').resolve()}"
    scheme, _, rest = url.partition("://")
    if scheme in _DRIVERS:
        url = f"{scheme}+{_DRIVERS[scheme][0]}://{rest}"
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        return RDBStorage(
            url,
            # SQLite: seconds to wait for another worker's write. Elsewhere a connection is tried before it is used, as
            # the server may have been restarted.
            engine_kwargs={"connect_args": {"timeout": 600}} if scheme == "sqlite" else {"pool_pre_ping": True},
            heartbeat_interval=plan.lost_after // 6,
            grace_period=plan.lost_after,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_MAX_RETRY),
        )
