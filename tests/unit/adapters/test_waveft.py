from __future__ import annotations

import pytest
from support.packed import SHAPE

from steps.config.peft.waveft import WaveFT
from steps.shapes.account import misfits, trainable


def test_more_coefficients_than_values_are_refused_with_the_bound():
    (problem,) = misfits(WaveFT(target_modules=["linear_qkv", "linear_proj"]), SHAPE)
    assert problem.where == "peft.n_frequency"
    assert str(problem) == (
        "peft.n_frequency: 2592 coefficients are more than linear_proj has values: it is [32, 32] (and 1 more kinds "
        "of linear). Allowed: 1 to 1024"
    )
    assert not list(misfits(WaveFT(n_frequency=1024), SHAPE))


def test_parameters_depend_on_the_number_of_linears_alone():
    assert trainable(WaveFT(n_frequency=100), SHAPE) == 2 * 4 * 100


def test_another_wavelet_is_refused():
    with pytest.raises(ValueError, match="Input should be 'db1'"):
        WaveFT(wavelet_family="sym2")
