"""The CUDA kernels of page bounds, page scores and the choice of pages, emulated: the CPU's tests."""

import pytest
from emulated import cuda_kernels
from test_page_bounds import (  # noqa: F401
    test_a_cache_has_the_bounds_of_its_stored_keys,
    test_a_nan_makes_both_bounds_of_its_channel_nan,
    test_heads_of_unequal_length_have_zeros_behind_their_pages,
    test_rounding_outward_of_hard_numbers,
)
from test_page_bounds import test_values as test_bounds  # noqa: F401
from test_page_scores import test_no_score_of_the_page_is_above_its_bound as check_upward
from test_page_scores import (  # noqa: F401
    test_page_counts_and_lengths,
    test_the_largest_over_queries_and_heads,
    test_what_is_not_known_must_be_read,
)
from test_page_scores import test_values as test_scores  # noqa: F401
from test_select_pages import (  # noqa: F401
    test_all_none_and_what_is_behind,
    test_equal_scores_are_taken_in_order,
    test_infinities_and_nan,
    test_sinks_come_first,
)
from test_select_pages import test_values as test_choice  # noqa: F401


@pytest.fixture(autouse=True)
def _emulated():
    with cuda_kernels("page_bounds", "page_bounds_paged", "page_scores", "select_pages"):
        yield


@pytest.mark.parametrize("scale", [0.1, -0.3])
def test_no_score_of_the_page_is_above_its_bound(scale):
    """A GPU takes no denormal numbers for 0, whatever the CPU's threads do."""
    check_upward(False, scale)
