"""The sharing plan: reading, writing, and every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.wording import says, whole

from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import PlanError


def test_roles_and_ratio() -> None:
    plan = SharingPlan((0, 1, 1, 1, 4, 4))
    assert plan.num_layers == 6
    assert plan.followers == (2, 3, 5)
    assert plan.shared_sources == (1, 4)
    assert plan.ratio == 0.5
    assert [plan.is_follower(layer) for layer in range(6)] == [
        False,
        False,
        True,
        True,
        False,
        True,
    ]


def test_unshared() -> None:
    plan = SharingPlan.unshared(3)
    assert plan == SharingPlan((0, 1, 2))
    assert (plan.followers, plan.shared_sources, plan.ratio) == ((), (), 0.0)


def test_json_round_trip(tmp_path: Path) -> None:
    plan = SharingPlan((0, 1, 1, 3))
    assert plan.to_json() == '{"format": "echoatt-plan/1", "sources": [0, 1, 1, 3]}\n'
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert SharingPlan.load(tmp_path / "plan.json") == plan


def test_json_may_carry_the_writers_own_keys() -> None:
    text = '{"format": "echoatt-plan/1", "sources": [0, 0], "cost": {"kl": 0.1}}'
    assert SharingPlan.from_json(text) == SharingPlan((0, 0))


def test_head_orders_round_trip_and_are_left_out_where_no_head_moves() -> None:
    plan = SharingPlan((0, 1, 1, 1), ((), (), (2, 3, 1, 0), ()))
    assert json.loads(plan.to_json())["head_orders"] == [[], [], [2, 3, 1, 0], []]
    assert SharingPlan.from_json(plan.to_json()) == plan
    assert [plan.head_order(layer) for layer in (2, 3)] == [(2, 3, 1, 0), ()]
    assert SharingPlan((0, 0), ((), ())) == SharingPlan((0, 0))
    assert "head_orders" not in SharingPlan((0, 0), ((), ())).to_json()
    assert SharingPlan((0, 0)).head_order(1) == ()


@pytest.mark.parametrize(
    "orders", ["null", "{}", "[0, 1]", "[[], [0.0]]", "[[], [true]]", "[[], 1]"]
)
def test_bad_head_orders_in_json_are_refused(orders: str) -> None:
    text = f'{{"format": "echoatt-plan/1", "sources": [0, 0], "head_orders": {orders}}}'
    with pytest.raises(PlanError, match=r'p\.json: "head_orders" must be a list of lists'):
        SharingPlan.from_json(text, "p.json")


@pytest.mark.parametrize(
    ("orders", "fault"),
    [
        (((), (), (2, 3, 0, 1)), None),
        (((), (), (2, 3, 1, 0)), None),
        (((), (1, 0, 2, 3)), "the plan has 3 layers and 2 head orders"),
        (((1, 0, 2, 3), (), ()), "layer 0 has a head order and is not a follower"),
        (((), (), (0, 1)), "layer 2's head order has 2 heads and the model 4"),
        (
            ((), (), (0, 1, 2, 2)),
            "layer 2's head order [0, 1, 2, 2] does not name each of the heads 0 to 3 once",
        ),
        (
            ((), (), (1, 2, 3, 4)),
            "layer 2's head order [1, 2, 3, 4] does not name each of the heads 0 to 3 once",
        ),
        (
            ((), (), (0, 2, 1, 3)),
            "layer 2's head order [0, 2, 1, 3] splits a key/value group: positions 0 to 1 take"
            " heads of groups 0, 1",
        ),
    ],
)
def test_head_orders_must_fit_the_model(
    orders: tuple[tuple[int, ...], ...], fault: str | None
) -> None:
    plan = SharingPlan((0, 1, 1), orders)
    assert plan.faults(["full"] * 3, [4] * 3, [2] * 3) == ([fault] if fault else [])
    assert fault is None or "group" in fault or "model" in fault or plan.faults() == [fault]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"p\.json: not JSON \("),
        ("[0, 1]", r'p\.json: "format" is None, expected "echoatt-plan/1"'),
        ('{"sources": [0]}', '"format" is None'),
        ('{"format": "echoatt-plan/2", "sources": [0]}', "\"format\" is 'echoatt-plan/2'"),
        ('{"format": "echoatt-plan/1"}', '"sources" must be a list of layer numbers'),
        ('{"format": "echoatt-plan/1", "sources": []}', '"sources" must be'),
        ('{"format": "echoatt-plan/1", "sources": {"0": 0}}', '"sources" must be'),
        ('{"format": "echoatt-plan/1", "sources": [0, 0.0]}', '"sources" must be'),
        ('{"format": "echoatt-plan/1", "sources": [0, "0"]}', '"sources" must be'),
        ('{"format": "echoatt-plan/1", "sources": [0, true]}', '"sources" must be'),
        ('{"format": "echoatt-plan/1", "sources": [0, null]}', '"sources" must be'),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=whole(message)) as caught:
        SharingPlan.from_json(text, "p.json")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json: cannot read the sharing plan"):
        SharingPlan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot read the sharing plan"):
        SharingPlan.load(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"format": "\xe9"}')
    with pytest.raises(PlanError, match="cannot read the sharing plan"):
        SharingPlan.load(tmp_path / "latin")


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("3:2,4:2", (0, 1, 2, 2, 2)),
        (" 4 : 0 ", (0, 1, 2, 3, 0)),
        ("2:1,3:1", (0, 1, 1, 1, 4)),
        ("2:2", (0, 1, 2, 3, 4)),
    ],
)
def test_pairs(text: str, sources: tuple[int, ...]) -> None:
    assert SharingPlan.from_pairs(text, 5).sources == sources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a follower:source pair"),
        ("3", "'3' is not a follower:source pair"),
        ("3:2,", "'' is not a follower:source pair"),
        ("3:2:1", "'3:2:1' is not a follower:source pair"),
        ("a:2", "'a:2' is not a follower:source pair"),
        ("3:1.5", "is not a follower:source pair"),
        ("5:2", "follower 5 is outside layers 0 to 4"),
        ("-1:2", "follower -1 is outside layers 0 to 4"),
        ("3:2,3:1", "follower 3 is named twice"),
    ],
)
def test_bad_pairs_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=whole(message)):
        SharingPlan.from_pairs(text, 5)


def test_bad_pairs_are_all_named_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        SharingPlan.from_pairs("x,9:1,3:2,3:1", 5)
    for fault in (
        "'x' is not",
        "follower 9 is outside",
        "follower 3 is named twice",
        "write 3:2,4:2",
    ):
        assert says(str(caught.value), fault)


@pytest.mark.parametrize("sources", [(0,), (0, 0), (0, 1, 1, 1, 4, 4), (0, 1, 0, 1, 0, 1)], ids=str)
def test_good_plans_have_no_faults(sources: tuple[int, ...]) -> None:
    plan = SharingPlan(sources)
    kinds = ["full", "sliding"] * 3 if sources == (0, 1, 0, 1, 0, 1) else ["full"] * len(sources)
    plan.validate(kinds, [4] * len(sources))
    plan.validate()


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ((0, 2, 2), "layer 1 uses layer 2, which is not earlier"),
        ((1, 1), "layer 0 uses layer 1, which is not earlier"),
        ((0, 0, 1), "layer 2 uses layer 1, which is itself a follower"),
        ((0, 9), "layer 1 uses layer 9, which does not exist"),
        ((0, -1), "layer 1 uses layer -1, which does not exist"),
    ],
)
def test_wrong_structure_is_refused(sources: tuple[int, ...], fault: str) -> None:
    plan = SharingPlan(sources)
    assert plan.faults() == [fault]
    with pytest.raises(PlanError, match=f"^the sharing plan does not fit: {fault}$"):
        plan.validate()


def test_wrong_layer_count_is_refused() -> None:
    assert SharingPlan((0, 1, 1)).faults(["full"] * 4, [8] * 4) == [
        "the plan has 3 layers and the model 4"
    ]


def test_different_attention_kinds_are_refused() -> None:
    assert SharingPlan((0, 0, 0)).faults(["full", "sliding", "full"]) == [
        "layer 1 (sliding attention) uses layer 0 (full attention)"
    ]


def test_different_head_counts_are_refused() -> None:
    assert SharingPlan((0, 0, 0)).faults(None, [8, 8, 4]) == [
        "layer 2 (4 query heads) uses layer 0 (8 query heads)"
    ]


def test_every_fault_is_named_at_once() -> None:
    plan = SharingPlan((0, 3, 0, 3, 1, 12))
    kinds = ["full", "full", "sliding", "full", "full", "full"]
    with pytest.raises(PlanError) as caught:
        plan.validate(kinds, [8, 8, 8, 4, 8, 8])
    assert str(caught.value) == (
        "the sharing plan does not fit: layer 1 uses layer 3, which is not earlier; "
        "layer 1 (8 query heads) uses layer 3 (4 query heads); "
        "layer 2 (sliding attention) uses layer 0 (full attention); "
        "layer 4 uses layer 1, which is itself a follower; "
        "layer 5 uses layer 12, which does not exist"
    )


def test_faults_beyond_the_layer_count_are_still_named() -> None:
    faults = SharingPlan((0, 0, 1)).faults(["full"], [8])
    assert len(faults) == 2
    assert "the plan has 3 layers and the model 1" in faults
