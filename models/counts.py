"""What a decoder costs: parameters, floating-point operations, activation bytes. Needs no torch.

All numbers are whole-model: divide by the degrees of a layout to get one device's share.
"""

from __future__ import annotations

from motet.models.architecture import (
    Split,
    WeightSpec,
    block_kinds,
    block_products,
    block_weights,
    first_weights,
    head_product,
    hidden_products,
    last_weights,
    mixing,
)
from motet.models.config import ModelConfig


def parameters_per_layer(config: ModelConfig, layer: int = 0) -> int:
    """Return the parameters of block `layer` (from 0), norms included; blocks differ where only
    some have experts.
    """
    return sum(weight.numel for weight in block_weights(config, layer))


def expert_parameters_per_layer(config: ModelConfig) -> int:
    """Return the parameters of the routed experts of one block that has them: what expert
    parallelism splits; 0 without experts.
    """
    return max(
        sum(weight.numel for weight in block_weights(config, layer) if weight.is_expert)
        for layer, _ in block_kinds(config)
    )


def parameters_non_embedding(config: ModelConfig) -> int:
    """Return the parameters outside the embedding and the head (N of arXiv:2001.08361, section
    2.1).
    """
    layers = sum(number * parameters_per_layer(config, i) for i, number in block_kinds(config))
    return layers + sum(w.numel for w in _ends(config) if w.split is not Split.VOCABULARY)


def parameters(config: ModelConfig) -> int:
    """Return the number of distinct parameters; tied embeddings are counted once."""
    tables = sum(w.numel for w in _ends(config) if w.split is Split.VOCABULARY)
    return parameters_non_embedding(config) + tables


def _ends(config: ModelConfig) -> list[WeightSpec]:
    return [*first_weights(config), *last_weights(config)]


def matmul_parameters_per_layer(config: ModelConfig, layer: int = 0) -> int:
    """Return the weights of block `layer` that multiply every token: projections and visited
    experts; no norms or biases.
    """
    return sum(product.multiplies for product in block_products(config, layer))


def matmul_parameters(config: ModelConfig) -> int:
    """Return the weights that multiply every token: of all blocks, and the head; no lookups."""
    kinds = block_kinds(config)
    blocks = sum(number * matmul_parameters_per_layer(config, i) for i, number in kinds)
    return blocks + head_product(config).multiplies


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return floating-point operations of forward and backward for one token.

    6 N for the N weights that multiply each token (head included, tied or not; of the routed
    experts those that a token visits), plus
    12 L (H K) T for attention scores and their weighted sum (fewer keys in a layer with a window:
    `Mixing.operations`): PaLM, arXiv:2204.02311, appendix B;
    Kaplan et al., arXiv:2001.08361, section 2.1, has the same terms. By that convention attention
    counts the full T x T square although the causal half is never needed, and recomputation is not
    counted, so that model FLOPs utilization compares across implementations.
    """
    blocks = sum(
        number * block_training_flops_per_token(config, sequence_length, layer)
        for layer, number in block_kinds(config)
    )
    return blocks + head_training_flops_per_token(config)


def block_training_flops_per_token(
    config: ModelConfig, sequence_length: int, layer: int = 0
) -> float:
    """Return those of block `layer` alone."""
    scores = mixing(config, layer).operations(sequence_length)
    return float(6 * matmul_parameters_per_layer(config, layer) + 3 * scores)


def head_training_flops_per_token(config: ModelConfig) -> float:
    """Return those of the head alone."""
    return float(6 * head_product(config).multiplies)


def activation_bytes_per_layer(
    config: ModelConfig,
    sequence_length: int,
    sequences: int,
    bytes_per_value: int = 2,
    layer: int = 0,
) -> int:
    """Estimate the bytes that block `layer` keeps for its backward pass, without recomputation.

    The count of Korthikanti et al., arXiv:2205.05198, section 4.1 (34 s b h + 5 a s^2 b for a GPT
    block) redone for this block: no dropout, SwiGLU instead of GELU, grouped keys and values, and
    attention that stores its output and one fp32 log-sum per head and query, not the square. Per
    token: the inputs of two norms (or four), and of what follows them (4 D, or 8), queries twice
    and keys twice when rotated and normalized, values, attention output, and gate, up, silu(gate),
    product (4 F).

    With experts, per token and visit: the row that goes in, the one that comes out (2 D) and 4 F of
    the expert's width; for the router one fp32 D and five fp32 rows of E; and the shared block.
    That is the mean over ranks: where experts live apart, a rank holds the rows that came to its
    experts, more than this as routing is less balanced.
    """
    copies = 2 if config.qk_norm != "none" else 1
    mixed = mixing(config, layer)
    norms = 4 if config.norm_position == "both" else 2
    values = (
        2 * norms * config.d_model
        + (copies + 1) * mixed.queries
        + copies * mixed.keys
        + mixed.values
    )
    wide_bytes = 4 * mixed.heads
    for product in hidden_products(config, layer):
        values += product.visits * 4 * product.inner
        if product.is_expert:
            values += product.visits * 2 * config.d_model
            wide_bytes += 4 * (config.d_model + 5 * product.matrices)
    return sequences * sequence_length * (values * bytes_per_value + wide_bytes)


def recomputed_bytes_per_layer(
    config: ModelConfig, sequence_length: int, sequences: int, bytes_per_value: int = 2
) -> int:
    """Return the bytes one block keeps under full recomputation: only its input."""
    return sequences * sequence_length * config.d_model * bytes_per_value


def activation_bytes(
    config: ModelConfig,
    sequence_length: int,
    sequences: int,
    bytes_per_value: int = 2,
    recompute: bool = False,
    loss_rows: int = 512,
) -> int:
    """Estimate the peak activation bytes of one forward and backward over `sequences`.

    All blocks, the final norm, and the loss: logits exist for `loss_rows` rows at a time in fp32,
    and the head keeps one fp32 gradient of its weight and one of its input.
    With `recompute` one block at a time is held in full.
    """
    wholes = [
        activation_bytes_per_layer(config, sequence_length, sequences, bytes_per_value, layer)
        for layer in range(config.n_layers)
    ]
    kept = recomputed_bytes_per_layer(config, sequence_length, sequences, bytes_per_value)
    blocks = config.n_layers * kept + max(wholes) if recompute else sum(wholes)
    tokens = sequences * sequence_length
    ends = 3 * tokens * config.d_model * bytes_per_value
    rows = min(loss_rows, tokens)
    loss = 4 * config.vocabulary_size * (rows + config.d_model)
    return blocks + ends + loss
