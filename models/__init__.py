"""What is trained: one decoder as a value, a list of weights and a module. No rank, no environment.

Others use `config.ModelConfig`, `architecture` and `counts` (all without torch), `decoder.Decoder`,
`layers.Places`, `moe.MoE`, and `hf` for folders of Hugging Face; `vit.ViT` stands by itself.
"""
