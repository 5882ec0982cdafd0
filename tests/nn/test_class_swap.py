"""Swapped classes: shared, copied and pickled like any other."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from optimum_moe.nn import MappedRouter, MergedExpertLayer, SwappedModule, swapped_class
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import build, inputs_for, logits_of

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "switch_transformers")


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Doubled(SwappedModule):
    def forward(self, *args):
        return 2 * super().forward(*args)


class Kernelled(nn.Linear):
    kernel_layer_name = "SomeHubKernel"


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_bit_equal_and_share_their_classes(build_mapped, family, copied):
    model, inputs = build_mapped(family), inputs_for(family)
    twin = copied(model)
    assert torch.equal(logits_of(twin, inputs), logits_of(model, inputs))
    assert not torch.equal(logits_of(twin, inputs), logits_of(build(family), inputs))
    swapped = [name for name, module in model.named_modules() if isinstance(module, SwappedModule)]
    assert len(swapped) == len(find_blocks(model)) * (1 if family == "switch_transformers" else 2)
    for name in swapped:
        assert type(twin.get_submodule(name)) is type(model.get_submodule(name))
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.abs().max() > 0 for parameter in model.parameters() if parameter.dim() > 1)


def test_one_class_for_each_pair():
    cls = swapped_class(Doubled, nn.Linear)
    assert swapped_class(Doubled, nn.Linear) is cls
    assert swapped_class(Doubled, Kernelled) is not cls
    assert swapped_class(MappedRouter, nn.Linear) is not cls
    assert cls.__name__ == "DoubledLinear"
    assert cls.__mro__[1:3] == (Doubled, SwappedModule)
    assert cls.original_class is nn.Linear
    assert isinstance(cls(2, 2), nn.Linear)


def test_a_live_module_keeps_its_tensors_and_hooks():
    linear, calls = nn.Linear(3, 2), []
    linear.register_forward_hook(lambda *_: calls.append(1))
    weight, names, input_ = linear.weight, list(linear.state_dict()), torch.randn(4, 3)
    before = linear(input_)
    linear.__class__ = swapped_class(Doubled, nn.Linear)
    assert torch.equal(linear(input_), 2 * before)
    assert linear.weight is weight
    assert list(linear.state_dict()) == names
    assert len(calls) == 2


def test_swapping_twice_is_refused():
    cls = swapped_class(Doubled, nn.Linear)
    with pytest.raises(ValueError, match="DoubledLinear has Doubled in front already"):
        swapped_class(Doubled, cls)


def test_hub_kernels_do_not_replace_a_swapped_forward(build_mapped):
    assert Kernelled.kernel_layer_name == "SomeHubKernel"
    assert swapped_class(MergedExpertLayer, Kernelled).kernel_layer_name is None
    for family in FAMILIES:
        model = build_mapped(family)
        swapped = [module for module in model.modules() if isinstance(module, SwappedModule)]
        assert [module.kernel_layer_name for module in swapped] == [None] * len(swapped)
