"""Generation with kept keys and values against transformers, and against computing every text anew."""

from __future__ import annotations

import pytest
import torch
from parity.test_families import converted
from support.models import FAMILIES

from steps.engine.model import generate as module
from steps.engine.model.cache import Cache
from steps.engine.model.generate import Sampling, generate

transformers = pytest.importorskip("transformers", reason="extra parity")

PROMPTS = [[5, 9, 31], [77], list(range(40, 70)), [3, 3, 3, 3, 8, 1]]
TOKENS = 24


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(name, tmp_path):
    model, decoder = converted(name, tmp_path)
    eos = 13
    expected = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=TOKENS, eos_token_id=eos, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        expected.append(out[: out.index(eos)] if eos in out else out)
    assert generate(decoder, PROMPTS, TOKENS, {eos}) == expected
    assert [generate(decoder, [prompt], TOKENS, {eos})[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_step_has_the_hidden_states_of_the_whole_text(name, tmp_path):
    _, decoder = converted(name, tmp_path)
    texts = [list(prompt) for prompt in PROMPTS]
    cache, generator = Cache(decoder, 64), torch.Generator().manual_seed(0)

    def whole():
        return torch.stack([decoder.hidden_states(torch.tensor(text), [0, len(text)])[-1] for text in texts])

    torch.testing.assert_close(cache.begin(texts), whole(), rtol=1e-5, atol=1e-5)
    for step in range(12):
        if step == 5:  # two texts have ended
            cache.keep(torch.tensor([0, 2]))
            texts = [texts[0], texts[2]]
        tokens = torch.randint(97, (len(texts),), generator=generator)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        torch.testing.assert_close(cache.append(tokens), whole(), rtol=1e-5, atol=1e-5)


def test_an_answer_ends_before_its_stop_token_and_at_the_limit(tmp_path):
    _, decoder = converted("llama", tmp_path)
    (whole,) = generate(decoder, [PROMPTS[0]], 10)
    assert len(whole) == 10
    assert generate(decoder, [PROMPTS[0]], 10, {whole[4]}) == [whole[: whole.index(whole[4])]]
    assert generate(decoder, [PROMPTS[0]], 10, {whole[0]}) == [[]]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.6), (20, 0.7), (1, None), (None, 1e-6), (None, 1.0)])
def test_what_top_k_and_top_p_leave_is_what_transformers_leaves(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(7, 97, generator=torch.Generator().manual_seed(1))
    expected = logits.clone()
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = module._cut(logits, Sampling(1.0, top_k, top_p))
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[~found.isinf()], logits[~found.isinf()])


def test_draws_depend_on_the_seed_and_the_place_of_the_prompt_alone(tmp_path):
    _, decoder = converted("llama", tmp_path)
    sampling = Sampling(temperature=1.0, seed=4)
    together = generate(decoder, PROMPTS, 12, sampling=sampling)
    apart = [generate(decoder, [prompt], 12, sampling=sampling, first=place)[0] for place, prompt in enumerate(PROMPTS)]
    assert together == apart
    assert generate(decoder, PROMPTS, 12, sampling=Sampling(1.0, seed=5)) != together
    twice = generate(decoder, [PROMPTS[0], PROMPTS[0]], 12, sampling=sampling)
    assert twice[0] != twice[1]
    # A cold temperature comes to the likeliest token.
    assert generate(decoder, PROMPTS, 12, sampling=Sampling(1e-4)) == generate(decoder, PROMPTS, 12)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    streams = [torch.Generator().manual_seed(0)]
    drawn = [module._chosen(logits, Sampling(0.5), streams)[0] for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    # Four standard errors of a share of one half.
    torch.testing.assert_close(shares, torch.softmax(logits[0] / 0.5, 0), rtol=0, atol=0.032)
