"""Where a teacher's outputs come from: a frozen network, several as one, or stored logits."""

from kd.teachers.frozen import FrozenTeacher
from kd.teachers.logit_store import LogitStore, digest_of_weights

__all__ = ["FrozenTeacher", "LogitStore", "digest_of_weights"]
