"""What the settings ask for that streams of images can't give."""

from kd.errors import UserError
from kd.settings import DataSettings


def check_streaming(wanted: DataSettings) -> None:
    """Refuse what takes images that are at hand one by one.

    Raises:
        UserError: If the settings ask for it.
    """
    no_part = "a stream is read as a whole; make shards of the part that is meant"
    no_store = "nothing of a stream is stored; leave it out"
    refused = (
        ("train_fraction", wanted.train_fraction < 1, no_part),
        ("teacher_train_fraction", wanted.teacher_train_fraction < 1, no_part),
        ("unlabeled_rest", wanted.unlabeled_rest, no_part),
        ("unlabeled_data", wanted.unlabeled_data is not None, "images of a folder can't be mixed into a stream"),
        ("image_cache", wanted.image_cache not in ("auto", "none"), no_store),
        ("teacher_cache", wanted.teacher_cache not in ("auto", "none"), no_store),
        ("teacher_top", wanted.teacher_top is not None, no_store),
        ("augment_on", wanted.augment_on == "device", "views of streamed images are cut out by the workers"),
    )
    for name, is_asked_for, why in refused:
        if is_asked_for:
            given = getattr(wanted, name)
            flag = f"--{name}" if given is True else f"--{name} {given}"
            raise UserError(f"--dataset webdataset {flag}: {why}")
