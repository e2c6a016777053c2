"""A base model in one of two forms: as checkpoint_megatron or as checkpoint_hf."""

from steps.errors import Problem


def one_base(megatron: str | None, hf: str | None) -> list[Problem]:
    """The fault of giving none, or both. Keys: base_megatron_path and base_hf_path."""
    if megatron is None and hf is None:
        what = "no base model is given"
        hint = "Set base_megatron_path (the checkpoint that was trained on) or base_hf_path."
        return [Problem(where="base_megatron_path", what=what, hint=hint)]
    if megatron is not None and hf is not None:
        what = f"two base models are given: {megatron} and {hf}"
        return [Problem(where="base_hf_path", what=what, hint="Set one of the two to null.")]
    return []
