"""What nobody may see, on the GPU: the CPU's tests."""

from test_hidden_values import (  # noqa: F401  (collected here with this folder's fixtures)
    test_a_bad_key_behind_the_diagonal_of_a_whole_block,
    test_a_result_is_as_large_as_float32_lets_it_be,
    test_what_no_query_sees_is_nowhere,
    test_what_some_query_sees_is_in_its_result_and_in_no_other_block,
)
