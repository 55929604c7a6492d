import torch

from kd.randomness import derive_seed, seeded


def test_seeds_depend_on_each_part_and_its_type() -> None:
    parts: list[tuple[int | str, ...]] = [(0,), (1,), ("0",), (0, 0), (0, "a"), ("a", 0)]
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_on_every_machine() -> None:
    # A change of the derivation would change every published result.
    assert derive_seed(0, "view", 3, "ant/0.png") == 7049208428974907542


def test_boundaries_between_parts_matter() -> None:
    assert derive_seed("ab", "c") != derive_seed("a", "bc")


def test_a_seeded_block_is_reproducible_and_restores_the_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, "x"):
        first = torch.rand(3)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    with seeded(1, "x"):
        torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)
