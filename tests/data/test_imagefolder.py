import numpy as np
import pytest
import torch
from PIL import Image

from actprune.core.errors import ConfigError, DataError
from actprune.data.imagefolder import ImageFolder, count_classes
from paths import needs_cifar10_jpeg, unpack_cifar10_jpeg

CLASSES = {"bee": 10, "ant": 20, "cat": 30}


def names(data: ImageFolder, split: str) -> list[str]:
    part = data._split(split)
    return [part.images.samples[i][0] for i in part.positions]


def test_flat_layout_is_split_in_three(tmp_path, folders):
    data = ImageFolder(root=folders(tmp_path, CLASSES), val_fraction=0.2, test_fraction=0.3)
    parts = [names(data, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [30, 12, 18]
    assert len(set(sum(parts, []))) == 60
    assert np.bincount(data._split("test").targets).tolist() == [6, 3, 9]
    assert data.num_classes == 3


def test_labels_follow_the_alphabet(tmp_path, folders):
    data = ImageFolder(root=folders(tmp_path, CLASSES))
    part = data._split("train")
    for index in range(len(part)):
        assert sorted(CLASSES)[part[index][1]] in names(data, "train")[index]


def test_train_is_split_where_there_is_no_val(tmp_path, folders):
    folders(tmp_path / "train", CLASSES)
    folders(tmp_path / "test", {"ant": 2, "bee": 2, "cat": 2})
    data = ImageFolder(root=tmp_path)
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [54, 6, 6]
    assert all("/train/" in name for name in names(data, "val"))


def test_val_folder_is_used(tmp_path, folders):
    folders(tmp_path / "train", CLASSES)
    for split in ("val", "test"):
        folders(tmp_path / split, {"ant": 2, "bee": 2, "cat": 3})
    data = ImageFolder(root=tmp_path)
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [60, 7, 7]
    assert all("/val/" in name for name in names(data, "val"))


def test_a_flat_layout_may_have_a_class_called_train(tmp_path, folders):
    data = ImageFolder(root=folders(tmp_path, {"boat": 10, "train": 10}))
    assert data.num_classes == count_classes(tmp_path) == 2
    assert len(names(data, "train")) == 16


def test_images_of_any_size_are_resized_and_cropped_to_the_centre(tmp_path, folders):
    folders(tmp_path, {"wide": 4, "tall": 4})
    for index in range(4):
        stripes = np.zeros((20, 60, 3), dtype=np.uint8)
        stripes[:, 20:40] = 255
        Image.fromarray(stripes).save(tmp_path / "wide" / f"{index:03d}.png")
        Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "tall" / f"{index:03d}.png")
    data = ImageFolder(root=tmp_path, image_size=20, mean=[0, 0, 0], std=[1, 1, 1], augment=False)
    for split in ("val", "test"):
        for index in range(len(data._split(split))):
            assert torch.equal(data._split(split)[index][0], torch.ones(3, 20, 20))
    assert data._split("train")[0][0].shape == (3, 20, 20)


def test_grey_files_and_palettes_are_read_as_colour(tmp_path, folders):
    folders(tmp_path, {"grey": 3, "palette": 3})
    for index in range(3):
        Image.new("L", (32, 32), 51).save(tmp_path / "grey" / f"{index:03d}.png")
        Image.new("RGB", (32, 32), (51, 102, 255)).quantize().save(tmp_path / "palette" / f"{index:03d}.png")
    test = ImageFolder(root=tmp_path, mean=[0, 0, 0], std=[1, 1, 1])._split("test")
    pixels = {label: x[:, 0, 0].tolist() for x, label in (test[0], test[1])}
    assert pixels[0] == pytest.approx([0.2, 0.2, 0.2])
    assert pixels[1] == pytest.approx([0.2, 0.4, 1.0])


def test_pixels_are_pils(tmp_path, folders):
    data = ImageFolder(root=folders(tmp_path, CLASSES, suffix="jpg"))
    x, _ = data._split("val")[3]
    raw = np.asarray(Image.open(names(data, "val")[3])).transpose(2, 0, 1) / 255
    mean, std = np.reshape([0.485, 0.456, 0.406], (3, 1, 1)), np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    np.testing.assert_allclose(x.numpy(), (raw - mean) / std, rtol=1e-4, atol=1e-5)


def test_missing_root(tmp_path):
    for call in (count_classes, lambda root: ImageFolder(root=root)):
        with pytest.raises(DataError, match="there is no folder .*nowhere; set data.root"):
            call(tmp_path / "nowhere")


def test_root_above_the_class_folders(tmp_path):
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    with pytest.raises(DataError, match="has a single class folder, pets; set data.root to the folder that holds"):
        count_classes(tmp_path)


def test_root_without_class_folders(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(DataError, match="has no class folders; expected .*/CLASS/IMAGE"):
        ImageFolder(root=tmp_path)


def test_number_of_classes_is_checked(tmp_path, folders):
    root = folders(tmp_path, CLASSES)
    assert ImageFolder(root=root, num_classes=3).num_classes == 3
    with pytest.raises(ConfigError, match="num_classes=10 but .* has 3 class folders; set num_classes=3"):
        ImageFolder(root=root, num_classes=10)


def test_empty_class_folder(tmp_path, folders):
    folders(tmp_path, CLASSES)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="a class folder in .* has no images: .*dog"):
        ImageFolder(root=tmp_path).setup()


def test_missing_test_folder(tmp_path, folders):
    folders(tmp_path / "train", CLASSES)
    with pytest.raises(DataError, match="/test is missing or has no class folders; .*use the flat layout"):
        ImageFolder(root=tmp_path).setup()


@pytest.mark.parametrize("split", ["val", "test"])
def test_splits_must_have_the_same_classes(tmp_path, folders, split):
    folders(tmp_path / "train", CLASSES)
    for name in ("val", "test"):
        folders(tmp_path / name, {"ant": 2, "bee": 2, "eel" if name == split else "cat": 2})
    with pytest.raises(DataError, match="must have the same class folders; only one of them has cat, eel"):
        ImageFolder(root=tmp_path).setup()


def test_a_file_that_is_no_image_is_found_before_training(tmp_path, folders):
    folders(tmp_path, CLASSES)
    (tmp_path / "bee" / "004.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="bee/004.png is not an image .*replace or remove the file"):
        ImageFolder(root=tmp_path).setup()


def test_an_empty_file_is_found_before_training(tmp_path, folders):
    folders(tmp_path, CLASSES)
    (tmp_path / "bee" / "004.png").write_bytes(b"")
    with pytest.raises(DataError, match="bee/004.png is not an image"):
        ImageFolder(root=tmp_path).setup()


def test_a_truncated_image_is_named(tmp_path, folders):
    folders(tmp_path, CLASSES, suffix="jpg")
    for path in tmp_path.glob("*/*.jpg"):
        path.write_bytes(path.read_bytes()[:700])
    data = ImageFolder(root=tmp_path)
    data.setup()
    with pytest.raises(DataError, match=r"cannot decode image .*/ant/\d+.jpg .*replace or remove the file"):
        data._split("test")[0]


@needs_cifar10_jpeg
def test_cifar10_jpeg_copy(tmp_path):
    data = ImageFolder(root=unpack_cifar10_jpeg(tmp_path, train=20, test=10))
    assert (data.num_classes, data.input_shape) == (10, (3, 32, 32))
    assert [len(data._split(split)) for split in ("train", "val", "test")] == [180, 20, 100]
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (64, 3, 32, 32)
    assert data._split("test").images.classes[0] == "airplane"
