"""Where data selects, paths end: what is selected from and by becomes an output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from path_enumeration import assert_follows, with_random_masks
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms  # also registers the operators of torchvision

import growfx
from growfx.passes.path_products.products import path_products


class Heads(nn.Module):
    """Two linear heads on one stem, and whatever is done with them."""

    def __init__(self, use: Callable[..., Any]) -> None:
        super().__init__()
        self.stem, self.score, self.place, self.later = (
            nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 5),
        )  # fmt: skip
        self.use = use

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.use(self, self.score(x), self.place(x))


def best(net: Any, score: Tensor, place: Tensor) -> Any:
    values, indices = score.topk(2)
    return place.gather(1, indices) + values


def positive(net: Any, score: Tensor, place: Tensor) -> Any:
    return place[score > 0]


def where(net: Any, score: Tensor, place: Tensor) -> Any:
    rows, columns = torch.where(score > 0)
    return place[rows, columns] * 2


def ordered(net: Any, score: Tensor, place: Tensor) -> Any:
    order = score.sigmoid().argsort(1, descending=True)
    return torch.gather(place, 1, order)[:, :2]


def nonzero(net: Any, score: Tensor, place: Tensor) -> Any:
    chosen = (score > 0).nonzero()[:, 0]
    return place.index_select(0, chosen)


def chosen_rows(net: Any, score: Tensor, place: Tensor) -> Any:
    return place[torch.arange(place.shape[0]), score.argmax(1)]


def largest(net: Any, score: Tensor, place: Tensor) -> Any:
    return place.gather(1, score.max(1, keepdim=True)[1])


@pytest.mark.parametrize(
    "use", [largest, best, positive, where, ordered, nonzero, chosen_rows], ids=lambda use: use.__name__
)
def test_what_is_selected_from_and_by_are_the_outputs(use: Any) -> None:
    torch.manual_seed(0)
    net = with_random_masks(growfx.wrap(Heads(use).eval(), torch.randn(2, 3)))

    def rule(weights: dict[str, Tensor]) -> Tensor:
        x = torch.ones(1, 3).double() @ weights["stem"].T
        return torch.stack([(x @ weights[head].T).sum() for head in ("score", "place")])

    paths = assert_follows(net, rule)
    assert set(paths.off_path) <= {"later"}


def test_a_layer_fed_by_a_selection_alone_is_off_path_and_says_so() -> None:
    net = growfx.wrap(Heads(lambda net, score, place: net.later(score.sort(1)[0]) + place).eval(), torch.randn(2, 3))
    paths = path_products(net)
    assert set(paths.scores) == {"stem", "score", "place"}
    assert "selection by data" in paths.off_path["later"]


def test_a_value_selected_from_twice_is_one_output() -> None:
    def twice(net: Any, score: Tensor, place: Tensor) -> Any:
        return score.topk(1)[0], score.topk(2)[0], score[score > 0]

    net = growfx.wrap(Heads(twice).eval(), torch.randn(2, 3))
    assert_follows(net, lambda weights: torch.ones(1, 3).double() @ weights["stem"].T @ weights["score"].T)


FACTORS: list[tuple[str, Callable[..., Any]]] = [
    ("gate", lambda score, place: place * (score > 0)),
    ("leaky", lambda score, place: torch.where(place > 0, place, 0.1 * torch.ones_like(place))),
    ("filled", lambda score, place: place.masked_fill(score > 0, 0.0)),
    ("selected factor", lambda score, place: place * torch.ones_like(score).topk(5)[0]),
]


@pytest.mark.parametrize("use", [row[1] for row in FACTORS], ids=[row[0] for row in FACTORS])
def test_a_judgement_that_selects_nothing_ends_no_path(use: Any) -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Heads(lambda net, score, place: use(score, place)).eval(), torch.randn(2, 3))
    paths = assert_follows(net, lambda weights: torch.ones(1, 3).double() @ weights["stem"].T @ weights["place"].T)
    assert "score" in paths.off_path or not use


def test_what_data_selected_acts_on_paths_as_one() -> None:
    def use(net: Any, score: Tensor, place: Tensor) -> Any:
        top = score.topk(5)[0]
        return net.later(place * top / 2 + top)

    net = growfx.wrap(Heads(use).eval(), torch.randn(2, 3))

    def rule(weights: dict[str, Tensor]) -> Tensor:
        x = torch.ones(1, 3).double() @ weights["stem"].T
        return (x @ weights["score"].T).sum() + (x @ weights["place"].T @ weights["later"].T / 2).sum()

    assert_follows(net, rule)


@pytest.mark.parametrize("as_module", [True, False])
def test_codes_chosen_by_data_end_paths_at_the_choice_and_begin_them_at_the_codes(as_module: bool) -> None:
    class Quantises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.codes, self.decoder = nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.cdist(self.encoder(x), self.codes.weight).argmin(1)
            codes = self.codes(chosen) if as_module else F.embedding(chosen, self.codes.weight)
            return self.decoder(codes)

    torch.manual_seed(0)
    net = with_random_masks(growfx.wrap(Quantises().eval(), torch.randn(2, 3)))
    ones = torch.ones(1, 4, dtype=torch.float64)

    def rule(w: dict[str, Tensor]) -> Tensor:
        distances = (ones[:, :3] @ w["encoder"].T).mean(1).expand(5)
        return torch.cat([distances, (ones @ w["decoder"].T).flatten()])

    assert_follows(net, rule)


def test_rows_written_to_places_that_data_chose_are_spread_over_all() -> None:
    def use(net: Any, score: Tensor, place: Tensor) -> Any:
        board = torch.zeros(4, 5)
        board[score[0, :2].argsort()] = place[:1].expand(2, 5)
        return board * torch.arange(5)

    net = growfx.wrap(Heads(use).eval(), torch.randn(2, 3))

    def rule(weights: dict[str, Tensor]) -> Tensor:
        place = torch.ones(1, 3).double() @ weights["stem"].T @ weights["place"].T
        return 2 * place * torch.arange(5)

    assert_follows(net, rule)


def test_ends_far_beyond_float64_keep_their_share() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(3, 3), nn.Sequential(*(nn.Linear(3, 3) for _ in range(60)))

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return x.topk(1)[0], self.body(x)

    model = Deep().eval()
    for parameter in model.body.parameters():
        nn.init.constant_(parameter, 1e20)
    paths = path_products(growfx.wrap(model, torch.randn(2, 3)))
    assert paths.log_total == pytest.approx(60 * math.log(3e20) + math.log(model.first.weight.abs().sum().item()))
    assert all(torch.isfinite(score).all() for score in paths.scores.values())


# A detector


class Detector(nn.Module):
    """Backbone, proposals, boxes by top-k and suppression, and a head on what is cut out there."""

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.objectness, self.deltas = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 4, 1)
        self.box = nn.Linear(4 * 4, 6)
        self.classes, self.corners = nn.Linear(6, 3), nn.Linear(6, 4)
        self.register_buffer("anchors", torch.tensor([[0.0, 0.0, 6.0, 6.0]]).repeat(16, 1))

    def proposals(self, objectness: Tensor, deltas: Tensor) -> Tensor:
        boxes = self.anchors + deltas.permute(1, 2, 0).reshape(-1, 4)
        scores, order = objectness.flatten().topk(8)
        boxes = boxes[order].clamp(0, 8)
        keep = (boxes[:, 2] - boxes[:, 0] >= 0).nonzero()[:, 0]
        boxes, scores = boxes[keep], scores[keep].sigmoid()
        return boxes[nms(boxes, scores, 0.7)[:4]]

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = F.relu(self.backbone(torch.stack(images)))
        objectness, deltas = self.objectness(features), self.deltas(features)
        boxes = [self.proposals(*each) for each in zip(objectness, deltas, strict=True)]
        rows = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])
        cut = torch.ops.torchvision.roi_align(features, rows, 0.5, 2, 2, -1, False)
        cut = F.relu(self.box(cut.flatten(1)))
        scores, corners = self.classes(cut).softmax(1), self.corners(cut)
        found = []
        for score, corner, box in zip(
            scores.split([b.shape[0] for b in boxes]), corners.split([b.shape[0] for b in boxes]), boxes, strict=True
        ):
            score, label = score.max(1)
            keep = score > 0.1
            found.append({"boxes": (box + corner)[keep], "scores": score[keep], "labels": label[keep]})
        return found


def images(count: int, size: int = 8) -> list[Tensor]:
    return [torch.randn(3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_the_raw_heads_of_a_detector_are_its_outputs() -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    found = sum(len(one["boxes"]) for one in model(images(2)))
    net = with_random_masks(growfx.wrap(model, (images(2),)))
    assert net.trace_report.faithful
    assert found

    def rule(weights: dict[str, Tensor]) -> Tensor:
        x = F.conv2d(torch.ones(2, 3, 8, 8).double(), weights["backbone"], stride=2, padding=1)
        heads = [F.conv2d(x, weights[name]) for name in ("objectness", "deltas")]
        cut = x.mean((0, 2, 3)).repeat_interleave(4) @ weights["box"].T
        classes, corners = cut @ weights["classes"].T, cut @ weights["corners"].T
        boxes = len(graph_shape(net, "roi_align"))
        return boxes * (classes.mean() + corners.sum()) + heads[0].sum() + heads[1].sum()

    paths = assert_follows(net, rule)
    assert not paths.off_path
    assert all(bool(score.gt(0).any()) for score in paths.scores.values())


def graph_shape(net: Any, operator: str) -> Any:
    graph = net.graph_at(*net.example_inputs())
    return torch.empty(next(node.meta["shape"] for node in graph.nodes if operator in node.name), device="meta")


def test_the_images_of_a_detector_may_be_given() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Detector().eval(), (images(2),))
    one = path_products(net, example_inputs=(images(1),))
    two = path_products(net, example_inputs=(images(2),))
    assert two.log_total > one.log_total
    with pytest.raises(growfx.ConfigError, match="example_inputs"):
        path_products(net, example_inputs=([],))


def test_a_head_for_which_the_recording_found_nothing_says_so() -> None:
    class Picky(Detector):
        def forward(self, images: list[Tensor]) -> Any:
            features = F.relu(self.backbone(torch.stack(images)))
            boxes = self.anchors[self.objectness(features).flatten()[:16] > 1e9]
            rows = F.pad(boxes, (1, 0))
            cut = torch.ops.torchvision.roi_align(features, rows, 0.5, 2, 2, -1, False)
            return self.deltas(features), self.classes(self.box(cut.flatten(1)))

    paths = path_products(growfx.wrap(Picky().eval(), (images(1),)))
    assert set(paths.scores) == {"backbone", "objectness", "deltas"}
    assert set(paths.off_path) == {"box", "classes"}
    assert all("left nothing to feed it" in reason for reason in paths.off_path.values())
