import numpy as np
import pytest
import torch

from actprune.core.errors import DataError
from actprune.data.split import Split, stratified_split, three_way_split

LABELS = np.repeat([3, 0, 7], [100, 50, 10])


@pytest.mark.parametrize("seed", [0, 1, 12])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_every_class_gives_its_share(fraction, seed):
    rest, held = stratified_split(LABELS, fraction, seed)
    assert sorted([*rest, *held]) == list(range(160))
    for label, size in ((3, 100), (0, 50), (7, 10)):
        assert (LABELS[held] == label).sum() == round(fraction * size)


def test_split_is_the_same_for_ever():
    rest, held = stratified_split([0, 1] * 10, 0.2, seed=0)
    assert held.tolist() == [4, 7, 11, 16]
    assert rest.dtype == np.int64


def test_lists_arrays_and_tensors_split_alike():
    held = [stratified_split(kind, 0.3, 5)[1].tolist() for kind in (LABELS.tolist(), LABELS, torch.tensor(LABELS))]
    assert held[0] == held[1] == held[2]


def test_held_out_images_are_not_simply_the_first():
    held = stratified_split(np.zeros(100, dtype=int), 0.5, 0)[1]
    assert 15 < (held < 50).sum() < 35


def test_small_classes_are_on_both_sides():
    rest, held = stratified_split([0, 0, 1, 1], 0.01, 0)
    assert len(held) == 2
    rest, held = stratified_split([0, 0, 1, 1], 0.99, 0)
    assert len(rest) == 2


def test_a_class_with_one_image_is_refused():
    with pytest.raises(DataError, match="class 1 has 1 image, a stratified split needs at least 2"):
        stratified_split([0, 0, 1], 0.5, 0)


def test_three_way_fractions_are_shares_of_all():
    train, val, test = three_way_split(LABELS, 0.2, 0.3, 0)
    assert sorted([*train, *val, *test]) == list(range(160))
    assert [len(part) for part in (train, val, test)] == [80, 32, 48]
    assert [(LABELS[val] == label).sum() for label in (3, 0, 7)] == [20, 10, 2]


def test_test_images_do_not_depend_on_the_validation_share():
    assert three_way_split(LABELS, 0.1, 0.3, 0)[2].tolist() == three_way_split(LABELS, 0.4, 0.3, 0)[2].tolist()


def test_split_transforms_the_images_at_its_positions():
    class Numbers:
        targets = [10, 11, 12, 13]

        def __getitem__(self, index):
            return index, self.targets[index]

    split = Split(Numbers(), np.array([3, 1]), lambda image: torch.tensor(100.0 * image))
    assert len(split) == 2
    assert [(float(x), y) for x, y in (split[0], split[1])] == [(300.0, 13), (100.0, 11)]
    assert split.targets.tolist() == [13, 11]
