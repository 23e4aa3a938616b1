import numpy as np

from mnist_flax import batches


def test_an_epoch_has_every_example_once_and_pads_the_last_batch():
    rows = batches.train_batches(seed=3, epoch=0, num_examples=60_000, batch_size=64)
    assert rows.shape == (938, 64) and rows.dtype == np.int32
    assert (rows[-1, 32:] == -1).all()
    assert (rows.ravel()[:60_000] >= 0).all()
    np.testing.assert_array_equal(np.sort(rows.ravel()[:60_000]), np.arange(60_000))


def test_order_depends_on_seed_and_epoch_alone():
    first = batches.train_batches(3, 1, 1000, 100)
    np.testing.assert_array_equal(first, batches.train_batches(3, 1, 1000, 100))
    for other in (batches.train_batches(3, 2, 1000, 100), batches.train_batches(4, 1, 1000, 100)):
        assert (first != other).mean() > 0.9


def test_order_is_the_same_in_every_version():
    # A resumed run meets the examples in the order in which it began: a change here, by this
    # package or by NumPy, would break that silently.
    np.testing.assert_array_equal(
        batches.train_batches(7, 2, 10, 4), [[1, 5, 3, 4], [6, 9, 0, 8], [2, 7, -1, -1]]
    )


def test_scoring_takes_every_example_in_order():
    np.testing.assert_array_equal(batches.eval_batches(5, 3), [[0, 1, 2], [3, 4, -1]])
    np.testing.assert_array_equal(batches.eval_batches(4, 2), [[0, 1], [2, 3]])
