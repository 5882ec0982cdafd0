"""A model whose tensors are read from the checkpoint on demand, and freed again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.checkpoint.buffers import Buffers
from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.checkpoint_tensors import meta_tensor
from optimum_moe.checkpoint.missing import lacking, refuse_lacking
from optimum_moe.checkpoint.quantized import load_dequantized
from optimum_moe.checkpoint.reader import Entries, take_dtypes
from optimum_moe.checkpoint.shards import bytes_of
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.stored import Running, of_replaced
from optimum_moe.checkpoint.writer import without_bars
from optimum_moe.hf.compat import forget_initialized, load_at_first_use, put_tensor, unloaded_tensor, unloaded_tensors

_LOADING = ("dtype", "attn_implementation", "experts_implementation", "trust_remote_code", "key_mapping")
_LOCAL: dict[str, Any] = {
    "cache_dir": None,
    "force_download": False,
    "proxies": None,
    "local_files_only": True,
    "token": None,
    "revision": None,
    "subfolder": "",
}
_ALIGNMENT = 64
_AHEAD = 1 << 30
"""Maximum bytes to prefetch, far less than the free memory."""


class StreamedModel:
    """The model of a checkpoint on the meta device, whose parts are loaded and freed.

    Tensors that the checkpoint lacks (buffers that transformers computes) are always in memory, with the values that
    `from_pretrained` computes. Tensors are loaded in their stored dtypes, or in those that the model runs in while
    `runs` is set.

    Args:
        source: The checkpoint.
        device: Device of loaded tensors.
    """

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.device = device
        self.model = empty_model(source)
        self.runs = False
        self._runs_in = {name: t.dtype for name, t in self.model.state_dict().items() if t.is_floating_point()}
        take_dtypes(source.skeleton, self._runs_in)
        assert source.headers is not None
        self._stack = ExitStack()
        self._shards = self._stack.enter_context(source.shards())
        self._mapped: set[int] = set()
        self.checkpoint_tensors = source.checkpoint_tensors(self._stored)
        self.mixed = self.checkpoint_tensors.mixed()
        if self.checkpoint_tensors.broken:
            name, reason = next(iter(self.checkpoint_tensors.broken.items()))
            raise ValueError(f"{source.name} does not give {name} ({reason}). Copy or download the checkpoint again.")
        blocks = [found.info.name for found in source.blocks]
        refuse_lacking(source.name, lacking(self.model, self.checkpoint_tensors.tensors.keys(), blocks))
        self._tie_equal_pairs()
        self._aliases = self._find_aliases()
        self._dtypes = {
            name: self.checkpoint_tensors.tensors[first].dtype for name, (first, *_) in self._aliases.items()
        }
        for name, dtype in self._dtypes.items():
            self.at(name).data = self.at(name).data.to(dtype)
        self._entries: dict[str, Entries | None] = {}
        self.resident = _initialize(self.model, set(self._aliases), device)
        self._lent: set[str] = set()
        self.buffers = Buffers()

    def close(self) -> None:
        """Close the files of the checkpoint, and free its buffers."""
        self._stack.close()
        self.buffers = Buffers()

    def names(self, module: str) -> list[str]:
        """Names of a module's tensors that are in the checkpoint, in the order of the model."""
        inside = [f"{module}.{name}" for name, _ in unloaded_tensors(self.model.get_submodule(module))]
        return [name for name in inside if name in self._aliases]

    def load(self, names: Iterable[str]) -> None:
        """Read the named tensors that are still on the meta device."""
        wanted = sorted({self._aliases[name][0] for name in names if self.at(name).is_meta})
        whole = {name: entries for name in wanted if (entries := self.entries(name)) is not None}
        for name, entries in whole.items():
            self._set(name, self._as_asked(name, self._in_one(name, entries)).to(self.device))
        for name, tensor in self.checkpoint_tensors.read(name for name in wanted if name not in whole).items():
            # Tensors without a conversion are views of the file at unaligned addresses.
            mapped = tensor.untyped_storage().data_ptr() in self._mapped
            self._set(name, self._as_asked(name, tensor.clone() if mapped else tensor).to(self.device))
        self._mapped.clear()

    def _as_asked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._runs_in.get(name, tensor.dtype)) if self.runs else tensor

    @contextmanager
    def as_stored(self, module: str, names: Sequence[str] = ()) -> Iterator[None]:
        """Context in which the tensors of a module, or the named ones, are the stored ones, to be cut."""
        runs, self.runs = self.runs, False
        before: dict[str, Running] = {}
        for name in names or self.names(module):
            tensor, stored = self.at(name), self._dtypes.get(name)
            if stored is None:
                continue
            running = self._runs_in.get(name, stored)
            before[name] = Running(tensor.numel(), stored, running)
            # Some routers change their dtype at the first run, which does not restore rounded values.
            if running != stored or tensor.dtype != stored:
                self._set(name, torch.empty_like(tensor, dtype=stored, device="meta"))
                self.load([] if tensor.is_meta else [name])
        try:
            yield
        finally:
            self.runs = runs
        found = {} if names else {f"{module}.{n}": t for n, t in unloaded_tensors(self.model.get_submodule(module))}
        runs_in = of_replaced(before, found)
        for path, tensor in found.items():
            stored = self._dtypes[path] = tensor.dtype
            running = self._runs_in.get(path, runs_in.get(stored, stored))
            if runs and not tensor.is_meta and running != stored:
                tensor.data = tensor.data.to(running)

    def entries(self, name: str) -> Entries | None:
        """The stored tensors whose concatenated bytes are a tensor of the model; None if there are no such tensors."""
        if name not in self._aliases:
            return None
        first = self._aliases[name][0]
        if first not in self._entries:
            self._entries[first] = self.checkpoint_tensors.entries(first)
        return self._entries[first]

    def expect(self, names: Iterable[str]) -> None:
        """Ask the system to prefetch tensors of the model into its page cache."""
        begun = 0
        for entries in (self.entries(name) for name in names):
            for place in (self.byte_range(stored) for entry in entries or () for stored in entry):
                if begun < _AHEAD:
                    place.expect()
                begun += place.size

    def byte_range(self, stored: str) -> ByteRange:
        """The byte range of a stored tensor."""
        return self._shards.byte_range(stored)

    def _in_one(self, name: str, entries: Entries) -> torch.Tensor:
        """Read stored tensors directly into one stack, without an intermediate copy."""
        like = self.checkpoint_tensors.tensors[name]
        tensor, done = self.buffers.empty(like.shape, like.dtype), 0
        if tensor.numel():
            memory = bytes_of(tensor)
            for place in (self.byte_range(stored) for entry in entries for stored in entry):
                place.read_into(memory[done : done + place.size])
                done += place.size
        return tensor

    def free(self, module: str) -> None:
        """Free every tensor of a module, including those that a cut created; they become meta tensors."""
        for name, tensor in list(unloaded_tensors(self.model.get_submodule(module))):
            self._empty(f"{module}.{name}", tensor)

    def free_named(self, names: Iterable[str]) -> None:
        """Free the named tensors, which become meta tensors."""
        for name in names:
            self._empty(name, self.at(name))

    def free_lent(self) -> None:
        """Free the tensors that were loaded at first use."""
        self.free_named(self._lent)
        self._lent.clear()

    @contextmanager
    def loading_at_first_use(self) -> Iterator[None]:
        """Context in which each tensor is loaded at its first use; `free_lent` frees them."""
        self.runs = True
        try:
            with load_at_first_use(self.model, self._lend):
                yield
        finally:
            self.runs = False
            self.free_lent()

    def _stored(self, name: str) -> torch.Tensor:
        tensor = self._shards(name)
        self._mapped.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _lend(self, name: str) -> Any:
        if name not in self._aliases:
            return self.at(name)
        self.load([name])
        self._lent.update(self._aliases[name])
        return self.at(name)

    def _tie_equal_pairs(self) -> None:
        """Tie tensors that the config ties and the checkpoint stores twice, if they are equal, as loading does."""
        for target, origin in list(self.model.all_tied_weights_keys.items()):
            both = target in self.checkpoint_tensors.tensors and origin in self.checkpoint_tensors.tensors
            if not both or self.at(target) is self.at(origin):
                continue
            pair = self.checkpoint_tensors.read([target, origin])
            dtype = self._runs_in[origin]
            if torch.equal(pair[target].to(dtype), pair[origin].to(dtype)):
                put_tensor(self.model, target, self.at(origin))
            else:
                self.model.all_tied_weights_keys.pop(target, None)

    def _find_aliases(self) -> dict[str, list[str]]:
        """All names of each tensor in the checkpoint, first the one that it is read by."""
        by_tensor: dict[int, list[str]] = {}
        for name, tensor in unloaded_tensors(self.model):
            by_tensor.setdefault(id(tensor), []).append(name)
        aliases: dict[str, list[str]] = {}
        for names in by_tensor.values():
            given = [name for name in names if name in self.checkpoint_tensors.tensors]
            if given:
                ordered = [given[0], *(name for name in names if name != given[0])]
                aliases |= dict.fromkeys(names, ordered)
        return aliases

    def at(self, name: str) -> torch.Tensor:
        """The present tensor of that name, which may be on the meta device."""
        return unloaded_tensor(self.model, name)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        old = self.at(name)
        new: torch.Tensor = tensor
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for alias in self._aliases.get(name, [name]):
            put_tensor(self.model, alias, new)

    def _empty(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_meta and name not in self.resident:
            self._set(name, torch.empty_like(tensor, dtype=self._dtypes.get(name), device="meta"))


def empty_model(source: ModelSource) -> PreTrainedModel:
    """The model of `from_pretrained` with every tensor on the meta device; no weight is read."""
    assert source.headers is not None
    cls: Any = type(source.skeleton)
    given = {name: meta_tensor(dtype, shape) for name, (dtype, shape, _) in source.headers.tensors.items()}
    arguments = {key: value for key, value in source.load_arguments.items() if key in _LOADING}
    arguments |= {"state_dict": given, "device_map": {"": "meta"}}
    config = deepcopy(source.config)
    for key in set(source.load_arguments) - set(_LOADING):
        if hasattr(config, key):
            setattr(config, key, source.load_arguments[key])
    with without_bars():
        if source.quantization is not None:
            model, _ = load_dequantized(cls, None, config, source.quantization, source.headers, arguments)  # type: ignore[arg-type]
        else:
            model = cls.from_pretrained(None, config=config, **arguments)
    model.config.name_or_path = str(source.location)
    adjust: Any = getattr(model, "adjust_generation_fn", None)
    if model.can_generate() and adjust is not None:
        adjust(
            None,
            False,
            False,
            str(source.directory),
            trust_remote_code=source.load_arguments.get("trust_remote_code"),
            **_LOCAL,
        )
    return model.eval()


def align(model: PreTrainedModel) -> PreTrainedModel:
    """Copy tensors of mapped files to aligned memory, since some CPU kernels round differently without alignment."""
    for _, tensor in unloaded_tensors(model):
        if tensor.device.type == "cpu" and type(tensor.data) is torch.Tensor and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _initialize(model: PreTrainedModel, given: set[str], device: torch.device) -> set[str]:
    """Initialize tensors that are not in the checkpoint; returns their names."""
    lacking = {name for name, tensor in unloaded_tensors(model) if tensor.is_meta and name not in given}
    for name in lacking:
        old = unloaded_tensor(model, name)
        real = torch.empty_like(old, device="cpu")
        put_tensor(model, name, nn.Parameter(real, old.requires_grad) if isinstance(old, nn.Parameter) else real)
    # The empty model is marked as initialized; clear the marks, so that these tensors are computed.
    forget_initialized(model)
    initialize: Any = model.initialize_weights
    initialize()
    for name in lacking:
        tensor = unloaded_tensor(model, name)
        tensor.data = tensor.data.to(device)
    return lacking
