"""One thread for small matrices."""

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from sknode._blas import one_thread


def blas_threads():
    return [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]


@pytest.fixture
def two_threads():
    """Let BLAS have two threads, whatever the machine has."""
    with threadpool_limits(2, user_api="blas"):
        assert set(blas_threads()) == {2}
        yield


def test_the_setting_is_restored(two_threads):
    before = threadpool_info()
    with pytest.raises(ValueError, match="within"), one_thread:
        assert set(blas_threads()) == {1}
        raise ValueError("within")
    assert threadpool_info() == before


def test_the_last_one_to_leave_restores_the_setting(two_threads):
    one_thread.__enter__()
    one_thread.__enter__()
    one_thread.__exit__()
    assert set(blas_threads()) == {1}
    one_thread.__exit__()
    assert set(blas_threads()) == {2}
