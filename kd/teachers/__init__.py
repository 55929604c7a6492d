"""Where a teacher's outputs come from: a frozen network, an ensemble, or stored logits; and loading teachers."""

from kd.teachers.frozen import FrozenTeacher
from kd.teachers.loading import (
    NONE,
    Foreign,
    depends_on_class,
    is_no_better_than_chance,
    load_network,
    load_teacher,
    majority_share,
    match_teacher,
    ranks_by_class,
)
from kd.teachers.logit_store import LogitStore, digest_of_weights, verify_store
from kd.teachers.stored_logits import StoredLogits, has_stored_logits
