import pytest
import torch
from torch import nn

from actprune.core.errors import ConfigError
from actprune.models.weights import load_weights


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(model.state_dict()[k], v) for k, v in other.state_dict().items())


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "module.net.", "model.module."])
@pytest.mark.parametrize("wrap", [False, True])
def test_accepted_forms(tmp_path, prefix, wrap):
    source, target = net(), net()
    state = prefixed(source.state_dict(), prefix)
    torch.save({"state_dict": state, "epoch": 3} if wrap else state, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(target, source)


def test_a_prefix_that_the_model_has_itself_stays(tmp_path):
    source, target = nn.ModuleDict({"net": net()}), nn.ModuleDict({"net": net()})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(target, source)


def test_files_from_before_batches_were_counted(tmp_path):
    source, target = net(), net()
    torch.save({k: v for k, v in source.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(target, source)


def test_mismatch_lists_names_and_leaves_the_model(tmp_path):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in net().state_dict().items()}
    del state["0.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["2.weight"] = torch.zeros(5, 4)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: 2.weight ((5, 4) in the file, (2, 4) in the model)" in message
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_long_lists_are_cut_short(tmp_path):
    torch.save({f"layer{i}": torch.zeros(1) for i in range(9)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"9 unexpected: layer0, layer1, layer2, layer3, layer4 and 4 more"):
        load_weights(net(), tmp_path / "w.pt")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="weights file .*/none.pt does not exist"):
        load_weights(net(), tmp_path / "none.pt")


def test_code_in_the_file_is_not_run(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="cannot be read as tensors only .*save model.state_dict"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b"neither zip nor pickle"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as tensors only"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, torch.zeros(2), {"state_dict": {}}])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="holds no state dict"):
        load_weights(net(), tmp_path / "w.pt")
