"""How config.json of Hugging Face describes rotary positions and windows of attention.

Rotary positions are one description for all layers, or one for layers with a window and one for the
others (`HfKind.local_theta`). Their spelling changed twice: `rope_scaling` with `type`, with
`rope_type`, and `rope_parameters`; all are read, the last two are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from motet.models.config import ModelConfig, ModelError
from motet.models.hf_kinds import HfKind
from motet.models.rope_scaling import NOT_HELD, ORIGINAL, ROPE_KINDS, Scaling, longest, scaling_of

FULL, SLIDING = "full_attention", "sliding_attention"
# model_type -> every n-th layer reads everything, where config.json does not say which do
FULL_EVERY = {"olmo3": 4, "gemma2": 2, "gemma3_text": 6}
EVERYWHERE = ("mistral", "phi3")
"""Classes with a window in all layers, or in none."""


def rope_of(text: Mapping[str, Any], kind: HfKind) -> tuple[float, Scaling | None, float | None]:
    """Return theta, the scaling, and the theta of layers with a window where it is their own.

    Raises:
        ModelError: a kind of scaling that cannot be trained.
    """
    new, old = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, Mapping):
            raise ModelError(f"config.json: {key}={value!r} is no object")
    if kind.local_theta is None:
        found = old or new  # as transformers does
        theta = found.get("rope_theta") or text.get("rope_theta") or kind.theta
        return float(theta), _scaling(found, text, kind), None
    full, local = dict(new.get(FULL) or {}), new.get(SLIDING) or {}
    if new and not (full or local):
        raise ModelError(
            f"config.json: rope_parameters={dict(new)!r} does not say which layers it is for; it "
            f"has {FULL} and {SLIDING} in {kind.name}"
        )
    full |= old
    theta = float(full.get("rope_theta") or text.get("rope_theta") or kind.theta)
    local_theta = float(
        local.get("rope_theta") or text.get("rope_local_base_freq") or kind.local_theta
    )
    scaling, local_scaling = (_scaling(x, text, kind) for x in (full, local))
    if (theta, scaling) == (local_theta, local_scaling):
        return theta, scaling, None
    if local_scaling is not None:
        raise ModelError(
            f"config.json: rope_parameters.{SLIDING} scales rotary positions otherwise than "
            f"{FULL}, which is not supported; only 'default' is"
        )
    return theta, scaling, local_theta


def _scaling(found: Mapping[str, Any], text: Mapping[str, Any], kind: HfKind) -> Scaling | None:
    name = found.get("rope_type") or found.get("type") or "default"
    part = found.get("partial_rotary_factor")
    if part not in (None, 1, 1.0):
        raise ModelError(f"config.json: partial_rotary_factor={part!r} is not supported; only 1 is")
    if name == "default":
        return None
    if name not in ROPE_KINDS or "rope_scaling" not in kind.able:
        why = f": {NOT_HELD[name]}" if name in NOT_HELD else ""
        able = ["default", *(ROPE_KINDS if "rope_scaling" in kind.able else ())]
        raise ModelError(
            f"config.json: rope_scaling.rope_type={name!r} is not supported in {kind.name}{why}; "
            f"only {', '.join(able)}"
        )
    needed, optional = ROPE_KINDS[name]
    kept = {key: found[key] for key in (*needed, *optional) if found.get(key)}
    if ORIGINAL in needed:
        # Of one description for all layers, the key beside it goes first, as in transformers.
        beside = text.get(ORIGINAL) if kind.local_theta is None and name != "dynamic" else None
        length = text.get("max_position_embeddings")
        kept[ORIGINAL] = beside or (kept.get(ORIGINAL) if name != "dynamic" else None) or length
    if name == "yarn":
        kept.pop("truncate", None)
        if found.get("truncate") is False and kind.local_theta is None:
            kept["truncate"] = False
    if missing := [key for key in needed if kept.get(key) is None]:
        raise ModelError(
            f"config.json: rope_scaling with rope_type={name!r} lacks {', '.join(missing)}"
        )
    scaling: Scaling = scaling_of({"rope_type": name, **kept})
    return scaling


def rope_text(config: ModelConfig, kind: HfKind, sequence_length: int) -> dict[str, Any]:
    """Return the keys of config.json that say so.

    transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`.
    """
    scaling = dict(config.rope_scaling or {})
    described = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
    if config.rope_scaling is not None and scaling["rope_type"] == "dynamic":
        del described[ORIGINAL]  # the longest context itself
    text: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": described}
    if scaling:
        text["rope_scaling"] = {key: described[key] for key in described if key != "rope_theta"}
    if (most := longest(config.rope_scaling)) is not None:
        text["max_position_embeddings"] = most
    if kind.local_theta is not None:
        local = described
        if config.window_rope_theta is not None:
            local = {"rope_type": "default", "rope_theta": config.window_rope_theta}
        text["rope_parameters"] = {FULL: described, SLIDING: dict(local)}
        text["rope_local_base_freq"] = local["rope_theta"]
    return text


def windows_of(
    text: Mapping[str, Any], name: str, kind: HfKind
) -> tuple[int, tuple[bool, ...] | None]:
    """Return the window in tokens, 0 for none, and which layers have it, None for all.

    Raises:
        ModelError: layers of other types, or a window that a class does not read.
    """
    n_layers, types = text["num_hidden_layers"], text.get("layer_types")
    if types is not None:
        if others := sorted(set(types) - {FULL, SLIDING}):
            raise ModelError(
                f"config.json: layer_types has layers other than {FULL!r} and {SLIDING!r}: "
                f"{', '.join(map(repr, others))}"
            )
        if len(types) != n_layers:
            raise ModelError(
                f"config.json: layer_types has {len(types)} layers, num_hidden_layers={n_layers}"
            )
    if "window" not in kind.able:
        if SLIDING in (types or ()):
            raise ModelError(
                f"config.json: layer_types has {SLIDING!r}, which is not supported in "
                f"{kind.name}; only {FULL!r} is"
            )
        asked = text.get("sliding_window") if name == "mixtral" else None
        if asked or text.get("use_sliding_window"):
            raise ModelError(
                f"config.json: sliding_window={text.get('sliding_window')!r} is not supported in "
                f"{kind.name}; only null is"
            )
        return 0, None
    window = text.get("sliding_window", kind.window)
    if name in EVERYWHERE:
        return window or 0, None
    if "use_sliding_window" in text or name not in FULL_EVERY:
        window = window if text.get("use_sliding_window") else None
    has = _marks(text, name, n_layers) if types is None else [kind == SLIDING for kind in types]
    if window is None and types is not None and any(has):
        raise ModelError(f"config.json: layer_types has {SLIDING!r} without a sliding_window")
    if window is None or not any(has):
        return 0, None
    return window, None if all(has) else tuple(has)


def _marks(text: Mapping[str, Any], name: str, n_layers: int) -> list[bool]:
    """Return which layers have the window, where config.json does not name them."""
    if name in FULL_EVERY:
        every = text.get("sliding_window_pattern") if name == "gemma3_text" else None
        return [bool((i + 1) % (every or FULL_EVERY[name])) for i in range(n_layers)]
    if name == "smollm3":
        return [not has for has in turned_layers(text, name) or [True] * n_layers]
    first = text.get("max_window_layers", 28)
    return [i >= first for i in range(n_layers)]


def window_text(config: ModelConfig, name: str) -> dict[str, Any]:
    """Return the keys of config.json that say which layers have which window, and which turn
    queries and keys.
    """
    n_layers, has = config.n_layers, [config.window_of(i) > 0 for i in range(config.n_layers)]
    if name in EVERYWHERE:
        return {"sliding_window": config.window or None}
    text: dict[str, Any] = {}
    if name == "smollm3":
        text["no_rope_layers"] = [int(config.has_rope(i)) for i in range(n_layers)]
    if name in FULL_EVERY:
        # Its class makes the mask of a window, also where no layer has one.
        text["sliding_window"] = config.window or 4096
    elif config.window:
        text |= {"use_sliding_window": True, "sliding_window": config.window}
        text["max_window_layers"] = has.index(True)
    elif name != "smollm3":
        return text
    return text | {"layer_types": [SLIDING if mark else FULL for mark in has]}


def turned_layers(text: Mapping[str, Any], name: str) -> tuple[bool, ...] | None:
    """Return which layers turn queries and keys by their positions; None for all."""
    if name != "smollm3":
        return None
    n_layers, marks = text["num_hidden_layers"], text.get("no_rope_layers")
    if marks is None:
        every = text.get("no_rope_layer_interval", 4)
        marks = [(i + 1) % every != 0 for i in range(n_layers)]
    found = tuple(bool(mark) for mark in marks)
    if len(found) != n_layers:
        raise ModelError(
            f"config.json: no_rope_layers has {len(found)} layers, num_hidden_layers={n_layers}"
        )
    return None if all(found) else found
