"""Choosing the maps that an objective compares."""

from kd.errors import UserError
from kd.losses import FeatureLoss, Objective, Pair
from kd.models import Survey


def choose_pairs(objective: Objective, *, student: Survey, teacher: Survey) -> dict[str, list[Pair]]:
    """Choose the maps that each term on features compares: those that it names, or else those that are found.

    Args:
        objective: The objective.
        student: The nodes of the student's network.
        teacher: Of the teacher's.

    Returns:
        Pairs of maps by the name of the term.

    Raises:
        UserError: If there is no such node, a network has no map, or a term names more nodes of one than of the other.
    """
    return {
        term.name: _choose(term.name, term.loss, student, teacher)
        for term in objective.terms
        if isinstance(term.loss, FeatureLoss)
    }


def _choose(name: str, loss: FeatureLoss, student: Survey, teacher: Survey) -> list[Pair]:
    named = loss.nodes("student"), loss.nodes("teacher")
    try:
        ours, theirs = _nodes(named[0], loss, student), _nodes(named[1], loss, teacher)
    except UserError as error:
        raise UserError(f"--loss {name}: {error}") from None
    if not all(named):
        # What was found goes together from the last map on: networks differ in how early they begin to halve.
        count = min(len(ours), len(theirs))
        wanted = max(map(len, named))
        if count < wanted:
            raise UserError(
                f"--loss {name}: {wanted} nodes are named of one network, and {count} can be found of the other"
            )
        ours, theirs = ours[-count:], theirs[-count:]
    if len(ours) != len(theirs):
        raise UserError(
            f"--loss {name}: each of the student's nodes goes with one of the teacher's, and these are {len(ours)} "
            f"({', '.join(ours)}) and {len(theirs)} ({', '.join(theirs)})"
        )
    return [
        Pair(one, other, student.shapes[one], teacher.shapes[other]) for one, other in zip(ours, theirs, strict=True)
    ]


def _nodes(named: list[str], loss: FeatureLoss, survey: Survey) -> list[str]:
    if named:
        return [survey.find(one) for one in named]
    last = survey.last()
    return list(survey.stages) if loss.every_stage else [last]
