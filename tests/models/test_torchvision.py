from urllib.error import URLError

import pytest
import torch
from torchvision import models

from actprune.core.errors import ConfigError, DataError
from actprune.models.torchvision import torchvision_model


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenet_v3_small", 32),
        ("squeezenet1_1", 32),
        ("shufflenet_v2_x0_5", 32),
        ("googlenet", 32),
        ("vit_b_32", 32),
    ],
)
def test_models_return_logits_in_both_modes(name, size):
    model = torchvision_model(name, num_classes=7, image_size=size)
    x = torch.randn(2, 3, size, size)
    assert model.train()(x).shape == (2, 7)
    assert model.eval()(x).shape == (2, 7)


def test_every_model_can_be_built():
    with torch.device("meta"):
        for name in models.list_models(module=models):
            # These compute with tensors while they are made, which needs a device with data.
            if not name.startswith(("regnet", "googlenet", "inception")):
                torchvision_model(name, num_classes=5, image_size=224)


def test_models_with_position_tables_are_made_for_the_image_size():
    with torch.device("meta"):
        assert torchvision_model("vit_b_16", 10, image_size=64).encoder.pos_embedding.shape == (1, 17, 768)
        assert torchvision_model("maxvit_t", 10, image_size=224)


def test_unknown_name_lists_close_ones():
    with pytest.raises(ConfigError, match="no classification model 'resnet19'; close names: .*resnet18"):
        torchvision_model("resnet19")


def test_detection_models_are_no_classifiers():
    with pytest.raises(ConfigError, match="no classification model 'ssd300_vgg16'"):
        torchvision_model("ssd300_vgg16")


def test_grey_images_need_three_channels():
    with pytest.raises(ConfigError, match="in_channels=1 but torchvision's models take 3; set data.in_channels=3"):
        torchvision_model("resnet18", in_channels=1)


def test_unknown_weights_list_the_known():
    with pytest.raises(ConfigError, match="no weights 'IMAGENET'; it has IMAGENET1K_V1"):
        torchvision_model("resnet18", weights="IMAGENET")


def test_weights_for_other_classes():
    with pytest.raises(ConfigError, match="weights DEFAULT of resnet18 are for 1000 classes, num_classes=10"):
        torchvision_model("resnet18", num_classes=10, weights="DEFAULT")


def test_image_size_that_the_model_cannot_have():
    with pytest.raises(ConfigError, match="vit_b_16 cannot be made for image_size=30"):
        torchvision_model("vit_b_16", image_size=30)


def test_weights_are_read_from_torch_hubs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", _read_from_hub)
    source = models.squeezenet1_1()
    (tmp_path / "checkpoints").mkdir()
    file = models.SqueezeNet1_1_Weights.DEFAULT.url.split("/")[-1]
    torch.save(source.state_dict(), tmp_path / "checkpoints" / file)
    loaded = torchvision_model("squeezenet1_1", num_classes=1000, weights="DEFAULT")
    assert torch.equal(loaded.features[0].weight, source.features[0].weight)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pretrained_models_have_no_training_heads_either(name, monkeypatch):
    with torch.device("meta"):
        state = models.get_model(name, init_weights=False, transform_input=True).state_dict()
        monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *args, **kwargs: state)
        model = torchvision_model(name, num_classes=1000, weights="DEFAULT")
    assert not [key for key in model.state_dict() if "aux" in key.lower()]
    assert model.aux_logits is False


def _read_from_hub(weights, *args, **kwargs):
    """Without the check of the hash, which is the published file's."""
    return torch.hub.load_state_dict_from_url(weights.url, weights_only=True)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_without_network_the_error_says_where_the_file_belongs(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError) as caught:
        torchvision_model(name, num_classes=1000, weights="DEFAULT")
    message = str(caught.value)
    assert "no route to host" in message
    assert f"{tmp_path}/checkpoints/{name}-" in message
    assert "https://download.pytorch.org/models/" in message
