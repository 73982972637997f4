"""The datasets that torchvision fetches: real formats, and what is said when the files are not there."""

import hashlib
import shutil
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets

from actprune.core.errors import DataError
from actprune.data.cifar10 import CIFAR10
from actprune.data.cifar100 import CIFAR100
from actprune.data.fashion_mnist import FashionMNIST
from actprune.data.mnist import MNIST

MODULES = {"mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10, "cifar100": CIFAR100}
ARCHIVES = {
    "mnist": ("train-images-idx3-ubyte.gz", "MNIST/raw"),
    "fashion_mnist": ("t10k-labels-idx1-ubyte.gz", "FashionMNIST/raw"),
    "cifar10": ("cifar-10-python.tar.gz", ""),
    "cifar100": ("cifar-100-python.tar.gz", ""),
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", MODULES)
def test_pixels_are_scaled_and_normalised(name, tmp_path, write_files):
    write_files(name, tmp_path)
    data = MODULES[name](root=tmp_path)
    data.prepare_data()
    test = data._split("test")
    raw = np.asarray(test.images.data[5]).reshape(*data.input_shape[1:], -1).transpose(2, 0, 1) / 255
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in (data.native_mean, data.native_std))
    np.testing.assert_allclose(test[5][0].numpy(), (raw - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_the_test_split_is_the_datasets_own(name, tmp_path, write_files):
    write_files(name, tmp_path)
    data = MODULES[name](root=tmp_path)
    own = data.dataset(tmp_path, train=False)
    assert data._split("test").targets.tolist() == list(map(int, own.targets))
    assert len(data._split("val")) == round(0.1 * len(data.dataset(tmp_path, train=True)))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("no_network")
def test_without_network_and_files_the_error_says_where_they_belong(name, tmp_path):
    data = MODULES[name](root=tmp_path)
    file, folder = ARCHIVES[name]
    with pytest.raises(DataError) as caught:
        data.prepare_data()
    message = str(caught.value)
    assert file in message
    assert str((tmp_path / folder).resolve()) in message
    assert "no route to host" in message
    assert data.source in message
    assert "\n" not in message


@pytest.mark.parametrize("name", MODULES)
def test_without_download_nothing_is_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched"))
    data = MODULES[name](root=tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(DataError, match=r"download=False.*set download=true.*or put .*" + ARCHIVES[name][0]):
        data.setup("fit")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("no_network")
def test_files_that_are_there_need_no_network(name, tmp_path, write_files):
    write_files(name, tmp_path)
    data = MODULES[name](root=tmp_path)
    data.prepare_data()
    data.setup("test")
    assert len(data._split("test")) == 12 * data.num_classes


def test_the_original_archive_in_the_root_is_unpacked(tmp_path, monkeypatch, write_files):
    """Somebody who puts the published archive into the folder that the error names needs no network."""
    write_files("cifar10", tmp_path / "source")
    archive = shutil.make_archive(str(tmp_path / "cifar-10-python"), "gztar", tmp_path / "source")
    (tmp_path / "data").mkdir()
    target = Path(shutil.move(archive, tmp_path / "data"))
    digest = hashlib.md5(target.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched"))
    data = CIFAR10(root=tmp_path / "data")
    data.prepare_data()
    assert len(data._split("test")) == 120


def test_damaged_files_are_a_data_error(tmp_path, write_files):
    write_files("mnist", tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00")
    with pytest.raises(DataError, match="MNIST is not complete under"):
        MNIST(root=tmp_path, download=False).setup()
