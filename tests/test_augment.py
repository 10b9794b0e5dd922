import numpy as np
import pytest
import torch

from arae import by_image
from arae.data.augment import augment, to_float
from arae.seeds import mix, mix_array, mix_tensor

IDS = torch.arange(100, 164)


def batch(channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (64, channels, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def reference(image: np.ndarray, identity: int, kinds: tuple[str, ...], pad: int, seed: int) -> np.ndarray:
    """One sample at a time, with numpy's padding: [C, H, W]."""
    out = image
    height, width = image.shape[1:]
    if "flip" in kinds and mix(mix(seed, "flip"), identity) & 1:
        out = out[:, :, ::-1]
    if "shift" in kinds:
        down = mix(mix(seed, "down"), identity) % (2 * pad + 1)
        right = mix(mix(seed, "right"), identity) % (2 * pad + 1)
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
        out = padded[:, down : down + height, right : right + width]
        if "flip" in kinds and mix(mix(seed, "flip"), identity) & 1:
            # Flipping first and shifting then moves the other way along the rows of the source.
            padded = np.pad(image[:, :, ::-1], ((0, 0), (pad, pad), (pad, pad)), mode="edge")
            left = 2 * pad - right
            out = padded[:, down : down + height, left : left + width]
    return out / np.float32(255)


@pytest.fixture(params=[False, True], ids=["together", "one by one"])
def _large(request, monkeypatch):
    """As images of these few pixels are gone through on a CPU, and as large ones are."""
    if request.param:
        monkeypatch.setattr(by_image, "LARGE", 1)


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("kinds", [(), ("flip",), ("shift",), ("flip", "shift"), ("crop",)])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_one_sample_at_a_time(kinds, channels):
    images = batch(channels)
    got = augment(images, IDS, kinds, 3, seed=7)
    expected = [reference(x.numpy(), int(i), kinds, 3, 7) for x, i in zip(images, IDS, strict=True)]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), np.stack(expected), atol=1e-6)


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("kinds", [(), ("flip",), ("flip", "shift")])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_with_the_channels_last_stay_so_and_are_the_same(kinds, channels):
    images = batch(channels)
    loaded = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as the streaming loader hands them out
    got = augment(loaded, IDS, kinds, 3, seed=7)
    assert torch.equal(got, augment(images, IDS, kinds, 3, seed=7))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_is_independent_of_the_batch_and_depends_on_seed_and_id():
    images, order = batch(), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    whole = augment(images, IDS, ("flip", "shift"), 4, seed=0)
    assert torch.equal(augment(images[order], IDS[order], ("flip", "shift"), 4, seed=0), whole[order])
    assert torch.equal(augment(images[5:6], IDS[5:6], ("flip", "shift"), 4, seed=0), whole[5:6])
    assert not torch.equal(augment(images, IDS, ("flip", "shift"), 4, seed=1), whole)
    assert not torch.equal(augment(images, IDS + 64, ("flip", "shift"), 4, seed=0), whole)


def test_flips_half_and_shifts_evenly():
    ids = torch.arange(20_000)
    flips = (mix_tensor(mix(0, "flip"), ids) & 1).float().mean().item()
    assert abs(flips - 0.5) < 0.02
    shifts = torch.bincount(mix_tensor(mix(0, "down"), ids) % 9) / len(ids)
    assert (shifts - 1 / 9).abs().max() < 0.01


def test_images_gone_through_one_by_one_are_the_same_bits(monkeypatch):
    together = augment(batch(), IDS, ("flip",), 0, seed=7)
    monkeypatch.setattr(by_image, "LARGE", 1)
    assert torch.equal(augment(batch(), IDS, ("flip",), 0, seed=7), together)
    assert augment(batch()[:0], IDS[:0], ("flip",), 0, seed=7).shape == (0, 3, 9, 11)


def test_to_float_spans_the_unit_range():
    levels = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    assert to_float(levels).flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])


@pytest.mark.gpu
def test_same_on_the_gpu():
    cpu = augment(batch(), IDS, ("flip", "shift"), 4, seed=3)
    assert torch.equal(augment(batch().cuda(), IDS.cuda(), ("flip", "shift"), 4, seed=3).cpu(), cpu)


@pytest.mark.parametrize("address", [0, 1, mix(3, "flip"), 2**63 - 1])
def test_mixing_is_one_function_for_numbers_arrays_and_tensors(address):
    ids = np.array([0, 1, 5, 2**40, 2**63 - 1, -3])
    expected = [mix(address, int(i)) for i in ids]
    assert mix_array(address, ids).tolist() == expected
    assert mix_tensor(address, torch.from_numpy(ids)).tolist() == expected
    assert all(0 <= value < 2**63 for value in expected)
    table = mix_array(address, ids, np.arange(3)[:, None])
    assert table.tolist() == [[mix(address, int(i), k) for i in ids] for k in range(3)]


def test_mixing_is_fixed_and_separates_addresses():
    assert mix(0) == 0xE220A8397B1DCDAF & (2**63 - 1)  # first output of SplitMix64 seeded with 0
    addresses = [(), (0,), (0, 0), (0, 1), (1, 0), ("a",), ("b",), ("a", "b"), ("ab",), (0, "encoder", 3, 1)]
    assert len({mix(*parts) for parts in addresses}) == len(addresses)
