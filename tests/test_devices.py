"""A model on several devices: the same numbers as on one."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from families import plain, tiny, tiny_task
from pretend import KIND, Pretend, spread

import mechkit as mk
from mechkit import sources
from mechkit.backends import memory, replay
from mechkit.errors import LoadError, OptionError, UnsupportedError

BLOCKS = {"gpt2": "transformer.h", "bloom": "transformer.h", "neox": "gpt_neox.layers"}


class _Bytes:
    """Storage is not to be asked for of tensors that are not there."""

    total = 1000

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def pretending(monkeypatch):
    """Devices that there are not; see ``pretend``."""
    own = torch.inference_mode

    def enter(self):
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(self, *_):
        torch.set_grad_enabled(self.before)

    # Tensors that are made of others cannot be made in inference mode.
    monkeypatch.setattr(own, "__enter__", enter)
    monkeypatch.setattr(own, "__exit__", leave)
    monkeypatch.setattr(replay, "OutputBytes", _Bytes)
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, KIND, memory.TOKENS_AT_ONCE["cpu"])  # the same batches
    with Pretend():
        yield


def measured(model: mk.Model, task: mk.Task) -> list[pd.DataFrame]:
    """What the engine is for."""
    frames = [
        mk.patch(model, task, "heads mlps resid q k v patterns", progress=False).frame,
        mk.path_patch(model, task, progress=False).frame,
        mk.path_patch(model, task, ["2.1.q", "2.0.pattern", "m2"], progress=False).frame,
        mk.path_patch(model, task, ["logits", "2.1.q"], through_mlps=False, each=True, progress=False).frame,
        mk.edges(model, task, method="exact", progress=False).frame,
    ]
    circuit = mk.discover(model, task, size=3, progress=False)
    frames.append(circuit.evaluate(model, task, progress=False).curve)
    return frames


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom", "neox"])
def test_the_engine_gives_the_same_on_three_devices(pretending, family):
    task = tiny_task()
    expected = measured(tiny(family), task)
    model = mk.load((spread(plain(family), BLOCKS.get(family, "model.layers")), None))
    assert len({parameter.device for parameter in model.hf.parameters()}) == 3
    for here, there in zip(expected, measured(model, task), strict=True):
        pd.testing.assert_frame_equal(here, there, atol=1e-5)


def test_edits_and_recordings_on_three_devices(pretending):
    task, family = tiny_task(), "llama"
    model = mk.load((spread(plain(family), "model.layers"), None))
    edits = [mk.ablate("1.1", "mean", task), mk.patch_in("2.0.q", torch.ones(8)), mk.scale("m1", 0.5)]
    record = ["1.1.pattern", "1.2.result", "2.0.scores", "resid.3", "m2"]
    here, there = (one.run(task, record=record, edits=edits) for one in (tiny(family), model))
    for name in record:
        assert str(there[name].device) == model.info.device
        assert torch.equal(here[name], there[name].cpu()), name
    assert torch.equal(here.logits, there.logits.cpu())


@pytest.fixture
def folder(tmp_path):
    plain("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_device_map_of_one_device_changes_nothing(folder):
    here, there = mk.load(folder, device="cpu"), mk.load(folder, device_map={"": "cpu"})
    assert here.weights_hash == there.weights_hash
    tables = [mk.patch(model, tiny_task(), progress=False).frame for model in (here, there)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_hooks_of_accelerate_stay_where_they_are():
    from accelerate import dispatch_model

    hf = dispatch_model(plain("llama"), {"": "cpu"}, force_hooks=True)
    inside = [module for module in hf.modules() if "forward" in vars(module)]
    assert inside
    before = [vars(module)["forward"] for module in inside]
    model, task = mk.load((hf, None)), tiny_task()
    for function, options in ((mk.patch, {}), (mk.path_patch, {}), (mk.decompose, {"sources": "heads"})):
        here, there = (function(one, task, progress=False, **options).frame for one in (tiny("llama"), model))
        pd.testing.assert_frame_equal(here, there, check_exact=True)
    assert [vars(module)["forward"] for module in inside] == before


def test_parameters_on_a_disk_are_refused(folder, tmp_path):
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    hf = type(plain("llama")).from_pretrained(folder, device_map=where, offload_folder=str(tmp_path / "off"))
    with pytest.raises(UnsupportedError, match=r"9 parameters on a disk .* such as model.layers.1"):
        mk.load((hf, None))
    with pytest.raises((UnsupportedError, LoadError)):
        mk.load(folder, device_map=where)


def test_odd_device_maps_are_refused(folder, monkeypatch):
    with pytest.raises(OptionError, match=r"device='cpu'.*one or the other"):
        mk.load(folder, device="cpu", device_map="auto")
    with pytest.raises(OptionError, match="stays where it is"):
        mk.load((plain("gpt2"), None), device_map="auto")
    with pytest.raises(OptionError, match="a device for each module"):
        mk.load(folder, device_map=3)
    with pytest.raises(LoadError):
        mk.load(folder, device_map="everywhere")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install accelerate"):
        mk.load(folder, device_map="auto")


def test_a_spread_model_is_not_spread_over_workers(pretending):
    pytest.importorskip("ray", reason='needs Ray: pip install "mechkit-interp[ray]"')
    model = mk.load((spread(plain("llama"), "model.layers"), None))
    with pytest.raises(UnsupportedError, match="on several devices"):
        mk.patch(model, tiny_task(), engine="ray")
