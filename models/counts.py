"""What a decoder costs: parameters, floating-point operations, activation bytes. Needs no torch.

All numbers are whole-model: divide by the degrees of a layout to get one device's share.
"""

from __future__ import annotations

from motet.models.config import ModelConfig


def parameters_per_layer(config: ModelConfig) -> int:
    """Return the parameters of one block, norms included."""
    attention = 2 * config.d_model * (config.query_width + config.kv_width)
    feed_forward = 3 * config.d_model * config.d_ffn
    norms = 2 * config.d_model
    if config.qk_norm == "head":
        norms += 2 * config.head_width
    elif config.qk_norm == "full":
        norms += config.query_width + config.kv_width
    return attention + feed_forward + norms


def parameters_non_embedding(config: ModelConfig) -> int:
    """Return the parameters outside the embedding and the head (N of arXiv:2001.08361, section 2.1)."""
    return config.n_layers * parameters_per_layer(config) + config.d_model


def parameters(config: ModelConfig) -> int:
    """Return the number of distinct parameters; tied embeddings are counted once."""
    tables = 1 if config.tied_embeddings else 2
    return parameters_non_embedding(config) + tables * config.vocabulary_size * config.d_model


def matmul_parameters(config: ModelConfig) -> int:
    """Return the weights that multiply every token: projections and head; no lookups, no norms."""
    attention = 2 * config.d_model * (config.query_width + config.kv_width)
    feed_forward = 3 * config.d_model * config.d_ffn
    head = config.vocabulary_size * config.d_model
    return config.n_layers * (attention + feed_forward) + head


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return floating-point operations of forward and backward for one token.

    6 N for the N weights that multiply each token (head included, tied or not), plus
    12 L (H K) T for attention scores and their weighted sum: PaLM, arXiv:2204.02311, appendix B;
    Kaplan et al., arXiv:2001.08361, section 2.1, has the same terms. By that convention attention
    counts the full T x T square although the causal half is never needed, and recomputation is not
    counted, so that model FLOPs utilization compares across implementations.
    """
    attention = 12 * config.n_layers * config.query_width * sequence_length
    return float(6 * matmul_parameters(config) + attention)


def activation_bytes_per_layer(
    config: ModelConfig, sequence_length: int, sequences: int, bytes_per_value: int = 2
) -> int:
    """Estimate the bytes that one block keeps for its backward pass, without recomputation.

    The count of Korthikanti et al., arXiv:2205.05198, section 4.1 (34 s b h + 5 a s^2 b for a GPT
    block) redone for this block: no dropout, SwiGLU instead of GELU, grouped keys and values, and
    attention that stores its output and one fp32 log-sum per head and query, not the square. Per token: the inputs
    of two norms, of the projections and of the feed-forward (4 D), queries twice and keys twice
    when rotated and normalized, values, attention output, and gate, up, silu(gate), product (4 F).
    """
    copies = 2 if config.qk_norm != "none" else 1
    values = (
        4 * config.d_model
        + (copies + 1) * config.query_width
        + (copies + 1) * config.kv_width
        + 4 * config.d_ffn
    )
    log_sums = 4 * config.n_heads
    return sequences * sequence_length * (values * bytes_per_value + log_sums)


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
    whole = activation_bytes_per_layer(config, sequence_length, sequences, bytes_per_value)
    kept = recomputed_bytes_per_layer(config, sequence_length, sequences, bytes_per_value)
    blocks = config.n_layers * kept + whole if recompute else config.n_layers * whole
    tokens = sequences * sequence_length
    ends = 3 * tokens * config.d_model * bytes_per_value
    rows = min(loss_rows, tokens)
    loss = 4 * config.vocabulary_size * (rows + config.d_model)
    return blocks + ends + loss
