"""Checkpoint files: whole or absent, found again, and loaded into classes that know nothing of pruning."""

import copy
import errno
import os
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from actprune.core.errors import StorageError
from actprune.core.record import record_of
from actprune.schedule import Schedule
from actprune.training import AtomicCheckpoints, load_task, newest_checkpoint
from foreign import OneNetwork, OwnForward, SeveralParts, loader

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def run(pruning, trainer, tmp_path):
    """Train and prune with every epoch's checkpoint in ``all``, written by our plugin."""

    def make(module, load=loader, **options):
        callback = pruning(schedule=Schedule("linear", start=1, interval=2, steps=2))
        saved = ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1, save_last=True)
        fitted = trainer(callback, saved, enable_checkpointing=True, plugins=[AtomicCheckpoints()], **options)
        fitted.fit(module, load(), load(32, 1))
        return fitted, callback

    return make


@pytest.mark.parametrize(("kind", "load"), [(OneNetwork, loader), (SeveralParts, SeveralParts.loader)])
def test_load_task_is_load_from_checkpoint(kind, load, run, trainer, tmp_path):
    module = kind()
    run(module, load)
    loaded = load_task(kind, tmp_path / "all" / "last.ckpt")
    assert type(loaded) is kind
    assert same(loaded.state_dict(), module.state_dict())
    early = load_task(kind, tmp_path / "all" / "epoch=0.ckpt")
    assert sum(p.numel() for p in early.parameters()) == sum(p.numel() for p in kind().parameters())
    results = [trainer().validate(m, load(32, 1), verbose=False) for m in (module, loaded)]
    assert results[0] == results[1]


def test_load_task_takes_hyperparameters_options_and_runs_hooks(run, tmp_path):
    class Hooked(OwnForward):
        seen = None

        def on_load_checkpoint(self, checkpoint):
            self.seen = self.conv1.out_channels

    module = Hooked(width=20)
    run(module)
    loaded = load_task(Hooked, tmp_path / "all" / "last.ckpt", map_location="cpu")
    assert loaded.hparams.width == 20
    assert loaded.seen == module.conv1.out_channels == loaded.conv1.out_channels < 20
    assert record_of(loaded).to_dict() == record_of(module).to_dict()


def test_load_task_in_a_constructor_loads_another_one_of_the_class(run, tmp_path):
    class Taught(OneNetwork):
        teacher = ()

        def __init__(self, teacher=None):
            super().__init__()
            self.save_hyperparameters()
            if teacher is not None:
                self.teacher = (load_task(Taught, teacher),)

    run(Taught())
    last = str(tmp_path / "all" / "last.ckpt")
    loaded = load_task(Taught, last, teacher=last)
    assert same(loaded.state_dict(), loaded.teacher[0].state_dict())
    assert record_of(loaded.model).to_dict() == record_of(loaded.teacher[0].model).to_dict() != {}
    assert "on_load_checkpoint" not in vars(Taught)
    with pytest.raises(FileNotFoundError):
        load_task(Taught, tmp_path / "none.ckpt")
    assert "on_load_checkpoint" not in vars(Taught)


def test_a_loaded_task_is_pruned_on(run, pruning, trainer, tmp_path):
    """A second run starts from the pruned network: its budget counts from the original, and its checkpoints load."""
    module = OneNetwork()
    run(module)
    loaded, callback = load_task(OneNetwork, tmp_path / "all" / "epoch=3.ckpt"), pruning()
    saved = ModelCheckpoint(tmp_path / "second", "{epoch}", save_top_k=-1)
    trainer(callback, saved, enable_checkpointing=True).fit(loaded, loader(), loader(32, 1))
    assert callback.pruner.params <= 0.4 * sum(p.numel() for p in OneNetwork().parameters())
    again = load_task(OneNetwork, tmp_path / "second" / "epoch=5.ckpt")
    assert same(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("how", ["validate", "test", "predict"])
def test_evaluation_with_earlier_and_later_checkpoints(how, run, trainer, pruning, tmp_path):
    """In the process that pruned, and in a fresh module; one after the other in any order."""

    class Predicting(OwnForward):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    module = Predicting()
    fitted, _ = run(module)
    for epoch in (0, 5, 2, 3):
        path = tmp_path / "all" / f"epoch={epoch}.ckpt"
        extra = {} if how == "predict" else {"verbose": False}
        here = getattr(fitted, how)(module, loader(32, 1), ckpt_path=path, **extra)
        fresh = getattr(trainer(pruning()), how)(Predicting(), loader(32, 1), ckpt_path=path, **extra)
        if how == "predict":
            assert all(torch.equal(a, b) for a, b in zip(here, fresh, strict=True))
        else:
            assert here == fresh
        assert same(module.state_dict(), torch.load(path, weights_only=True)["state_dict"])


def test_warm_start_from_a_run_without_the_callback(pruning, trainer, tmp_path):
    plain = OneNetwork()
    saved = ModelCheckpoint(tmp_path / "plain", "{epoch}", save_top_k=-1)
    trainer(saved, enable_checkpointing=True, max_epochs=3).fit(plain, loader(), loader(32, 1))
    module, callback = OneNetwork(), pruning()
    trainer(callback, max_epochs=8).fit(module, loader(), loader(32, 1), ckpt_path=tmp_path / "plain" / "epoch=2.ckpt")
    assert callback.history[0]["epoch"] == 3
    assert callback.pruner.params <= 0.4 * callback.pruner.params_before


def test_a_finished_run_is_resumed_to_nothing_but_knows_its_network(run, pruning, trainer, tmp_path):
    module = OneNetwork()
    _, first = run(module)
    again, callback = OneNetwork(), pruning(schedule=Schedule("linear", start=1, interval=2, steps=2))
    trainer(callback).fit(again, loader(), loader(32, 1), ckpt_path=tmp_path / "all" / "last.ckpt")
    assert same(again.state_dict(), module.state_dict())
    assert callback.pruner.params == first.pruner.params
    assert callback.stopped["reason"] == "budget"


class Counting:
    """A loader that remembers how far it is: what a run that is cut off inside an epoch needs to go on exactly."""

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next %= len(self.batches)
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next % len(self.batches)}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_checkpoints_inside_an_epoch(pruning, trainer, tmp_path):
    start, batches = OneNetwork(), list(loader())
    options = {"schedule": Schedule("linear", start=1, interval=1, steps=2)}
    module, saved = copy.deepcopy(start), ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_train_steps=2)
    trainer(pruning(**options), saved, enable_checkpointing=True).fit(module, Counting(batches), loader(32, 1))
    for step in (2, 6, 8, 10, 14, 16, 18, 22, 30, 34):
        resumed, callback = copy.deepcopy(start), pruning(**options)
        path = tmp_path / "all" / f"step={step}.ckpt"
        trainer(callback).fit(resumed, Counting(batches), loader(32, 1), ckpt_path=path)
        if step == 18:  # after the last batch and before the validation of epoch 2: Lightning leaves that validation out
            assert [event["epoch"] for event in callback.events] == [2, 4]
            assert callback.stopped["reason"] == "budget"
        else:
            assert same(resumed.state_dict(), module.state_dict()), step


# files


def test_the_newest_whole_checkpoint_is_found(run, tmp_path):
    module = OneNetwork()
    fitted, _ = run(module)
    folder = tmp_path / "all"
    assert newest_checkpoint(folder) == folder / "last.ckpt"
    for name, content in (("empty", b""), ("half", (folder / "last.ckpt").read_bytes()[:5000]), ("text", b"hello")):
        time.sleep(0.01)
        (folder / f"{name}.ckpt").write_bytes(content)
    fitted.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    assert newest_checkpoint(folder) == folder / "last.ckpt"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_that_holds_a_class_is_not_passed_over(tmp_path):
    torch.save({"optimizer_states": [], "hyper_parameters": {"kind": OneNetwork}}, tmp_path / "whole.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "whole.ckpt"


def test_a_write_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    writer, path = AtomicCheckpoints(), tmp_path / "deep" / "one.ckpt"
    writer.save_checkpoint({"value": 1}, path)

    def half(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(StorageError, match="one.ckpt could not be written .*No space left.*written before are intact"):
        writer.save_checkpoint({"value": 2}, path)
    monkeypatch.undo()
    assert writer.load_checkpoint(path) == {"value": 1}
    assert [p.name for p in path.parent.iterdir()] == ["one.ckpt"]


def test_a_full_disk_in_training_ends_in_one_message(pruning, trainer, tmp_path):
    """A real one: a file cannot grow beyond the limit that the kernel is given."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    module, saved = OneNetwork(), ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    fitted = trainer(pruning(), saved, enable_checkpointing=True, plugins=[AtomicCheckpoints()], max_epochs=3)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(StorageError, match="could not be written"):
            fitted.fit(module, loader(), loader(32, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "c").iterdir())


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="make the folder writable"):
        AtomicCheckpoints().save_checkpoint({}, tmp_path / "taken" / "x.ckpt")


def test_remote_paths_are_left_to_lightning(monkeypatch):
    asked = []
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", lambda content, path: asked.append(path))
    AtomicCheckpoints().save_checkpoint({}, "memory://bucket/x.ckpt")
    assert asked == ["memory://bucket/x.ckpt"]


def test_newest_checkpoint_may_lie_in_a_folder_that_a_metric_of_its_name_makes(tmp_path):
    path = tmp_path / "prune" / "step=1.ckpt"
    path.parent.mkdir()
    torch.save({"optimizer_states": []}, path)
    assert newest_checkpoint(tmp_path) == path
