"""Compiled and wrapped models: the module inside is pruned, and files and records do not care who was wrapped when."""

import copy

import pytest
import torch
from torch import nn

from actprune import Budget, apply_record, criteria, load_pruned, prune, save_pruned
from actprune.core.errors import ConfigError, SurgeryError
from actprune.core.record import SurgeryRecord, record_of
from actprune.core.wrappers import unwrapped
from zoo import build

WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}
OPTIONS = {"criterion": criteria.Magnitude(), "budget": Budget(params=0.5)}


@pytest.mark.parametrize("pruned_as", WRAPPERS)
@pytest.mark.parametrize("loaded_as", WRAPPERS)
def test_files_go_from_any_wrapper_into_any(pruned_as, loaded_as, tmp_path):
    model, example = build("ConvBn")
    wrapper = WRAPPERS[pruned_as](model)
    assert unwrapped(wrapper) is model
    record = prune(wrapper, example, **OPTIONS)
    assert record.steps
    assert record_of(wrapper) is record_of(model) is record
    assert set(record.shapes) <= set(model.state_dict())
    for saved in (wrapper, model):
        fresh = build("ConvBn", 5)[0]
        assert load_pruned(wrapped := WRAPPERS[loaded_as](fresh), save_pruned(saved, tmp_path / "pruned.pt")) is wrapped
        assert torch.equal(fresh.eval()(example), model.eval()(example))
        assert record_of(fresh).to_dict() == record.to_dict()
    twin = build("ConvBn", 6)[0]
    apply_record(WRAPPERS[loaded_as](twin), record)
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    prune(model, example, criterion=criteria.Magnitude(), budget=Budget(params=0.4))  # goes on from the original's size
    assert len(record_of(wrapper).steps) == 2


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_records_that_were_made_of_a_wrapper(prefix):
    model, example = build("ConvBn")
    state = copy.deepcopy(prune(model, example, **OPTIONS).to_dict())
    for key in ("removed", "shapes", "attributes", "widths"):
        state[key] = {prefix + name: value for name, value in state[key].items()}
    fresh = apply_record(build("ConvBn", 5)[0], SurgeryRecord.from_dict(state))
    assert record_of(fresh).to_dict() == record_of(model).to_dict()


class Versioned(nn.Linear):
    """Refuses a state dict that does not say by which version of it, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_keeps_the_versions_of_its_modules(prefix, tmp_path):
    def made():
        return nn.Sequential(Versioned(4, 8), nn.ReLU(), Versioned(8, 3))

    model, x = made(), torch.rand(2, 4)
    prune(model, x, **OPTIONS)
    content = torch.load(save_pruned(model, path := tmp_path / "pruned.pt"), weights_only=True)
    content["state_dict"] = (nn.ModuleDict({"module": model}) if prefix else model).state_dict()
    torch.save(content, path)
    assert torch.equal(load_pruned(made(), path)(x), model(x))


def test_a_child_called_module_is_no_wrapper():
    net, example = build("ConvBn")
    model = nn.Sequential()
    model.add_module("module", net)
    record = prune(model, example, **OPTIONS)
    assert all(name.startswith("module.") for name in record.shapes)
    fresh = nn.Sequential()
    fresh.add_module("module", build("ConvBn", 5)[0])
    assert record_of(apply_record(fresh, record)).to_dict() == record.to_dict()


def test_a_model_without_values_takes_those_of_the_file(tmp_path):
    model, example = build("ConvBn")
    prune(model, example, **OPTIONS)
    path = save_pruned(model, tmp_path / "pruned.pt")
    with torch.device("meta"):
        fresh = build("ConvBn", 5)[0]
    load_pruned(fresh, path)
    assert torch.equal(fresh.eval()(example), model.eval()(example))
    with torch.device("meta"):
        fresh = build("ConvBn", 5)[0]
        fresh.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(SurgeryError, match="table is on the meta device and no state dict holds its values"):
        load_pruned(fresh, path)
    assert not record_of(fresh)


def test_files_and_records_of_another_kind(tmp_path):
    model, example = build("ConvBn")
    record = prune(model, example, **OPTIONS)
    content = torch.load(save_pruned(model, tmp_path / "pruned.pt"), weights_only=True)
    fresh = build("ConvBn", 5)[0]
    torch.save({**content, "format": "actprune.pruned.v9"}, tmp_path / "newer.pt")
    torch.save(model, tmp_path / "whole.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name, match in [
        ("newer.pt", "has the format actprune.pruned.v9, this actprune reads actprune.pruned.v1"),
        ("whole.pt", "cannot be read .UnpicklingError.: save_pruned did not write it"),
        ("junk.pt", "save_pruned did not write it, or it is damaged"),
    ]:
        with pytest.raises(ConfigError, match=match):
            load_pruned(fresh, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_pruned(fresh, tmp_path / "absent.pt")
    with pytest.raises(ConfigError, match="record is of type dict; pass what prune returned, or SurgeryRecord.from_dict"):
        apply_record(fresh, record.to_dict())
    assert not record_of(fresh)


def test_tied_weights_of_a_model_without_values_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 20))
        model[3].weight = model[0].weight
        return model

    model, x = tied(), torch.randint(0, 20, (2, 4))
    prune(model, x, criterion=criteria.Magnitude(), budget=Budget(params=0.8))
    path = save_pruned(model, tmp_path / "pruned.pt")
    with torch.device("meta"):
        fresh = tied()
    load_pruned(fresh, path)
    assert fresh[3].weight is fresh[0].weight
    assert torch.equal(fresh(x), model(x))
