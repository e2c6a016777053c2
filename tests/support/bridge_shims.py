"""What lets genuine Megatron-Bridge be imported on a machine without CUDA, Transformer Engine and its other packages.

Importing this module changes the process for good: only scripts that the tests start as subprocesses import it, first.

Megatron-Core looks for Transformer Engine when its own modules are imported, so these come first and find none.
Megatron-Bridge imports several CUDA packages without asking; it gets empty modules in which every name is a class. That
is enough to import it, to build configurations and to adapt models of Megatron-Core's local layers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types

ABSENT = (
    "transformer_engine", "mamba_ssm", "causal_conv1d", "fla", "nvidia_resiliency_ext", "wandb", "mlflow", "open_clip",
    "timm", "qwen_vl_utils", "modelopt", "megatron.energon",
)  # fmt: skip


class _Named(type):
    """Of the stand-in classes: any name inside one is another (`te.ops.Sequential`)."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return _stand_in(name)

    def __getitem__(cls, item: object) -> object:
        return cls


def _stand_in(name: str) -> object:
    import torch

    def take_anything(self: torch.nn.Module, *arguments: object, **named: object) -> None:
        torch.nn.Module.__init__(self)

    return _Named(name, (torch.nn.Module,), {"__init__": take_anything})


class _StandIn(types.ModuleType):
    """A module in which every name is a subscriptable nn.Module class."""

    __path__: list[str] = []  # so that submodules are looked for, here

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _stand_in(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == absent or name.startswith(absent + ".") for absent in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Put the shims in place. Call before anything of Megatron-Bridge is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]
    for name in (
        "models.gpt.gpt_layer_specs",
        "transformer.moe.experts",
        "extensions",
        "models.mamba.mamba_layer_specs",
    ):
        importlib.import_module(f"megatron.core.{name}")
    sys.meta_path.append(_Finder())  # last: what is really installed is used
    importlib.import_module("megatron.bridge.peft.utils").HAVE_TE = False
    matcher = importlib.import_module("megatron.bridge.peft.module_matcher")
    for kind in ("COL", "LN_COL", "ROW"):  # stand-ins for these are no classes to look for
        setattr(matcher, f"HAVE_TE_{kind}_LINEAR", False)
    from megatron.core import tensor_parallel

    tensor_parallel.get_cuda_rng_tracker().fork = lambda name=None: contextlib.nullcontext()
