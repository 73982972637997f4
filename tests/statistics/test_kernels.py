"""One kernel reads what PyTorch reads place by place."""

import pytest
import torch

from actprune.statistics import at_positions, every_second, sample_positions
from triton_device import DEVICE, needs_triton

pytestmark = needs_triton

IDS = torch.tensor([3, 7, 1 << 40, 12345, 99, 0, 21])
RANGES = [range(21, 28), range((3 << 40) + 5, (3 << 40) + 19, 2), range((1 << 31) - 9, (1 << 31) + 12, 3)]
"""The last one passes what 32 bits hold."""


def activations(dtype):
    torch.manual_seed(0)
    return [torch.randn(len(IDS), channels, space).to(DEVICE, dtype) for channels, space in ((4, 50), (3, 7), (6, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("numbers", [None, *RANGES], ids=str)
def test_few_positions_are_those_that_are_drawn(dtype, halved, numbers):
    from actprune.statistics import kernels

    ids = IDS if numbers is None else torch.tensor(numbers)

    large, small, single = activations(dtype)
    k, rows, row = 3, 12, 2
    drawn, after = rows * 7 * k, rows * 7 * k + rows * 6
    sources = [kernels.Source(1, 4, 50, k, kernels.DRAWN, 0, 7, 0), kernels.Source(2, 3, 7, k, kernels.DRAWN, 4, 7, 0)]
    sources.append(kernels.Source(0, 6, 1, 1, kernels.ALL, 0, 6, drawn))
    out = torch.full((after + 5,), float("nan"), device=DEVICE)
    addresses = torch.tensor([x.data_ptr() for x in (single, large, small)])
    heads = (torch.cat([addresses, ids]) if numbers is None else addresses).to(DEVICE)
    kernels.read(kernels.launched(sources, dtype, DEVICE), heads, out, row, len(ids), numbers, halved)

    read = every_second(ids, seed=0) if halved else torch.arange(len(ids))
    assert 0 < len(read) < len(ids) or not halved
    want = torch.full((rows, 7, k), float("nan"))
    for x, columns in ((large, slice(0, 4)), (small, slice(4, 7))):
        want[row + read, columns] = at_positions(x.cpu(), sample_positions(ids, x.shape[2], k, seed=0)).float()[read]
    torch.testing.assert_close(out[:drawn].view(rows, 7, k).cpu(), want, rtol=0, atol=0, equal_nan=True)
    whole = torch.full((rows, 6, 1), float("nan"))
    whole[row : row + len(IDS)] = single.float().cpu()
    torch.testing.assert_close(out[drawn:after].view(rows, 6, 1).cpu(), whole, rtol=0, atol=0, equal_nan=True)
    assert out[after:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_those_of_the_maps(dtype):
    from actprune.statistics import kernels

    maps = [torch.randn(5, 4, 130).to(DEVICE, dtype), torch.randn(5, 40, 7).to(DEVICE, dtype)]
    maps[1][2, 3, 4], maps[0][0, 0, 0] = float("nan"), float("inf")
    out = torch.zeros(8 * 84, device=DEVICE)
    sources = [kernels.Source(0, 4, 130, 1, kernels.MEAN, 0, 44, 0), kernels.Source(1, 40, 7, 1, kernels.MEAN, 4, 44, 0)]
    sources.append(kernels.Source(1, 40, 7, 1, kernels.DRAWN, 0, 40, 8 * 44))  # both kinds at one place
    heads = torch.tensor([x.data_ptr() for x in maps], device=DEVICE)
    kernels.read(kernels.launched(sources, dtype, DEVICE), heads, out, 3, 5, range(5), False)
    want = torch.cat([torch.zeros(3, 44), torch.cat([x.cpu().double().mean(2) for x in maps], 1).float()])
    torch.testing.assert_close(out[: 8 * 44].view(8, 44).cpu(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
    drawn = at_positions(maps[1].cpu(), sample_positions(torch.arange(5), 7, 1, seed=0)).float()
    torch.testing.assert_close(out[8 * 44 :].view(8, 40, 1)[3:].cpu(), drawn, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_that_differ_are_found_wherever_they_are(dtype):
    from actprune.statistics import kernels

    torch.manual_seed(0)
    shapes = [(1,), (7, 5), (3, 4111), (2, 8192), (0, 4)]
    pairs = [(x, x.clone()) for x in (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)]
    pairs[1][0][3, 2] = pairs[1][1][3, 2] = float("nan")
    assert kernels.differ(pairs, DEVICE).tolist() == [0] * 5
    pairs[2][0][2, 4110] += 1
    pairs[3][1][0, 0] = -pairs[3][0][0, 0]
    pairs.append((torch.zeros(3, dtype=dtype, device=DEVICE), -torch.zeros(3, dtype=dtype, device=DEVICE)))
    assert kernels.differ(pairs, DEVICE).tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("takes_constants", [True, False])
def test_what_was_compiled_is_launched_again_whatever_it_takes(takes_constants, monkeypatch):
    from actprune.statistics import kernels

    launched = []

    class Compiled:
        def __getitem__(self, grid):
            def run(*arguments):
                if len(arguments) != (5 if takes_constants else 3):
                    raise TypeError(f"takes other than {len(arguments)} arguments")
                launched.append((grid, arguments[:3]))

            return run

    class Kernel:
        fn = "kernel"

        def __getitem__(self, grid):
            return lambda *arguments, **_options: launched.append((grid, arguments[:3])) or Compiled()

    monkeypatch.setattr(kernels, "_COMPILED", {})
    x = torch.zeros(1)
    for row in range(3):
        kernels._launch(Kernel(), (1, 2, 1), (x, row, 7), (True, "float32"))
    assert launched == [((1, 2, 1), (x, row, 7)) for row in range(3)]
