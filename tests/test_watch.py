"""Host syncs are found however they are written."""

import numpy as np
import torch

from tests.parity import batches, parity


def test_a_value_that_leaves_through_dlpack_is_not_frozen() -> None:
    parity(lambda: lambda x: x * float(np.from_dlpack(x)[0]), batches(*[(3,)] * 4))


def test_a_value_that_leaves_through_the_storage_is_not_frozen() -> None:
    parity(lambda: lambda x: x * torch.tensor([]).set_(x.untyped_storage()).sum(), batches(*[(3,)] * 4))
