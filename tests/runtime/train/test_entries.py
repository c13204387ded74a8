"""The entries of a mask: what they read, where they lie, and the blocks they are worked through in."""

import pytest
import torch
from torch.nn import functional as F

from growfx.runtime.train.entries import Entries, Geometry
from growfx.runtime.train.library import training_status

built = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")


@pytest.mark.parametrize("places", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (7, 2, 3, 1), (1, 1, 0, 1)])
def test_the_taps_that_a_place_reads_are_counted_as_a_convolution_of_ones_counts_them(
    places: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    geometry = Geometry(*((v, v) for v in (kernel, stride, dilation, padding, padding)))
    size = (places - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding
    seen = F.conv2d(torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel), None, stride, padding, dilation)
    assert geometry.out_size((size, size)) == [places, places]
    assert abs(geometry.taps_read([places, places]) - float(seen.mean())) <= 0.5
    assert Geometry((), (), (), (), ()).taps_read([]) == 1


@built
def test_each_entry_knows_its_place_in_memory_and_what_it_reads_in_every_block() -> None:
    torch.manual_seed(0)
    mask = torch.rand(12, 300, 3, 3) < 0.2
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    entries = Entries.of(mask, mask.stride(), geometry, [16, 16])
    assert torch.equal(entries.places, mask.view(-1).nonzero().view(-1).int())
    assert torch.equal(entries.index.sort().values, entries.places)
    inputs, taps = 300, 9
    assert entries.start.numel() - 1 > 12 * taps  # several blocks
    segments = torch.repeat_interleave(torch.arange(entries.start.numel() - 1), entries.start.diff())
    rows, tap = segments // taps % 12, segments % taps
    assert torch.equal(entries.source % taps, tap.int())
    assert torch.equal(entries.index, (rows * inputs * taps + entries.source).int())
    assert torch.equal(entries.back_order.sort().values, torch.arange(entries.nnz, dtype=torch.int32))


@built
def test_entries_of_groups_read_the_channels_of_their_group() -> None:
    torch.manual_seed(0)
    mask = torch.rand(6, 4, 2, 2) < 0.5  # three groups of two outputs and four inputs
    geometry = Geometry((2, 2), (1, 1), (1, 1), (0, 0), (0, 0), groups=3)
    entries = Entries.of(mask, mask.stride(), geometry, [5, 5])
    segments = torch.repeat_interleave(torch.arange(entries.start.numel() - 1), entries.start.diff())
    row, channel = segments // 4, entries.source // 4
    assert torch.equal(channel // 4, row.int() // 2)
    assert torch.equal(entries.index, (row * 16 + channel % 4 * 4 + entries.source % 4).int())
    assert torch.equal(entries.places, mask.view(-1).nonzero().view(-1).int())
    assert entries.back_start.numel() == 3 * 4 * 4 + 1
    back = torch.repeat_interleave(torch.arange(entries.back_start.numel() - 1), entries.back_start.diff())
    assert torch.equal(back // 4, channel[entries.back_order.long()])


@built
@pytest.mark.parametrize("density", [0.05, 0.6, 1.0])
def test_entries_are_not_those_of_a_mask_that_another_has_written_to(density: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(40, 50) < density
    entries = Entries.of(mask, mask.stride(), Geometry((), (), (), (), ()), [])
    assert entries.are_of(mask.clone(), mask.stride(), taps_read=1)
    for change in (lambda m: m.view(-1)[3].logical_not_(), lambda m: m.copy_(m.flip(0)), lambda m: m.zero_()):
        changed = mask.clone()
        change(changed)
        assert entries.are_of(changed, mask.stride(), taps_read=1) == torch.equal(changed, mask)
    with torch.no_grad():
        mask.view(-1)[7].logical_not_()  # the very tensor they were made of
    assert not entries.are_of(mask, mask.stride(), taps_read=1)


@built
def test_an_empty_mask_has_no_entries_and_no_places() -> None:
    mask = torch.zeros(4, 3, dtype=torch.bool)
    entries = Entries.of(mask, mask.stride(), Geometry((), (), (), (), ()), [])
    assert entries.nnz == entries.places.numel() == 0
