import numpy as np
import onnx_ir as ir
import pytest

from echoatt_exporter.graph.roles import (
    Kind,
    Part,
    Use,
    add_use,
    is_weight,
    join_roles,
    role_of,
    set_role,
    take_columns,
    unite_roles,
)


def weight(array):
    return ir.Value(name="w", const_value=ir.tensor(array))


def part(columns, *uses):
    return Part(frozenset(Use(*use) for use in uses), columns)


Q, K, V = ((kind, 3) for kind in (Kind.QUERIES, Kind.KEYS, Kind.VALUES))


def test_a_role_is_kept_as_metadata_and_can_be_taken_away():
    value = weight(np.ones((2, 6), np.float32))
    assert role_of(value) == ()
    role = (part(2, Q), part(1, K, V), part(3))
    set_role(value, role)
    assert role_of(value) == role
    set_role(value, ())
    assert role_of(value) == ()
    assert not value.metadata_props


def test_neighbours_of_one_use_are_one_part():
    value = weight(np.ones(6, np.float32))
    set_role(value, [part(1, Q), part(2, Q), part(1, K), part(2, Q)])
    assert role_of(value) == (part(3, Q), part(1, K), part(2, Q))


def test_uses_are_added_column_by_column():
    value = weight(np.ones((2, 6), np.float32))
    add_use(value, Use(*Q), 6, np.array([1, 1, 0, 0, 1, 1], bool))
    assert role_of(value) == (part(2, Q), part(2), part(2, Q))
    add_use(value, Use(*V), 6, np.array([0, 1, 1, 0, 0, 0], bool))
    assert role_of(value) == (part(1, Q), part(1, Q, V), part(1, V), part(1), part(2, Q))
    add_use(value, Use(Kind.NORM), 6)
    assert all(Use(Kind.NORM) in found.uses for found in role_of(value))


def test_roles_are_cut_joined_and_united():
    role = (part(2, Q), part(2, K), part(2, V))
    value = weight(np.ones((2, 3), np.float32))
    set_role(value, take_columns(role, np.array([1, 4, 5])))
    assert role_of(value) == (part(1, Q), part(2, V))
    assert take_columns((), np.array([1])) == ()
    assert join_roles([(role, 6), ((), 3), ((part(4, Q),), 4)]) == (*role, part(3), part(4, Q))
    table = (part(6, (Kind.EMBEDDING, None)),)
    assert unite_roles(table, (part(6, (Kind.HEAD, None)),)) == (
        part(6, (Kind.EMBEDDING, None), (Kind.HEAD, None)),
    )
    assert unite_roles(table, (part(5, Q),)) == ()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones(2, np.float32), True),
        (np.ones(2, np.float16), True),
        (np.ones((2, 1, 16), np.uint8), True),
        (np.ones((), np.float32), False),
        (np.ones(1, np.float32), False),
        (np.ones(4, np.int64), False),
        (np.ones(4, bool), False),
    ],
)
def test_constants_of_shapes_and_factors_are_no_weights(array, expected):
    assert is_weight(weight(array)) is expected
