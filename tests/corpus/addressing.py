"""Addressing: a device value picks a row or a position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.corpus.case import case, choice, distinct, noise, number, whole


@case(lambda i: (noise(i, 6, 3), whole(i, 0, 6)))
def item_reads_a_row(x: Tensor, row: Tensor) -> Tensor:
    return x[row.item()] * 2


@case(lambda i: (noise(i, 6, 3), whole(i, 0, 6)))
def a_tensor_picks_a_row(x: Tensor, row: Tensor) -> Tensor:
    return x[row] + 1


@case(lambda i: (noise(i, 6, 3), whole(i, 1, 7)))
def a_negative_index(x: Tensor, back: Tensor) -> Tensor:
    return x[-int(back)]


@case(lambda i: (noise(i, 3), whole(i, 0, 4), whole(i, 0, 7)))
class ItemsAddressACacheEntry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv", torch.zeros(4, 5, 3))

    def forward(self, x: Tensor, slot: Tensor, position: Tensor) -> Tensor:
        self.kv[slot.item(), position.item() % 5] = x
        return self.kv.amax(dim=(0, 1))


@case(lambda i: (noise(i, 3), torch.tensor(i)))
class RingBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.window = 6
        self.register_buffer("ring", torch.zeros(6, 3))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        start_pos = int(position)
        self.ring[start_pos % self.window] = x
        return self.ring * 2


@case(lambda i: (noise(i, 3, 2), choice(i, 3, 8)))
class OnePositionPerSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv", torch.zeros(3, 8, 2))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for sequence in range(x.shape[0]):
            position = int(positions[sequence].item())
            self.kv[sequence, position] = x[sequence]
        return self.kv.clone()


@case(lambda i: (noise(i, 3, 2), choice(i, 3, 4)))
class SlotsAsAList(nn.Module):
    """Two rows may have the same slot, so the order of the updates matters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(4, 2))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        for row, slot in enumerate(slots.tolist()):
            self.sums[slot] = self.sums[slot] * 0.5 + x[row]
        return self.sums + 1


@case(lambda i: (noise(i, 8, 2), whole(i, 0, 6)))
def a_slice_of_fixed_length(x: Tensor, start: Tensor) -> Tensor:
    first = start.item()
    return x[first : first + 3] * 2


@case(lambda i: (noise(i, 2, 2), whole(i, 0, 7)))
class WriteToASlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 8, 2))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        t0 = int(position)
        self.keys[:, t0 : t0 + 2] = x.unsqueeze(1)
        return self.keys.abs()


@case(lambda i: (noise(i, 8, 2), whole(i, 0, 7)))
def narrow_by_an_item(x: Tensor, start: Tensor) -> Tensor:
    return torch.narrow(x, 0, int(start), 2) - 1


@case(lambda i: (choice(i, 4, 7),))
class RowsOfATableByAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(7, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.table[index] for index in ids.tolist()])


@case(lambda i: (noise(i, 6, 3), whole(i, 0, 6), whole(i + 1, 0, 6)))
def a_list_of_items_as_index(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x[[int(first), int(second)]]


@case(lambda i: (noise(i, 4, 3), noise(i, 4, salt=1), whole(i, 0, 3)))
def write_a_column(x: Tensor, column: Tensor, where: Tensor) -> Tensor:
    out = x.clone()
    out[:, int(where)] = column
    return out


@case(lambda i: (noise(i, 6, 2), whole(i, 0, 9)))
def roll_by_an_item(x: Tensor, shift: Tensor) -> Tensor:
    return torch.roll(x, int(shift), 0)


@case(lambda i: (noise(i, 5, 2), choice(i, 3, 5)))
def indices_through_numpy(x: Tensor, rows: Tensor) -> Tensor:
    picked = [x[int(row)] for row in rows.cpu().numpy()]
    return torch.cat(picked)


@case(lambda i: (noise(i, 5, 2), noise(i, 5, salt=1)))
def the_best_row_by_argmax(x: Tensor, scores: Tensor) -> Tensor:
    return x[scores.argmax().item()]


@case(lambda i: (noise(i, 2), distinct(i, 4, 6), whole(i, 0, 8)))
class PageTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pages", torch.zeros(6, 2, 2))

    def forward(self, x: Tensor, table: Tensor, position: Tensor) -> Tensor:
        page, offset = divmod(int(position), 2)
        self.pages[int(table[page]), offset] = x
        return self.pages[table].flatten(0, 1)


@case(lambda i: (whole(i, 0, 4), whole(i + 2, 0, 4), number(i)))
class SwapTwoRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.arange(8.0).view(4, 2))

    def forward(self, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        i, j = int(first), int(second)
        kept = self.rows[i].clone()
        self.rows[i] = self.rows[j]
        self.rows[j] = kept
        return self.rows * scale
