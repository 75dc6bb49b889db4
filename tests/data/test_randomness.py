"""Seeds depend on the seed and the purpose, and on nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.core.randomness import derive_seed, generator


def test_a_derived_seed_is_the_same_on_every_machine():
    assert derive_seed(0) == 7210762507766007076
    assert derive_seed(7, "batches", 3) == 1110297247920961467


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**63 - 1), st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3))
def test_seeds_are_in_range_and_differ_by_purpose(seed, purpose):
    assert 0 <= derive_seed(seed, *purpose) < 2**63
    assert derive_seed(seed, *purpose, "more") != derive_seed(seed, *purpose)


def test_types_of_a_purpose_count():
    assert derive_seed(0, 1) != derive_seed(0, "1")


def test_generators_of_one_purpose_draw_the_same():
    draws = [torch.rand(4, generator=generator(1, "values", 2)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(4, generator=generator(1, "values", 3)))
