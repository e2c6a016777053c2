"""Compiled pieces against the same as they are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from steps.engine.model import fusion, pointwise, rotary
from steps.engine.train import loss

TOKENS = 37  # no multiple of a vector

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


def _inputs(dtype: torch.dtype) -> dict[fusion.Fused, tuple]:
    torch.manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    angles = torch.rand(TOKENS, 1, 1, 8, dtype=torch.float64) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    scale = torch.rand(TOKENS, 1, dtype=torch.promote_types(dtype, torch.float32)) + 0.5
    return {
        pointwise._norm: (values(TOKENS, 48), values(48), 1e-5),
        pointwise._norm_backward: (values(TOKENS, 48), values(48), scale, values(TOKENS, 48)),
        pointwise._swiglu: (values(TOKENS, 80),),
        pointwise._swiglu_backward: (values(TOKENS, 80), values(TOKENS, 40)),
        rotary._turned: (values(TOKENS, 2, 4, 16)[:, :, :-1], cos, sin),
        loss._softmax: (values(TOKENS, 301) * 4, torch.arange(TOKENS)[:, None]),
    }


@pytest.fixture
def compiling() -> Iterator[None]:
    assert fusion.start(torch.device("cpu")) == ""
    yield
    fusion.stop()


def test_every_piece_is_in_this_test() -> None:
    assert set(_inputs(torch.float32)) == set(fusion._PIECES)


# bfloat16 has 8 bits: a rounding that falls the other way is 2^-8 of the value; values that pass through a rounded
# intermediate can be off by two of them.
@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"), [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 2**-6, 2**-7)], ids=str
)
def test_compiled_gives_what_is_written(compiling: None, dtype: torch.dtype, relative: float, absolute: float) -> None:
    for piece, arguments in _inputs(dtype).items():
        # Some overwrite what they are given.
        written = piece.plain(*(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments))
        compiled = piece(*(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments))
        torch.testing.assert_close(compiled, written, rtol=relative, atol=absolute, msg=piece.__name__)
    count, seconds = fusion.spent()
    assert count == len(fusion._PIECES)
    assert seconds > 0


def test_rows_of_another_length_do_not_compile_again(compiling: None) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (37, 64, 5):
            pointwise.rms_norm(torch.randn(tokens, 48), torch.randn(48), 1e-5)


def test_without_a_compiler_everything_stays_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found there
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        fault = fusion.start(torch.device("cpu"))
    assert fault
    assert not fusion.active()
    assert fusion.spent() == (0, 0)
