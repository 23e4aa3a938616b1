"""Epochs as programs for the devices of a mesh."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnist_flax import shardings
from mnist_flax.loaders import Loader, Piece
from mnist_flax.parallel import BATCH, SEEDS, fetch


def compile_epoch(
    epoch: partial,
    mesh: Mesh,
    carried: Any,
    loader: Loader,
    batch_size: int,
    steps: int,
    length: int,
    *,
    seeds: int = 1,
    donate: bool = False,
) -> Callable[[Any, Piece], Any]:
    """Compiles `steps.train_epoch` or `steps.eval_epoch` for the devices of a mesh.

    With several seeds `carried` and the result have a leading axis of seeds.

    Args:
        epoch: either function with its network bound, called as
            `epoch(carried, images, labels, rows, axis_name=...)`.
        mesh: the devices.
        carried: the epoch's first argument, which may be abstract.
        loader: of the data.
        batch_size: examples a step of one seed, on all devices together.
        steps: steps of the epoch.
        length: steps of a piece; the last one may have fewer.
        seeds: the number of seeds.
        donate: whether `carried` may be overwritten.

    Returns:
        A function of `carried` and a piece.
    """
    jitted = jit_epoch(epoch, mesh, shared=loader.shared, seeds=seeds, donate=donate)
    # Abstract, so that `run` does not keep what it was compiled for.
    carried = jax.eval_shape(lambda carried: carried, carried)

    @cache
    def of_length(n: int) -> Callable[..., Any]:
        return jitted.lower(carried, *loader.abstract(n, seeds, batch_size)).compile()

    for n in {length, steps % length} - {0}:
        of_length(n)

    def run(carried: Any, piece: Piece) -> Any:
        # Where an epoch was begun in pieces of another length, as on another kind of device, what
        # is left of it may end with one that is not compiled yet; this time counts as training.
        return of_length(len(piece.rows))(carried, *piece)

    return run


def jit_epoch(
    epoch: partial, mesh: Mesh, *, shared: bool = True, seeds: int = 1, donate: bool = False
) -> Any:
    """The jitted function that `compile_epoch` compiles, of `carried`, images, labels and rows.

    Args:
        epoch, mesh, seeds, donate: as `compile_epoch` takes them.
        shared: the loader's attribute.
    """
    several = seeds > 1
    by_seed = (SEEDS,) if several else ()
    # Without an axis nothing is summed over devices. XLA would keep the sum over a single one, as a
    # copy with which it fuses nothing; that costs time only where there is one seed.
    axis = BATCH if several or mesh.shape[BATCH] > 1 else None
    state = PartitionSpec(*by_seed)
    examples = PartitionSpec()
    if not shared:
        examples = PartitionSpec((*by_seed, BATCH) if axis else ())
    specs = (state, examples, examples, PartitionSpec(None, by_seed, axis))
    program = partial(_each_seed if several else _one_seed, partial(epoch, axis_name=axis))
    # As it is named in profiles and logs.
    program.__name__ = epoch.func.__name__
    return jax.jit(
        jax.shard_map(
            program,
            mesh=mesh,
            in_specs=specs,
            out_specs=state,
            # `steps` marks its values as varying over the axis of batches only, so that the check
            # would fail with one of seeds.
            check_vma=not several,
        ),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        out_shardings=NamedSharding(mesh, state),
        donate_argnums=0 if donate else (),
    )


def _one_seed(epoch: Callable, carried: Any, images: Any, labels: Any, rows: jax.Array) -> Any:
    return epoch(carried, images, labels, rows[:, 0])


def _each_seed(epoch: Callable, carried: Any, images: Any, labels: Any, rows: jax.Array) -> Any:
    """`epoch` of every seed on this device: at once, or on CPU one after the other.

    There, products with a leading axis of seeds are slower than one after the other, by a third
    where convolutions are wide.
    """

    def one(own: tuple[Any, jax.Array]) -> Any:
        return epoch(own[0], images, labels, own[1])

    return jax.lax.platform_dependent(
        (carried, rows.swapaxes(0, 1)),
        cpu=partial(jax.lax.map, one),
        default=jax.vmap(one, axis_name=shardings.SEED_AXIS),
    )


def run_pieces(
    program: Callable[[Any, Piece], tuple[Any, Any]], carried: Any, pieces: Iterable[Piece]
) -> Iterator[tuple[Any, Any]]:
    """Runs a program that `compile_epoch` made on one piece after the other.

    A piece's metrics come when the next piece, if there is one, is under way, so that the device
    need not wait for the host; it does where the seeds lie in several processes, as gathering their
    metrics comes after that piece.

    Args:
        program: what `compile_epoch` gives.
        carried: the state before the first piece.
        pieces: at least one.

    Yields:
        For each piece the newest state, which is that after the last piece in the end, and the
        metrics of the piece on the host. A program that was compiled with `donate` overwrites the
        state when the next is asked for.
    """
    running = None
    for piece in pieces:
        carried, metrics = program(carried, piece)
        if running is not None:
            yield carried, fetch(running)
        running = metrics
    yield carried, fetch(running)
