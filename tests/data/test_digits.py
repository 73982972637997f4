import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from actprune.core.errors import ConfigError
from actprune.data.digits import Digits


def test_sizes_and_shape():
    data = Digits()
    assert [len(data._split(name)) for name in ("train", "val", "test")] == [1078, 269, 450]
    assert (data.num_classes, data.input_shape) == (10, (1, 8, 8))


def test_pixels_and_labels_are_scikit_learns():
    bunch, test = load_digits(), Digits()._split("test")
    for index in (0, 17, 449):
        position = test.positions[index]
        x, y = test[index]
        expected = (bunch.images[position] / 16 - 0.3053) / 0.3761
        np.testing.assert_allclose(x[0].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert y == bunch.target[position]


def test_normalised_images_have_mean_zero_and_deviation_one():
    data = Digits(augment=False, batch_size=2000)
    x = torch.cat([next(iter(loader()))[0] for loader in (data.train_dataloader, data.val_dataloader)])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_every_position_is_in_one_split():
    data = Digits()
    positions = np.concatenate([data._split(name).positions for name in ("train", "val", "test")])
    assert sorted(positions) == list(range(1797))


def test_augmentation_shifts_by_at_most_one_pixel():
    data = Digits(mean=[0.0], std=[1.0])
    train, plain = data._split("train"), Digits(mean=[0.0], std=[1.0], augment=False)._split("train")
    padded = torch.nn.functional.pad(plain[0][0], (1, 1, 1, 1))
    shifts = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    torch.manual_seed(0)
    seen = set()
    for _ in range(100):
        augmented, _ = train[0]
        matches = [k for k, shift in enumerate(shifts) if torch.equal(shift, augmented)]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == set(range(9))


def test_grey_digits_become_three_equal_channels():
    x, _ = Digits(in_channels=3)._split("val")[0]
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[0], x[2])


def test_shares_must_leave_images_to_train_on():
    with pytest.raises(ConfigError, match="val_fraction \\+ test_fraction=1.2"):
        Digits(val_fraction=0.6, test_fraction=0.6)
    with pytest.raises(ConfigError, match="test_fraction=0 must be a share"):
        Digits(test_fraction=0)
