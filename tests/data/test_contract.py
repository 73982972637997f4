"""What every dataset under conf/data promises."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from actprune.core.errors import ConfigError
from actprune.data.base import ImageDataModule
from paths import CONF

NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
SPLITS = ("train", "val", "test")


@pytest.fixture(params=NAMES)
def make(request, tmp_path, write_files):
    """A function that makes the dataset from its config with overrides, prepared and set up."""
    write_files(request.param, tmp_path)

    def build(**overrides):
        config = OmegaConf.load(CONF / "data" / f"{request.param}.yaml")
        if "root" in config.keys():  # noqa: SIM118 - "in config" is False for a missing value
            config.root = str(tmp_path)
        root = OmegaConf.create({"data": config, "paths": {"data_dir": str(tmp_path)}})
        data = instantiate(OmegaConf.merge(root, {"data": overrides}).data)
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def images(data: ImageDataModule, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(getattr(data, f"{split}_dataloader")())
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def untransformed(data: ImageDataModule) -> dict[str, list[bytes]]:
    """The stored pixels of every image of every split, in order."""
    stored = {}
    for name in SPLITS:
        split = data._split(name)
        stored[name] = [np.asarray(split.images[int(i)][0]).tobytes() for i in split.positions]
    return stored


def test_some_configs_are_found():
    assert {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagefolder"} <= set(NAMES)


def test_batches_have_the_stated_shape_and_labels(make):
    data = make(batch_size=16)
    for name in SPLITS:
        x, y = next(iter(getattr(data, f"{name}_dataloader")()))
        assert x.shape == (min(16, len(data._split(name))), *data.input_shape)
        assert x.dtype == torch.float32
        assert x.isfinite().all()
        assert type(x) is torch.Tensor
        assert y.dtype == torch.int64
        labels = images(data, name)[1]
        assert labels.min() >= 0
        assert labels.max() < data.num_classes
    assert set(images(data, "val")[1].tolist()) == set(range(data.num_classes))


def test_attributes_are_the_configs(make):
    data = make(batch_size=7, split_seed=3)
    assert (data.batch_size, data.num_workers, data.split_seed) == (7, 0, 3)
    assert len(data.input_shape) == 3
    assert data.input_shape[1] == data.input_shape[2]


def test_splits_share_no_image_and_hold_all_of_them(make):
    data = make()
    stored = untransformed(data)
    parts = {id(data._split(name).images): data._split(name).images for name in SPLITS}
    assert sum(map(len, stored.values())) == sum(len(images.targets) for images in parts.values())
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(stored[first]) & set(stored[second])


def test_split_depends_on_split_seed_only(make):
    torch.manual_seed(1)
    np.random.seed(1)
    first = untransformed(make())
    torch.manual_seed(2)
    np.random.seed(2)
    assert untransformed(make()) == first
    other = untransformed(make(split_seed=1))
    assert other["val"] != first["val"]
    assert len(other["val"]) == len(first["val"])


def test_validation_has_the_classes_in_train_s_proportions(make):
    data = make(val_fraction=0.2)
    train, val = (np.bincount(data._split(name).targets, minlength=data.num_classes) for name in ("train", "val"))
    whole = train + val
    if hasattr(data, "test_fraction") and data._split("test").images is data._split("train").images:
        whole = whole + np.bincount(data._split("test").targets, minlength=data.num_classes)
    assert np.abs(val - 0.2 * whole).max() <= 1


def test_only_training_images_are_augmented(make):
    data = make()
    torch.manual_seed(0)
    train = data._split("train")
    assert any(not torch.equal(train[i][0], train[i][0]) for i in range(8))
    for name in ("val", "test"):
        split = data._split(name)
        assert all(torch.equal(split[i][0], split[i][0]) for i in range(8))


def test_augmentation_can_be_switched_off(make):
    train = make(augment=False)._split("train")
    assert all(torch.equal(train[i][0], train[i][0]) for i in range(8))


def test_evaluation_loaders_keep_order_and_every_image(make):
    data = make(batch_size=7)
    for name in ("val", "test"):
        first, again = images(data, name), images(data, name)
        assert torch.equal(first[0], again[0])
        assert first[1].tolist() == data._split(name).targets.tolist()


def test_training_loader_is_shuffled_by_the_global_seed(make):
    data = make(augment=False)

    def order(seed):
        torch.manual_seed(seed)
        return images(data, "train")[1].tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(data._split("train").targets.tolist())


def test_a_last_training_batch_of_one_is_left_out(make):
    data = make()
    data.batch_size = len(data._split("train")) - 1
    assert [len(y) for _, y in data.train_dataloader()] == [data.batch_size]
    data.batch_size -= 1
    assert [len(y) for _, y in data.train_dataloader()] == [data.batch_size, 2]


@pytest.mark.parametrize(("channels", "size"), [(3, 40), (1, 20)])
def test_channels_and_size_can_be_chosen(make, channels, size):
    data = make(in_channels=channels, image_size=size, batch_size=4)
    assert data.input_shape == (channels, size, size)
    for name in SPLITS:
        assert next(iter(getattr(data, f"{name}_dataloader")()))[0].shape == (4, channels, size, size)


def test_normalisation_can_be_chosen(make):
    plain = make(in_channels=3, mean=[0, 0, 0], std=[1, 1, 1])._split("val")[0][0]
    scaled = make(in_channels=3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])._split("val")[0][0]
    assert plain.min() >= 0
    assert plain.max() <= 1
    shift, scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    torch.testing.assert_close(scaled, (plain - shift) / scale)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"batch_size": "many"}, "batch_size='many' must be a whole number"),
        ({"num_workers": -1}, "num_workers=-1 must be a whole number of at least 0"),
        ({"split_seed": 0.5}, "split_seed=0.5 must be a whole number"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 must be a share in \(0, 1\)"),
        ({"val_fraction": True}, "val_fraction=True must be a share"),
        ({"num_classes": 11}, "num_classes=11 but .* set num_classes="),
        ({"in_channels": 2}, r"in_channels=2 must be 1 \(grey\) or 3"),
        ({"image_size": 0}, "image_size=0 must be a whole number"),
        ({"in_channels": 3, "mean": [0.5]}, r"mean=\[0.5\] has 1 values, in_channels=3 needs 3"),
        ({"in_channels": 1, "std": [0.0]}, r"std=\(0.0,\) must be positive"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(make, overrides, match):
    with pytest.raises(Exception, match=match) as caught:
        make(**overrides)
    assert isinstance(caught.value.__cause__, ConfigError)


def test_unknown_settings_are_refused(make):
    with pytest.raises(Exception, match="batchsize"):
        make(batchsize=3)
