"""Space, Vector and Basis against flat NumPy arrays, for every way in which leaves can be stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from helpers import share_buffers
from hypergrad._basis import Basis
from hypergrad._tree import check_distinct, flatten
from hypergrad._vector import Space, Vector

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def strided(seed: int) -> list[torch.Tensor]:
    image = draw(2, 3, 4, 5, seed=seed).contiguous(memory_format=torch.channels_last)
    return [draw(4, 3, seed=seed).T, image, draw(12, seed=seed)[::2], draw(1, 3, seed=seed).expand(4, 3)]


@dataclass(frozen=True)
class Layout:
    """Trees of one structure, and into how many chunks they go where leaves above `small` elements are large."""

    make: Callable[[int], Any]
    chunks: int
    batch_dims: int = 0
    small: int | None = None


def lot(*shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> Callable[[int], list[torch.Tensor]]:
    kinds = dtypes or (F64,) * len(shapes)
    return lambda seed: [draw(*s, seed=seed + i, dtype=d) for i, (s, d) in enumerate(zip(shapes, kinds, strict=True))]


LAYOUTS = {
    "a tensor": Layout(lambda seed: draw(7, seed=seed), 1),
    "a 0-d tensor": Layout(lambda seed: draw(seed=seed), 1),
    "one leaf": Layout(lambda seed: {"w": draw(3, 4, seed=seed)}, 1),
    "many small leaves": Layout(lot((3, 2), (), (5,), (1, 1), (2, 2, 2)), 1),
    "large and small": Layout(lot((40,), (3,), (5, 10), (2, 2), ()), 3, small=8),
    "all large": Layout(lot((40,), (5, 10)), 2, small=8),
    "with an empty leaf": Layout(lot((2,), (0,), (0, 3), ()), 1),
    "mixed dtypes": Layout(lot((4,), (3, 2), (5,), dtypes=(F64, torch.float32, F64)), 2),
    "half": Layout(
        lot((5,), (4,), (3,), (2,), dtypes=(torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)), 3
    ),
    "bfloat16 alone": Layout(lot((5,), (4, 2), dtypes=(torch.bfloat16,) * 2), 1),
    "strided": Layout(strided, 1),
    "strided, large": Layout(strided, 4, small=1),
    "nested": Layout(lambda seed: {"b": (draw(2, seed=seed), [draw(3, seed=seed)]), "a": draw(1, 4, seed=seed)}, 1),
    "batch": Layout(lot((4, 3), (4,), (4, 2, 2)), 1, batch_dims=1),
    "batch, large and small": Layout(lot((4, 30), (4,), (4, 5, 5), (4, 2)), 3, batch_dims=1, small=10),
    "batch of one": Layout(lot((1, 3), (1,)), 1, batch_dims=1),
    "two batch axes": Layout(lot((2, 3, 4), (2, 3), (2, 3, 2, 2)), 1, batch_dims=2),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch) -> Layout:
    chosen = LAYOUTS[request.param]
    if chosen.small is not None:
        share_buffers(monkeypatch, chosen.small, chosen.small)
    return chosen


def dense(leaves: list[torch.Tensor], batch: tuple[int, ...]) -> np.ndarray:
    """All leaves as one float64 array [*batch, n]."""
    return np.concatenate(
        [leaf.double().reshape(*batch, leaf.numel() // max(np.prod(batch, dtype=int), 1)) for leaf in leaves], -1
    )


def numbers(v: Vector) -> np.ndarray:
    return dense(v.leaves, v.space.batch_shape)


def pair(layout: Layout) -> tuple[Vector, Vector, np.ndarray, np.ndarray]:
    """Two vectors and the same as arrays."""
    trees = layout.make(0), layout.make(50)
    space = Space(*flatten(trees[0], "b"), layout.batch_dims)
    x, y = (space.vector(tree, "x").copy() for tree in trees)
    return x, y, *(dense(optree.tree_leaves(tree), space.batch_shape) for tree in trees)


def close(value: Vector | torch.Tensor, truth: np.ndarray, space: Space, ulps: float = 4) -> None:
    """Within some units of the coarsest dtype for vectors, of the widest one for scalars."""
    eps = space.eps if isinstance(value, Vector) else torch.finfo(space.dtype).eps
    new = numbers(value) if isinstance(value, Vector) else value.double().numpy()
    assert new.shape == np.shape(truth)
    assert np.all(np.abs(new - truth) <= ulps * eps * np.max(np.abs(truth), initial=1e-300))


def test_storage_and_round_trip(layout):
    tree = layout.make(0)
    space = Space(*flatten(tree, "b"), layout.batch_dims)
    v = space.vector(tree, "b")
    assert len(v.chunks) == layout.chunks
    assert optree.tree_structure(v.tree) == optree.tree_structure(tree)
    for new, old in zip(v.leaves, optree.tree_leaves(tree), strict=True):
        assert new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
    assert space.length * max(np.prod(space.batch_shape, dtype=int), 1) == sum(
        t.numel() for t in optree.tree_leaves(tree)
    )
    assert v.flat().shape == (*space.batch_shape, space.length) and v.flat().dtype == space.dtype
    assert all(torch.equal(a, b) for a, b in zip(space.from_flat(v.flat()).leaves, v.leaves, strict=True))
    assert not space.zeros().flat().any() and not v.zeros().flat().any()
    assert "Vector(" in repr(v)


def test_arithmetic(layout):
    x, y, a, b = pair(layout)
    space = x.space
    per_system = torch.linspace(-1.5, 2.0, max(space.batch_shape.numel(), 1), dtype=space.dtype).reshape(
        space.batch_shape
    )
    close(x + y, a + b, space)
    close(x - y, a - b, space)
    close(-x, -a, space)
    close(x.copy(), a, space)
    for scalar in (1.75, per_system):
        s = scalar if isinstance(scalar, float) else per_system.double().numpy()[..., None]
        close(x * scalar, a * s, space)
        close(scalar * x if isinstance(scalar, float) else x * scalar, a * s, space)
        close(x / scalar, a / s, space)
        for sign in (1.0, -1.0):
            close(x.copy().add_(y, scalar, sign), a + sign * s * b, space)
        close(x.copy().scale_(scalar), a * s, space)
    close(x.copy().add_(y), a + b, space)
    s = per_system.double().numpy()[..., None]
    close(x.copy().scale_add_(per_system, y), s * a + b, space)
    close(x, a, space, 0)
    close(y, b, space, 0)
    assert all(leaf.dtype == dtype for leaf, dtype in zip((x + y * 2.0).leaves, space.dtypes, strict=True))


def test_operations_in_place_write_and_return_the_vector(layout):
    x, y, _, _ = pair(layout)
    one = torch.ones(x.space.batch_shape, dtype=x.space.dtype)
    memory = [chunk.data_ptr() for chunk in x.chunks]
    assert x.add_(y) is x and x.scale_(0.5) is x and x.scale_add_(one, y) is x
    assert [chunk.data_ptr() for chunk in x.chunks] == memory
    assert all(x.copy().chunks[i].data_ptr() != m for i, m in enumerate(memory) if x.chunks[i].numel())


def test_reductions_are_of_each_system_in_the_widest_dtype(layout):
    x, y, a, b = pair(layout)
    assert x.dot(y).dtype == x.space.dtype and x.dot(y).shape == x.space.batch_shape
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    eps = torch.finfo(x.space.dtype).eps if torch.float32 not in x.space.dtypes else torch.finfo(torch.float32).eps
    assert np.all(np.abs(x.dot(y).double().numpy() - np.sum(a * b, -1)) <= 8 * eps * size)
    np.testing.assert_allclose(x.norm().double(), np.linalg.norm(a, axis=-1), rtol=8 * eps)
    largest = np.abs(a).max(-1)
    assert np.all(x.scale().numpy() <= largest) and np.all(largest < 2 * x.scale().numpy())
    assert np.all(np.log2(x.scale().numpy()) % 1 == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(dtype):
    x = Vector.of([torch.ones(1)], "x")  # float32 reference
    tree = [torch.full((3000,), 300.0, dtype=dtype), torch.ones(5, dtype=dtype)]
    v = Vector.of(tree, "x")
    assert v.dot(v).dtype == x.dot(x).dtype == torch.float32
    np.testing.assert_allclose(v.dot(v), 3000 * 300.0**2 + 5, rtol=1e-6)  # float16 ends at 65504


@pytest.mark.parametrize("entries", [[0.0, 0.0], [0.0, np.inf], [np.nan, 1.0], [1e-300, 0.0], [3.0, -5e300]])
def test_scale_is_a_power_of_two_or_one(entries):
    tree = torch.tensor(entries, dtype=F64)
    scale = float(Vector.of(tree, "b").scale())
    largest = np.max(np.abs(entries))
    assert scale == (2.0 ** np.floor(np.log2(largest)) if 0 < largest < np.inf else 1.0)


@pytest.mark.parametrize("read", [float, lambda size: size])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_what_is_tiny_can_be_scaled(dtype, read):
    """The inverse of the scale is finite: float16 has numbers down to 6e-8, and ends at 65504."""
    tree = torch.tensor([1.0, -0.5, 0.0], dtype=dtype) * 2 * torch.finfo(dtype).smallest_normal / 16
    v = Vector.of(tree, "b")
    scaled = v.copy().scale_(1 / v.scale(read)).tree.double()
    assert torch.equal(scaled / scaled[0], torch.tensor([1.0, -0.5, 0.0], dtype=F64)) and 0 < scaled[0] < 2


def test_scale_of_an_empty_vector_is_one():
    tree = torch.zeros(0, dtype=F64)
    v = Vector.of(tree, "b")
    assert v.scale() == 1 and v.norm() == 0


def test_random_is_reproducible_and_of_the_space(layout):
    x, *_ = pair(layout)
    draws = [numbers(x.random(torch.Generator().manual_seed(seed))) for seed in (3, 3, 4)]
    assert np.array_equal(draws[0], draws[1])
    assert draws[0].shape == numbers(x).shape and not np.array_equal(draws[0], draws[2])


def test_basis(layout):
    x, y, a, b = pair(layout)
    space = x.space
    basis = Basis(x, 3)
    basis[0], basis[1], basis[2] = x, x.zeros(), y
    rows = np.stack([a, 0 * a, b], -2)
    close(basis[0], a, space, 0)
    close(basis[2], b, space, 0)
    eps, size = space.eps if space.eps > 1e-6 else 1e-7 if torch.float32 in space.dtypes else 1e-15, np.abs(rows).max()
    products = np.einsum("...mn,...n->...m", rows, b)
    n = max(space.length, 1)
    np.testing.assert_allclose(basis.coefficients(y, 3).double(), products, rtol=0, atol=4 * n * eps * size**2)
    np.testing.assert_allclose(basis.coefficients(y, 1).double(), products[..., :1], rtol=0, atol=4 * n * eps * size**2)
    weights = torch.tensor([0.5, 7.0, -2.0], dtype=space.dtype).expand(*space.batch_shape, 3)
    np.testing.assert_allclose(numbers(basis.combine(weights)), 0.5 * a - 2 * b, rtol=0, atol=8 * eps * size)
    np.testing.assert_allclose(numbers(basis.combine(weights[..., :1])), 0.5 * a, rtol=0, atol=8 * eps * size)
    assert basis.matrix().shape == (*space.batch_shape, 3, space.length)
    stacked = basis.leaves()
    assert [leaf.shape for leaf in stacked] == [(3, *shape) for shape in space.shapes]
    again = basis.with_leaves(stacked)
    assert torch.equal(again.matrix(), basis.matrix())
    assert torch.equal(Basis.from_rows(x, basis.matrix()).matrix(), basis.matrix())
    np.testing.assert_allclose(numbers(basis.plus(again, -0.5)[2]), 0.5 * b, rtol=0, atol=4 * eps * size)


def test_rows_of_a_basis_may_be_shared_by_all_systems():
    tree = draw(4, 3)
    like = Vector.of(tree, "b", 1)
    rows = draw(2, 3)
    assert torch.equal(Basis.from_rows(like, rows).matrix(), rows.expand(4, 2, 3))


shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, small=st.integers(0, 20), total=st.integers(0, 60), data=st.data())
def test_any_storage_holds_the_same_numbers(shapes, small, total, data):
    dtypes = data.draw(st.lists(st.sampled_from([F64, torch.float32]), min_size=len(shapes), max_size=len(shapes)))
    tree = [draw(*s, seed=i, dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    with pytest.MonkeyPatch.context() as patch:
        share_buffers(patch, small, total)
        v = Vector.of(tree, "b")
    a = dense(tree, ())
    assert np.array_equal(numbers(v), a)
    np.testing.assert_allclose(v.norm(), np.linalg.norm(a), rtol=1e-6)
    assert np.array_equal(numbers(v.space.from_flat(v.flat())), a)
    assert np.array_equal(numbers(v + v), 2 * a)


LIKE = {"w": draw(2, 3), "rest": [draw(4), draw()]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"w": draw(2, 3), "rest": [draw(4)]},
            r"x must have the structure of b: 2 leaves instead of 3.*: \['rest'\]\[1\]",
        ),
        (
            {"w": draw(2, 3), "last": [draw(4), draw()]},
            r"x must have the structure of b.*\['last'\]\[0\].*\['rest'\]\[1\]",
        ),
        (draw(2, 3), r"x must have the structure of b: 1 leaves instead of 3.*\(a single tensor\)"),
        (
            {"w": draw(3, 2), "rest": LIKE["rest"]},
            r"x\['w'\] must be like b\['w'\]: expected shape \(2, 3\), .*got shape \(3, 2\)",
        ),
        (
            {"w": draw(2, 3), "rest": [draw(4), draw(1)]},
            r"x\['rest'\]\[1\] must be like b\['rest'\]\[1\]: .*shape \(\), .*shape \(1,\)",
        ),
        ({"w": draw(2, 3).float(), "rest": LIKE["rest"]}, r"x\['w'\].*expected .*float64 on cpu, got .*float32 on cpu"),
        ({"w": draw(2, 3).to("meta"), "rest": LIKE["rest"]}, r"x\['w'\].*float64 on cpu, got .*float64 on meta"),
    ],
)
def test_check_names_the_leaf(tree, message):
    with pytest.raises(ValueError, match=message):
        Space(*flatten(LIKE, "b")).check(tree, "x")


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ([draw(2), 3.0], TypeError, r"b\[1\] must be a floating point tensor, got float"),
        ({"n": torch.arange(3)}, TypeError, r"b\['n'\] must be a floating point tensor, got one of dtype torch.int64"),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, r"b\[0\] must be .*complex64"),
        (
            list(torch.nn.Linear(2, 2).named_parameters()),
            TypeError,
            r"b\[0\]\[0\] must be a floating point tensor, got str; give named_parameters\(\) as a dict",
        ),
        (torch.nn.Linear(2, 2), TypeError, r"b must be a floating point tensor, got Linear; pass its parameters\(\)"),
        ([], ValueError, "b holds no tensor"),
        ({"a": []}, ValueError, "b holds no tensor"),
        (iter(()), ValueError, "b holds no tensor"),
    ],
)
def test_flatten_names_what_is_no_tensor(tree, error, message):
    with pytest.raises(error, match=message):
        flatten(tree, "b")


@pytest.mark.parametrize("tree", [[draw(4, 3), draw(5)], [draw(4, 3), draw()]])
def test_batch_axis_must_be_the_same_everywhere(tree):
    with pytest.raises(ValueError, match=r"batch_dims=1 .*b\[0\] has shape \(4, 3\) and b\[1\] has"):
        Space(*flatten(tree, "b"), 1)


def test_negative_batch_dims_are_refused():
    with pytest.raises(ValueError, match="batch_dims must be"):
        Space(*flatten(draw(3), "b"), -1)


def test_lists_tuples_and_generators_are_the_same():
    tree = [draw(2), draw(3, 1)]
    for space in (
        Space(*flatten(tree, "b")),
        Space(*flatten(tuple(tree), "b")),
        Space(*flatten((t for t in tree), "b")),
    ):
        for like in (tree, tuple(tree), (t for t in tree), iter(tree)):
            assert np.array_equal(numbers(space.vector(like, "x")), dense(tree, ()))
    model = torch.nn.Linear(3, 2)
    space = Space(*flatten(model.parameters(), "params"))
    assert [*space.paths] == ["params[0]", "params[1]"] and isinstance(space.zeros().tree, list)
    assert space.vector(model.parameters(), "x").norm() > 0


def test_a_vector_of_given_tensors_has_no_graph():
    tree = [draw(3).requires_grad_(), draw(2)]
    assert not any(leaf.requires_grad for leaf in Vector.of(tree, "b").leaves)


def test_check_distinct_names_both_places():
    x = draw(2)
    check_distinct([x, draw(2)], ["p[0]", "p[1]"])
    with pytest.raises(ValueError, match=r"p\[0\] and p\[2\] are the same tensor"):
        check_distinct([x, draw(2), x], ["p[0]", "p[1]", "p[2]"])


@pytest.fixture
def mesh(tmp_path):
    """One process as a mesh of its own."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_leaves(mesh):
    """DTensor leaves: Vector's arithmetic, and the solvers that need no basis give the plain numbers."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    plain = {"bias": draw(3), "weight": draw(4, 3)}
    placed = {
        "bias": distribute_tensor(plain["bias"], mesh, [Replicate()]),
        "weight": distribute_tensor(plain["weight"], mesh, [Shard(0)]),
    }
    scales = {"bias": draw(3, seed=1).sigmoid() + 0.3, "weight": draw(4, 3, seed=1).sigmoid() + 0.3}
    placed_scales = {k: distribute_tensor(v, mesh, placed[k].placements) for k, v in scales.items()}

    def product(diagonal: dict[str, torch.Tensor]) -> hg.operators.LinearOperator:
        def apply(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {k: diagonal[k] * v[k] for k in v}

        return hg.operators.function(apply, apply, symmetric=True)

    space = Space(*flatten(placed, "b"))
    v, w = space.vector(placed, "b"), Vector.of(plain, "b")
    assert len(v.chunks) == 2 and all(isinstance(leaf, DTensor) for leaf in v.leaves)
    assert not isinstance(v.norm(), DTensor)
    np.testing.assert_allclose(v.norm(), w.norm(), rtol=1e-14)
    np.testing.assert_allclose(v.scale(), w.scale(), rtol=0)
    for impossible in (v.flat, space.zeros, lambda: Basis(v, 2)):
        with pytest.raises(TypeError, match="sharded"):
            impossible()
    S = hg.solvers
    methods = (S.CG, S.MINRES, S.BiCGStab, S.LSQR, S.NormalCG, S.FixedPoint, S.Neumann, S.Optimizer)
    for solver, x0 in ((method(max_steps=4), start) for method in methods for start in (None, "x0")):
        starts = (None, None) if x0 is None else (placed_scales, scales)
        sharded, whole = solver(product(placed_scales), placed, starts[0]), solver(product(scales), plain, starts[1])
        np.testing.assert_allclose(sharded.residual_norm, whole.residual_norm, rtol=1e-11)
        for k, value in sharded.value.items():
            assert isinstance(value, DTensor) and value.placements == placed[k].placements
            np.testing.assert_allclose(value.full_tensor(), whole.value[k], rtol=1e-11, atol=1e-13)
    solved = S.CG(rtol=1e-10)(product(placed_scales), placed)
    assert solved.status is S.Status.CONVERGED
    for k, value in solved.value.items():
        np.testing.assert_allclose(value.full_tensor(), plain[k] / scales[k], rtol=0, atol=1e-9)
    for solver in (S.GMRES(), S.Dense(), S.Nystrom()):
        with pytest.raises(TypeError, match="sharded tensors"):
            solver(product(placed_scales), placed)
