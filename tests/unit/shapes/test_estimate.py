"""Whether layers are computed again, and what is said where the memory is not there."""

from __future__ import annotations

import pytest

from steps.config.peft import Quantization, section_class
from steps.shapes.account import Account
from steps.shapes.estimate import Batch, Choice, Estimate
from steps.shapes.presets import preset

MODEL, SECTION = preset("smollm2-135m"), section_class("lora")(dim=16)
BATCH = Batch(2048, rows=2)
ESTIMATE = Estimate.of(SECTION, MODEL, "float32", BATCH)
PLAIN, LESS = (ESTIMATE.peak(recompute=recompute) for recompute in (False, True))


def choose(asked: str | None, available: int | None, section=SECTION, batch: Batch = BATCH) -> Choice:
    return Choice.of(Estimate.of(section, MODEL, "float32", batch), asked, available, section, batch)


@pytest.mark.parametrize(
    ("asked", "available", "recompute", "warns"),
    [
        ("auto", PLAIN, False, False),
        ("auto", PLAIN - 1, True, False),
        ("auto", LESS, True, False),
        ("auto", LESS - 1, True, True),
        ("auto", None, False, False),
        ("full", PLAIN, True, False),
        ("full", LESS - 1, True, True),
        (None, PLAIN, False, False),
        (None, PLAIN - 1, False, True),
        (None, None, False, False),
    ],
)
def test_the_decision(asked, available, recompute, warns):
    choice = choose(asked, available)
    assert (choice.recompute, bool(choice.warning)) == (recompute, warns)
    assert bool(choice.reason) == (asked == "auto")


def test_the_reason_says_both_figures():
    assert choose("auto", 5 * 10**9).reason.startswith("auto: full; the ")
    assert "are above the 5.00 GB available, with it " in choose("auto", 5 * 10**9).reason
    assert "are within the 99.00 GB available" in choose("auto", 99 * 10**9).reason


def test_the_warning_names_what_helps_and_nothing_that_is_done_already():
    told = choose(None, 10**9).warning
    assert (
        "is above the 1.00 GB available. What helps: train.micro_batch_size=1, train.recompute_granularity=full ("
        in told
    )
    assert "peft.quantization.type=nf4" in told
    quantized = section_class("lora")(dim=16, quantization=Quantization())
    told = choose("full", 10**9 // 2, quantized, Batch(2048)).warning
    assert not any(name in told for name in ("micro_batch_size", "recompute_granularity", "nf4"))
    assert told.endswith("What helps: rows packed shorter (pack_size)")


def test_a_gpu_does_not_hold_the_process():
    there = {row.what for row in Estimate.of(SECTION, MODEL, "float32", BATCH, on_gpu=True).held}
    assert {row.what for row in ESTIMATE.held} - there == {"the process itself"}


def test_one_quantized_weight_is_wide_while_it_is_used():
    quantized = section_class("lora")(dim=16, quantization=Quantization())
    largest = 2 * MODEL.ffn_hidden_size * MODEL.hidden_size
    for precision, width in (("float32", 4), ("bfloat16", 2)):
        assert Estimate.of(quantized, MODEL, precision, BATCH).passing == largest * (4 + width)
    assert ESTIMATE.passing == 0


def test_an_account_with_rows_is_the_estimate():
    account = Account.of(SECTION, MODEL, "float32", BATCH, asked="auto", available=LESS, rows_per_step=16)
    assert (account.nbytes, account.recompute, account.tokens_per_step) == (LESS, True, 16 * 2048)
    assert account.notes == (f"train.recompute_granularity={choose('auto', LESS).reason}",)
    assert not account.warnings
    assert Account.of(SECTION, MODEL, "float32", BATCH, asked="auto", available=10**6).warnings
