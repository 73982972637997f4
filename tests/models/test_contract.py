"""What every model under conf/model promises, on the shapes of the datasets that it is for."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from paths import CONF

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
DATA = {
    "digits": {"num_classes": 10, "in_channels": 1, "image_size": 8},
    "mnist": {"num_classes": 10, "in_channels": 1, "image_size": 28},
    "cifar100": {"num_classes": 100, "in_channels": 3, "image_size": 32},
}
ONLY_FROM = {"lenet5": 28, "vgg16_bn": 32, "torchvision": 32}
"""Pixels that a model needs, of the sizes below; the others take all of them."""
PARAMS = {
    # Published or counted by hand; a new model adds its number here.
    "mlp": 3072 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10,
    "small_cnn": (27 * 32 + 64) + 2 * (9 * 32 * 32 + 64) + (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 3 * 128) + 650,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "lenet5": (75 * 20 + 20) + (500 * 50 + 50) + (50 * 25 * 500 + 500) + 5010,
    "vgg16_bn": 14_728_266,
    "vit_tiny": (48 * 128 + 128) + 64 * 128 + 6 * (12 * 128 * 128 + 13 * 128) + 2 * 128 + 1290,
    "torchvision": 11_689_512 - 990 * 513,
}


def make(name: str, **data: int):
    config = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    shape = {"num_classes": 10, "in_channels": 3, "image_size": 32, **data}
    return instantiate(OmegaConf.create({"data": shape, "model": config}).model)


def fits(name: str, dataset: str) -> bool:
    return DATA[dataset]["image_size"] >= ONLY_FROM.get(name, 0)


CASES = [(name, dataset) for name in NAMES for dataset in DATA if fits(name, dataset)]


def test_some_configs_are_found():
    assert {"mlp", "small_cnn", "resnet20", "vgg16_bn", "vit_tiny", "torchvision"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_parameters(name):
    assert sum(p.numel() for p in make(name).parameters()) == PARAMS[name]


@pytest.mark.parametrize(("name", "dataset"), CASES)
def test_logits_and_gradients(name, dataset):
    shape = DATA[dataset]
    model = make(name, **shape)
    x = torch.randn(3, shape["in_channels"], shape["image_size"], shape["image_size"])
    logits = model(x)
    assert logits.shape == (3, shape["num_classes"])
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0 or key.endswith("bias"), key


@pytest.mark.parametrize(("name", "dataset"), CASES)
def test_in_eval_an_image_is_classified_by_itself(name, dataset):
    shape = DATA[dataset]
    model = make(name, **shape).eval()
    x = torch.randn(4, shape["in_channels"], shape["image_size"], shape["image_size"])
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_depend_on_the_global_seed(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in make(name).parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@pytest.mark.parametrize("name", NAMES)
def test_activations_neither_vanish_nor_explode_at_the_start(name):
    model = make(name).train()
    deviation = model(torch.randn(16, 3, 32, 32)).std()
    assert 1e-2 < deviation < 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, "ten", 2.0, True])
def test_wrong_sizes_are_refused(name, setting, value):
    with pytest.raises(Exception, match=f"{setting}={value!r} must be a whole number of at least 1"):
        make(name, **{setting: value})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchvision"])
def test_weights_can_be_loaded(name, tmp_path):
    model = make(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    config = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    config.weights = str(tmp_path / "weights.pt")
    shape = {"num_classes": 10, "in_channels": 3, "image_size": 32}
    loaded = instantiate(OmegaConf.create({"data": shape, "model": config}).model).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())
