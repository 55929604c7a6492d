"""Where a teacher's outputs come from: a frozen network, an ensemble, or stored logits; and loading teachers."""

from kd.teachers.frozen import FrozenTeacher
from kd.teachers.loading import check_classes, is_no_better_than_chance, load_teacher, majority_share
from kd.teachers.logit_store import LogitStore, digest_of_weights, verify_store
