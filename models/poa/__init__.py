"""POA: self-distillation of vision transformers of every size in one run.

Others use `config` (PoaConfig and its parts), `training` (SelfDistillation, Replicas) and `knn`
(cls_features, knn_accuracy); the network itself is `vit.ViT`.
"""
